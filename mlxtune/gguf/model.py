"""A GGUF file as what mlx-lm wants of a model: config, weights, packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ModelError
from mlxtune.gguf.architectures import (
    Architecture,
    Config,
    for_gguf,
)
from mlxtune.gguf.heads import reordering
from mlxtune.gguf.metadata import config_from_metadata, predicting_blocks
from mlxtune.gguf.reader import GGUFFile, damaged
from mlxtune.gguf.rope import rope_config
from mlxtune.gguf.tensors import PLAIN, expanded, is_parameter, parameter_name, unreadable
from mlxtune.gguf.unpack import GROUP_SIZE, affine, affine_form

# What `general.type` may say beside `model` and `adapter`.
_OTHERS = {
    "mmproj": "the part of a model that sees or hears, without the language model",
    "imatrix": "an importance matrix (--imatrix takes it), not a model",
    "vocab": "a vocabulary without a model",
}


@dataclass(frozen=True)
class GGUFModel:
    """A model read from GGUF.

    Attributes:
        config: what config.json would say.
        weights: HF parameter name to array; packed layers have `.weight` (uint32),
            `.scales` and `.biases` (float16, or float32 where the type needs it).
        packing: path of a packed layer to its `group_size` and `bits`.
        expanded: names of tensors whose type has no exact packed form in MLX; they are
            float16.
    """

    config: Config
    weights: dict[str, mx.array]
    packing: dict[str, dict[str, int]]
    expanded: tuple[str, ...]


def read_config(file: GGUFFile) -> tuple[Architecture, Config]:
    """The architecture of `file` and what config.json would say.

    Raises:
        ModelError: the architecture is not known, or a size is missing or makes no sense.
    """
    _require_model(file)
    entry = for_gguf(str(file.metadata.get("general.architecture")))
    tied = "output.weight" not in file.tensors
    try:
        config = config_from_metadata(entry, file.metadata, tied=tied)
        config |= rope_config(entry, file, config)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise damaged(file.path, f"the metadata of its model makes no sense: {error}") from None
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    count = config["num_hidden_layers"] + predicting_blocks(entry, file.metadata)
    if count != len(blocks):
        # Said to be billions, they would be built before anyone misses their tensors.
        raise damaged(file.path, f"it has tensors of {len(blocks)} blocks and speaks of {count}")
    config |= entry.per_layer(config["num_hidden_layers"])
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return entry, config


def _require_model(file: GGUFFile) -> None:
    """See that a file is a model's: llama.cpp keeps other things as GGUF too.

    Raises:
        ModelError: it is an adapter, or another part of a model.
    """
    kind = str(file.metadata.get("general.type", "model"))
    if kind == "adapter":
        base = file.metadata.get("general.base_model.0.name")
        raise ModelError(
            "this GGUF holds an adapter, not a model",
            where=str(file.path),
            remedy=f"name the model that it goes on{f', {base},' if base else ''}; llama.cpp puts "
            "them together: llama-server -m MODEL.gguf --lora ADAPTER.gguf",
        )
    if kind in _OTHERS or "general.architecture" not in file.metadata:
        what = _OTHERS.get(kind, "no model: it names no architecture")
        raise ModelError(
            f"this GGUF holds {what}",
            where=str(file.path),
            remedy="name the model's own .gguf file",
        )


def read_model(file: GGUFFile) -> GGUFModel:
    """Weights of `file` under their HF names, packed wherever MLX can hold them exactly.

    Raises:
        ModelError: the architecture or a tensor is not known.
    """
    entry, config = read_config(file)
    weights: dict[str, mx.array] = {}
    packing: dict[str, dict[str, int]] = {}
    wide: list[str] = []
    for name, info in file.tensors.items():
        if not is_parameter(name, config):
            continue
        hf_name = parameter_name(file, entry, name)
        path = hf_name.removesuffix(".weight")
        try:
            arrays = list(_arrays(file, name, hf_name, entry, config))
        except (ValueError, NotImplementedError) as error:
            raise unreadable(file, name, error) from None
        for suffix, array, bits in arrays:
            weights[f"{path}{suffix}" if suffix else hf_name] = array
            if bits:
                packing[path] = {"group_size": GROUP_SIZE, "bits": bits}
            elif not suffix and info.type not in PLAIN:
                wide.append(hf_name)
    return GGUFModel(config, weights, packing, tuple(wide))


def read_packing(file: GGUFFile) -> dict[str, tuple[int, Any]]:
    """Parameter path to the bits and the type of scales in which `read_model` packs it.

    From the header alone.
    """
    entry, config = read_config(file)
    packing = {}
    for name, info in file.tensors.items():
        if is_parameter(name, config) and (form := affine_form(info.type)):
            packing[parameter_name(file, entry, name).removesuffix(".weight")] = form
    return packing


def _arrays(
    file: GGUFFile, name: str, hf_name: str, entry: Architecture, config: Config
) -> Iterator[tuple[str, mx.array, int]]:
    """(suffix, array, bits) of one tensor; bits is 0 for arrays that are not packed."""
    info = file.tensors[name]
    data = file.data(name)
    heads = reordering(entry, hf_name, config)

    def ordered(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return heads.to_hf(rows) if heads else rows

    def shaped(rows: np.ndarray[Any, Any]) -> mx.array:
        return mx.array(ordered(rows.reshape(*info.shape[:-1], -1)))

    if change := entry.change(hf_name):
        yield "", mx.array(ordered(change.to_hf(expanded(data, info.type)))), 0
    elif info.type == Type.BF16:
        yield "", mx.array(ordered(data)).view(mx.bfloat16), 0
    elif info.type in PLAIN:
        yield "", mx.array(ordered(data)), 0
    elif packed := affine(info.type, data.reshape(-1, data.shape[-1])):
        yield ".weight", shaped(packed.packed()), packed.bits
        yield ".scales", shaped(packed.scales), packed.bits
        yield ".biases", shaped(packed.biases), packed.bits
    else:
        yield "", mx.array(ordered(expanded(data, info.type).astype(np.float16))), 0


def open_model(path: Path) -> tuple[GGUFFile, GGUFModel]:
    """Open and read a GGUF file; the file gives the tokenizer too."""
    file = GGUFFile(path)
    return file, read_model(file)
