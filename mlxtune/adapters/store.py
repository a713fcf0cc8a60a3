"""Save and load a LoRA adapter.

The folder is laid out as mlx-lm lays out its own (`adapters.safetensors` and
`adapter_config.json`), so `mlx_lm.generate --adapter-path` takes it as it is. What
mlx-lm's config cannot say, such as the exact paths adapted, stands under `mlxtune`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import flat
from mlxtune.errors import RunError
from mlxtune.files import atomic_file, write_json
from mlxtune.layers.inject import add_lora, lora_layers, projections

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(folder: Path, model: nn.Module, *, base: str) -> None:
    """Write the model's adapter into an existing folder.

    Args:
        folder: where to.
        model: with `LoRALinear` layers of one rank and scale.
        base: name of the model that the adapter belongs to.

    Raises:
        StorageError: the disk refuses the write.
    """
    layers = dict(lora_layers(model))
    first = next(iter(layers.values()))
    targets = sorted(layers)
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {
            "rank": first.lora_a.shape[1],
            "scale": first.scale,
            "dropout": 0.0,
            "keys": sorted({_within_block(path) for path in targets}),
        },
        "model": base,
        "mlxtune": {"format": 1, "targets": targets},
    }
    save_arrays(folder / WEIGHTS, adapter_arrays(model))
    write_json(folder / CONFIG, config)


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Put a saved adapter on a model that has none.

    Raises:
        RunError: the folder holds no adapter of ours, or one of another model.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        parameters = config["lora_parameters"]
        targets: list[str] = config["mlxtune"]["targets"]
        rank, scale = int(parameters["rank"]), float(parameters["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"this folder holds no readable adapter: {error!r}", where=str(folder)
        ) from None
    found = projections(model)
    if absent := [path for path in targets if path not in found]:
        raise RunError(
            f"the adapter goes on {absent[0]}, which this model does not have",
            where=str(folder),
            remedy=f"it was trained on {config.get('model', 'another model')}",
        )
    add_lora(model, targets, rank=rank, scale=scale)
    set_adapter_arrays(model, load_arrays(folder / WEIGHTS), where=str(folder))


def adapter_arrays(model: nn.Module) -> dict[str, mx.array]:
    """Path to array for all adapter parameters, such as `….q_proj.lora_a`."""
    return {
        f"{path}.{name}": layer[name]
        for path, layer in lora_layers(model)
        for name in ("lora_a", "lora_b")
    }


def set_adapter_arrays(model: nn.Module, arrays: dict[str, mx.array], *, where: str) -> None:
    """Give the model's adapters these values.

    Raises:
        RunError: names or shapes are not those of the model's adapters.
    """
    have = adapter_arrays(model)
    wrong = sorted(have.keys() ^ arrays.keys())
    wrong = wrong or sorted(name for name in have if have[name].shape != arrays[name].shape)
    if wrong:
        raise RunError(
            f"the saved adapter does not fit this model, for one at {wrong[0]}", where=where
        )
    model.load_weights(list(arrays.items()), strict=False)


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        StorageError: the disk refuses the write.
    """
    mx.eval(arrays)
    with atomic_file(path) as handle:
        # Through Python's file, because a full disk is an error there.
        mx.save_safetensors(handle, arrays, {"format": "mlx"})


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file.

    Raises:
        RunError: it is missing, or not a whole safetensors file.
    """
    try:
        arrays: Any = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"this file cannot be read: {error}", where=str(path)) from None
    return flat(arrays)


def _within_block(path: str) -> str:
    """`self_attn.q_proj` for `model.layers.3.self_attn.q_proj`."""
    _, _, rest = path.partition("layers.")
    return rest.partition(".")[2]
