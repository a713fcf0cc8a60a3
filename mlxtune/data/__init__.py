"""Records become conversations, conversations tokens with loss weights, tokens batches."""
