"""Save and load adapters.

A folder is laid out as mlx-lm lays out its own (`adapters.safetensors` and
`adapter_config.json`), so `mlx_lm.generate --adapter-path` takes it as it is. What
mlx-lm's config cannot say, such as the exact paths adapted, stands under `mlxtune`.
Adapters that mlx-lm or PEFT wrote are read too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapters.peft import read_peft
from mlxtune.adapters.saved import (
    CONFIG,
    KINDS,
    SavedAdapter,
    check_complete,
    check_finite,
    load_arrays,
    read_config,
    save_arrays,
    within_block,
)
from mlxtune.errors import RunError
from mlxtune.files import write_json
from mlxtune.layers.inject import add_lora, lora_layers, projections

WEIGHTS = "adapters.safetensors"


def save_adapter(folder: Path, model: nn.Module, *, base: str) -> None:
    """Write the model's adapter into an existing folder.

    Args:
        folder: where to.
        model: with adapters of one kind, rank and scale.
        base: name of the model that the adapter belongs to.

    Raises:
        StorageError: the disk refuses the write.
    """
    first = next(layer for _, layer in lora_layers(model))
    adapter = SavedAdapter(
        kind=first.kind,
        rank=first.rank,
        scale=first.scale,
        arrays=adapter_arrays(model),
        base=base,
        blocks=len(model.layers),
        where=str(folder),
    )
    targets = sorted(path for path, _ in lora_layers(model))
    write_mlx_lm(folder, adapter, extra={"mlxtune": {"format": 1, "targets": targets}})


def write_mlx_lm(
    folder: Path, adapter: SavedAdapter, *, extra: dict[str, Any] | None = None
) -> None:
    """Write an adapter as mlx-lm does, into an existing folder.

    Where only some blocks are adapted, mlx-lm makes layers of the same name in the others
    too, and for want of saved values they change nothing.

    Args:
        folder: where to.
        adapter: what to write.
        extra: more entries for the config.

    Raises:
        StorageError: the disk refuses the write.
    """
    config = {
        "fine_tune_type": adapter.kind,
        # To mlx-lm, as to its command line, -1 is all of them.
        "num_layers": adapter.blocks if adapter.blocks is not None else -1,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": sorted({within_block(path) or path for path in adapter.targets}),
        },
        "model": adapter.base,
    }
    save_arrays(folder / WEIGHTS, adapter.arrays)
    write_json(folder / CONFIG, config | (extra or {}))


def read_adapter(folder: Path) -> SavedAdapter:
    """An adapter that mlxtune, mlx-lm or PEFT wrote.

    Raises:
        RunError: the folder holds none, a damaged one, one whose weights are no numbers, or
            one of a kind that cannot be used here, which is named.
    """
    config = read_config(folder)
    peft = "peft_type" in config
    adapter = read_peft(folder, config) if peft else _read_mlx_lm(folder, config)
    check_finite(adapter.arrays, where=str(folder))
    return adapter


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Put a saved adapter on a model that has none.

    Raises:
        RunError: as `read_adapter`, or it is the adapter of another model.
    """
    put_adapter(read_adapter(folder), model)


def put_adapter(adapter: SavedAdapter, model: nn.Module) -> None:
    """Put an adapter on a model that has none.

    Raises:
        RunError: it is the adapter of another model.
    """
    adapter = fitted(adapter, model)
    add_lora(
        model,
        adapter.targets,
        rank=adapter.rank,
        scale=adapter.scale,
        dora=adapter.kind == "dora",
    )
    set_adapter_arrays(model, adapter.arrays, where=adapter.where)


def start_from(adapter: SavedAdapter, model: nn.Module) -> None:
    """Give the fresh adapters of a model the values of a saved one.

    With another scale B is changed so that what the adapter computes stays the same.
    Layers that the saved adapter does not have stay fresh.

    Raises:
        RunError: it is the adapter of another model, it is of another kind or rank than
            the model's, or goes on a layer that has no adapter here.
    """
    adapter = fitted(adapter, model)
    layers = dict(lora_layers(model))
    first = next(iter(layers.values()))
    if adapter.kind != first.kind:
        raise RunError(
            f"this adapter is {adapter.kind}, and the recipe asks for {first.kind}",
            where=adapter.where,
            remedy=f"set lora.dora = {'true' if adapter.kind == 'dora' else 'false'}",
        )
    if adapter.rank != first.rank:
        raise RunError(
            f"this adapter has rank {adapter.rank}, and the recipe asks for {first.rank}",
            where=adapter.where,
            remedy=f"set lora.rank = {adapter.rank}",
        )
    if missing := [path for path in adapter.targets if path not in layers]:
        raise RunError(
            f"this adapter goes on {missing[0]}, which the recipe leaves out",
            where=adapter.where,
            remedy="widen lora.target_modules or lora.layers",
        )
    factor = adapter.scale / first.scale
    arrays = {
        name: array * factor if name.endswith(".lora_b") and factor != 1 else array
        for name, array in adapter.arrays.items()
    }
    set_adapter_arrays(model, adapter_arrays(model) | arrays, where=adapter.where)


