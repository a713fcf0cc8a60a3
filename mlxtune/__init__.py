"""mlxtune: fine-tune language models on Apple silicon and ship them as GGUF.

Importing this package is cheap: MLX and the model code load when a room that needs
them is imported, so `mlxtune --help` stays quick.
"""

__version__ = "0.1.0"
