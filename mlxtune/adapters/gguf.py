"""A LoRA adapter as GGUF, for `llama-server --lora` and Ollama's ADAPTER.

llama.cpp adds `alpha / rank * B @ A` to a tensor for which the file has `NAME.lora_a`,
(rank, in), and `NAME.lora_b`, (out, rank).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from mlxtune.adapters.saved import SavedAdapter
from mlxtune.errors import ExportError
from mlxtune.files import atomic_files
from mlxtune.gguf.architectures import Architecture, Config, for_config
from mlxtune.gguf.heads import reordering
from mlxtune.gguf.metadata import text_config
from mlxtune.gguf.reader import GGUFFile
from mlxtune.models.resolve import public_name

_FUSE = "fuse it into the model instead: mlxtune export RUN, without --adapter-only"


def write_gguf_adapter(path: Path, adapter: SavedAdapter, config: Config) -> None:
    """Write an adapter that goes on the GGUF of its base.

    Args:
        path: the file.
        adapter: a LoRA; its scale becomes alpha.
        config: of the base, as in config.json.

    Raises:
        ExportError: llama.cpp has no such adapters, or not on these layers; or the file,
            read back, is another adapter.
        StorageError: the disk refuses the write.
    """
    entry, config = for_config(config), text_config(config)
    if adapter.kind != "lora":
        raise ExportError(
            "llama.cpp knows LoRA only, and this is a DoRA", where=adapter.where, remedy=_FUSE
        )
    tensors = {}
    for target in adapter.targets:
        name = _tensor(entry, target, adapter, tied=bool(config.get("tie_word_embeddings")))
        a, b = (np.array(adapter.arrays[f"{target}.lora_{x}"].astype(mx.float32)) for x in "ab")
        b = b.T
        a = a.T
        if heads := reordering(entry, f"{target}.weight", config):
            a, b = (heads.to_gguf(a), b) if heads.axis else (a, heads.to_gguf(b))
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(a)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(b)
    with atomic_files(path, overwrite=True) as folder:
        writer = gguf.GGUFWriter(folder / path.name, entry.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.scale * adapter.rank)
        writer.add_string("general.base_model.0.name", public_name(adapter.base))
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(folder / path.name, adapter, entry, config)


def _read_back(path: Path, adapter: SavedAdapter, entry: Architecture, config: Config) -> None:
    """See that the file is this adapter.

    Raises:
        ExportError: it is another.
    """
    file = GGUFFile(path)
    wanted = {
        "general.architecture": entry.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(np.float32(adapter.scale * adapter.rank)),
    }
    for key, value in wanted.items():
        if file.metadata.get(key) != value:
            raise _wrong(f"{key} is {file.metadata.get(key)!r} there, not {value!r}", path)
    left = set(file.tensors)
    for target in adapter.targets:
        name = entry.to_gguf_name(f"{target}.weight")
        heads = reordering(entry, f"{target}.weight", config)
        for which in "ab":
            stored = f"{name}.lora_{which}"
            if stored not in left:
                raise _wrong(f"{stored} is not there", path)
            left.remove(stored)
            values = file.data(stored)
            if heads and (which == "a") == bool(heads.axis):
                values = heads.to_hf(values)
            want = np.array(adapter.arrays[f"{target}.lora_{which}"].astype(mx.float32)).T
            if not np.array_equal(values, want):
                raise _wrong(f"{stored} holds other numbers", path)
    if left:
        raise _wrong(f"{min(left)} is there too", path)


def _wrong(what: str, path: Path) -> ExportError:
    return ExportError(
        f"the file does not hold the adapter: {what}",
        where=str(path),
        remedy="nothing was left there. Please report this",
    )


def _tensor(entry: Architecture, target: str, adapter: SavedAdapter, *, tied: bool) -> str:
    name = entry.to_gguf_name(f"{target}.weight")
    if name in (None, "token_embd.weight") or (tied and name == "output.weight"):
        raise ExportError(
            f"llama.cpp has no place for an adapter of {target}",
            where=adapter.where,
            remedy=_FUSE,
        )
    if adapter.arrays[f"{target}.lora_a"].ndim > 2:
        raise ExportError(
            f"{target} is of many experts at once, which is not written as an adapter",
            where=adapter.where,
            remedy=_FUSE,
        )
    return name
