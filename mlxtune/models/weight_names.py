"""What a tensor of a model's folder is called in MLX, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Iterable

# Hugging Face's index of a model in several files: `weight_map` is tensor name to file name.
INDEX = "model.safetensors.index.json"

# What belongs to a quantized weight in Ollama's files, and its name in MLX.
SCALE, _BIAS = ".weight.scale", ".weight.bias"
_IN_MLX = {SCALE: ".scales", _BIAS: ".biases"}


def in_mlx(names: Iterable[str]) -> dict[str, str]:
    """The names of a file's tensors, and what MLX calls them."""
    names = list(names)
    quantized = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
    made = {name: name for name in names}
    for module in quantized:
        for theirs, ours in _IN_MLX.items():
            if f"{module}{theirs}" in made:
                made[f"{module}{theirs}"] = f"{module}{ours}"
    return made
