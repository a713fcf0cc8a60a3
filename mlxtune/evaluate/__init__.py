"""Did it learn: held-out loss, answers, and how many of them are right."""
