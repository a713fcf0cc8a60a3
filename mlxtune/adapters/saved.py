"""An adapter apart from any model: what a folder of any known layout holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.arrays import flat, scalar
from mlxtune.errors import RunError
from mlxtune.files import LFS_POINTER, LFS_REMEDY, atomic_file, is_lfs_pointer
from mlxtune.gpu_errors import fault_of

CONFIG = "adapter_config.json"
KINDS = ("lora", "dora")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's arrays and what is needed to put them on a model.

    Attributes:
        kind: `lora` or `dora`.
        rank: of every layer.
        scale: factor on the update.
        arrays: path and name to float32 array, as `model.layers.0.mlp.up_proj.lora_a`:
            `lora_a` (in, rank), `lora_b` (rank, out), with DoRA `m` (out,).
        base: name of the model that it belongs to.
        blocks: how many blocks that model has; None if unknown.
        where: the folder it was read from.
    """

    kind: str
    rank: int
    scale: float
    arrays: dict[str, mx.array]
    base: str
    blocks: int | None
    where: str

    @property
    def targets(self) -> list[str]:
        """Paths of the layers that it goes on."""
        return sorted({name.rpartition(".")[0] for name in self.arrays})


def read_config(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself.

    Raises:
        RunError: there is no such folder, or no readable config in it.
    """
    if not folder.is_dir():
        raise RunError("there is no such folder", where=str(folder))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no table")
    except (OSError, ValueError) as error:
        raise RunError(
            f"this folder holds no readable adapter: {error}",
            where=str(folder),
            remedy=f"an adapter of mlxtune, mlx-lm or PEFT has an {CONFIG}",
        ) from None
    return config


def check_complete(names: Iterable[str], kind: str, *, where: str) -> None:
    """Refuse an adapter of which a layer lacks an array or has one too many.

    Raises:
        RunError: it is so; the first is named.
    """
    wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    have: dict[str, set[str]] = {}
    for name in names:
        path, _, array = name.rpartition(".")
        have.setdefault(path, set()).add(array)
    if not have:
        raise RunError("this adapter is empty: it has no arrays", where=where)
    for path, arrays in sorted(have.items()):
        if wrong := sorted(arrays ^ wanted):
            verb = "lacks" if wrong[0] in wanted else "has an unknown array"
            raise RunError(f"the adapter of {path} {verb} {wrong[0]}", where=where)


def check_finite(arrays: Mapping[str, mx.array], *, where: str) -> None:
    """Refuse an adapter with weights that are no numbers: a model with it answers nothing.

    Raises:
        RunError: it has such weights; they are counted, and the first array is named.
    """
    found = {name: mx.logical_not(mx.isfinite(array)).sum() for name, array in arrays.items()}
    mx.eval(found)
    wrong = {name: int(scalar(count)) for name, count in sorted(found.items()) if scalar(count)}
    if wrong:
        whole = sum(array.size for array in arrays.values())
        raise RunError(
            f"the adapter is damaged: {sum(wrong.values()):,} of its {whole:,} weights are no "
            f"numbers (nan or infinite), the first in {next(iter(wrong))}",
            where=where,
            remedy="train again with a lower train.learning_rate, or take a copy that is whole",
        )


def within_block(path: str) -> str:
    """`self_attn.q_proj` for `model.layers.3.self_attn.q_proj`; nothing outside of blocks."""
    _, _, rest = path.partition("layers.")
    return rest.partition(".")[2]


def save_arrays(path: Path, arrays: dict[str, mx.array], *, format: str = "mlx") -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        StorageError: the disk refuses the write.
    """
    mx.eval(arrays)
    with atomic_file(path) as handle:
        # Through Python's file, because a full disk is an error there.
        mx.save_safetensors(handle, arrays, {"format": format})


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file.

    Raises:
        RunError: it is missing, or not a whole safetensors file.
    """
    if is_lfs_pointer(path):
        raise RunError(LFS_POINTER, where=str(path), remedy=LFS_REMEDY)
    try:
        arrays: Any = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as error:
        if fault_of(error) is not None:  # of the GPU, or of memory: not the file's
            raise
        raise RunError(f"this file cannot be read: {error}", where=str(path)) from None
    return flat(arrays)
