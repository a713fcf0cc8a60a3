"""Work on data before training: filter, scrub, remove duplicates, split, count."""
