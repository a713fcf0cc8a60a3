"""Hand a trained model to the programs that people run."""
