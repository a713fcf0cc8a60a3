"""mlxtune: fine-tune language models on Apple silicon and ship them as GGUF.

Importing this package is cheap: MLX and the model code load when a room that needs
them is imported, so `mlxtune --help` stays quick. It sets one environment variable on
macOS, which has to be there before MLX uses the GPU; `mlxtune.watchdog` says why.
"""

from mlxtune.watchdog import relax_watchdog

__version__ = "0.1.0"

relax_watchdog()