def adapter_arrays(model: nn.Module) -> dict[str, mx.array]:
    """Path to array for all adapter parameters, such as `….q_proj.lora_a`."""
    return {
        f"{path}.{name}": layer[name]
        for path, layer in lora_layers(model)
        for name in layer.trained()
    }


def set_adapter_arrays(model: nn.Module, arrays: dict[str, mx.array], *, where: str) -> None:
    """Give the model's adapters these values.

    Raises:
        RunError: names or shapes are not those of the model's adapters.
    """
    have = adapter_arrays(model)
    if wrong := sorted(have.keys() ^ arrays.keys()):
        raise RunError(
            f"the saved adapter does not fit this model, for one at {wrong[0]}", where=where
        )
    for name, array in sorted(arrays.items()):
        if array.shape != have[name].shape:
            raise RunError(
                f"the saved adapter does not fit this model, for one at {name}, which is "
                f"{array.shape} there and {have[name].shape} here",
                where=where,
            )
    model.load_weights(list(arrays.items()), strict=False)


def fitted(adapter: SavedAdapter, model: nn.Module) -> SavedAdapter:
    """The adapter with its paths as this model has them.

    Libraries differ in what stands before the blocks (`model.language_model.layers.0`,
    `language_model.model.layers.0`); from `layers.` on they agree.

    Raises:
        RunError: the model has no such layer.
    """
    found = {*projections(model), *dict(lora_layers(model))}
    by_tail: dict[str, list[str]] = {}
    for path in sorted(found):
        by_tail.setdefault(_tail(path), []).append(path)
    here = {}
    for path in adapter.targets:
        alike = [path] if path in found else by_tail.get(_tail(path), [])
        if len(alike) != 1:
            raise RunError(
                f"the adapter goes on {path}, which "
                + ("could be several here" if alike else "this model does not have"),
                where=adapter.where,
                remedy=f"it was trained on {adapter.base}",
            )
        here[path] = alike[0]
    arrays = {
        f"{here[path]}.{array}": value
        for name, value in adapter.arrays.items()
        for path, _, array in [name.rpartition(".")]
    }
    return replace(adapter, arrays=arrays)


def _read_mlx_lm(folder: Path, config: dict[str, Any]) -> SavedAdapter:
    """Ours, or one that mlx-lm trained."""
    where = str(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise RunError(
            "these are all the weights of a model (mlx-lm's fine_tune_type full), not an adapter",
            where=where,
            remedy="make a model of them with mlx_lm.fuse and name it as model.path",
        )
    if kind not in KINDS:
        raise RunError(
            f"an adapter of kind {kind!r} cannot be used here",
            where=where,
            remedy=f"there are: {', '.join(KINDS)}",
        )
    try:
        parameters = config["lora_parameters"]
        rank, scale = int(parameters["rank"]), float(parameters["scale"])
        # mlx-lm's own count is of the blocks it adapted, ours of all there are.
        targets = config["mlxtune"]["targets"] if "mlxtune" in config else None
        blocks = int(config["num_layers"]) if targets is not None else None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"this folder holds no readable adapter: {error!r}", where=where) from None
    arrays = {n: a.astype(mx.float32) for n, a in load_arrays(folder / WEIGHTS).items()}
    check_complete(arrays, kind, where=where)
    adapter = SavedAdapter(
        kind=kind,
        rank=rank,
        scale=scale,
        arrays=arrays,
        base=str(config.get("model", "another model")),
        blocks=blocks,
        where=where,
    )
    if targets is not None and sorted(targets) != adapter.targets:
        raise RunError("its arrays are not those of the layers its config names", where=where)
    return adapter


def _tail(path: str) -> str:
    _, layers, rest = path.rpartition("layers.")
    return layers + rest
