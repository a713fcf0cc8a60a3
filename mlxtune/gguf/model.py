"""A GGUF file as what mlx-lm wants of a model: config, weights, packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf.quants
import mlx.core as mx
import numpy as np
from gguf.constants import GGMLQuantizationType

from mlxtune.errors import ModelError
from mlxtune.gguf.architectures import (
    Architecture,
    Config,
    config_from_metadata,
    deinterleave_rows,
    for_gguf,
    rotary_heads,
    to_hf_name,
)
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.unpack import GROUP_SIZE, affine


@dataclass(frozen=True)
class GGUFModel:
    """A model read from GGUF.

    Attributes:
        config: what config.json would say.
        weights: HF parameter name to array; packed layers have `.weight` (uint32),
            `.scales` and `.biases` (float16).
        packing: path of a packed layer to its `group_size` and `bits`.
        expanded: names of tensors whose type has no exact packed form in MLX; they are
            float16.
    """

    config: Config
    weights: dict[str, mx.array]
    packing: dict[str, dict[str, int]]
    expanded: tuple[str, ...]


def read_model(file: GGUFFile) -> GGUFModel:
    """Weights of `file` under their HF names, packed wherever MLX can hold them exactly.

    Raises:
        ModelError: the architecture or a tensor is not known.
    """
    entry = for_gguf(str(file.metadata.get("general.architecture")))
    tied = "output.weight" not in file.tensors
    config = config_from_metadata(entry, file.metadata, tied=tied)
    weights: dict[str, mx.array] = {}
    packing: dict[str, dict[str, int]] = {}
    expanded: list[str] = []
    for name in file.tensors:
        hf_name = to_hf_name(name)
        if hf_name is None:
            raise ModelError(f"the tensor {name} is not part of a plain {entry.name} model")
        path = hf_name.removesuffix(".weight")
        try:
            arrays = list(_arrays(file, name, hf_name, entry, config))
        except (ValueError, NotImplementedError) as error:
            info = file.tensors[name]
            raise ModelError(
                f"tensor {name} of type {info.type.name} and shape {info.shape} cannot be read: "
                f"{error}",
                where=str(file.path),
            ) from None
        for suffix, array, bits in arrays:
            weights[f"{path}{suffix}" if suffix else hf_name] = array
            if bits:
                packing[path] = {"group_size": GROUP_SIZE, "bits": bits}
            elif not suffix and file.tensors[name].type not in _PLAIN:
                expanded.append(hf_name)
    return GGUFModel(config, weights, packing, tuple(expanded))


_PLAIN = {
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
}


def _arrays(
    file: GGUFFile, name: str, hf_name: str, entry: Architecture, config: Config
) -> Iterator[tuple[str, mx.array, int]]:
    """(suffix, array, bits) of one tensor; bits is 0 for arrays that are not packed."""
    info = file.tensors[name]
    data = file.data(name)
    heads = rotary_heads(entry, hf_name, config)

    def ordered(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return deinterleave_rows(rows, heads) if heads else rows

    if info.type == GGMLQuantizationType.BF16:
        yield "", mx.array(ordered(data)).view(mx.bfloat16), 0
    elif info.type in _PLAIN:
        yield "", mx.array(ordered(data)), 0
    elif packed := affine(info.type, data):
        yield ".weight", mx.array(ordered(packed.packed())), packed.bits
        yield ".scales", mx.array(ordered(packed.scales)), packed.bits
        yield ".biases", mx.array(ordered(packed.biases)), packed.bits
    else:
        full = gguf.quants.dequantize(data, info.type)
        yield "", mx.array(ordered(full.astype(np.float16))), 0


def open_model(path: Path) -> tuple[GGUFFile, GGUFModel]:
    """Open and read a GGUF file; the file gives the tokenizer too."""
    file = GGUFFile(path)
    return file, read_model(file)
