"""Which type each tensor of a file type has.

A file type such as Q4_K_M is a mixture: tensors that suffer more from rounding get more
bits. The rules are llama.cpp's (`llama_tensor_get_type` of src/llama-quant.cpp,
https://github.com/ggml-org/llama.cpp, MIT), for the types and architectures that are
written here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Type

# Types without blocks: every matrix has the same.
_PLAIN = (Type.F32, Type.F16, Type.BF16)

# For rows that do not divide into a type's blocks of 256. Where they do not divide into
# blocks of 32 either, float16.
_FALLBACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}

# Matrices that stay float32: they are small, and much hangs on them.
_KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$|ssm_conv1d|per_layer_model_proj")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True)
class FileType:
    """A file type.

    Attributes:
        number: `general.file_type` of a file.
        type: of most of its matrices.
    """

    number: LlamaFileType
    type: Type


FILE_TYPES: dict[str, FileType] = {
    "f32": FileType(LlamaFileType.ALL_F32, Type.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Type.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Type.BF16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
    "q5_k_s": FileType(LlamaFileType.MOSTLY_Q5_K_S, Type.Q5_K),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q4_k_s": FileType(LlamaFileType.MOSTLY_Q4_K_S, Type.Q4_K),
    "q5_0": FileType(LlamaFileType.MOSTLY_Q5_0, Type.Q5_0),
    "q5_1": FileType(LlamaFileType.MOSTLY_Q5_1, Type.Q5_1),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, Type.Q4_1),
    "q3_k_m": FileType(LlamaFileType.MOSTLY_Q3_K_M, Type.Q3_K),
    "q2_k": FileType(LlamaFileType.MOSTLY_Q2_K, Type.Q2_K),
}


def tensor_types(
    file_type: str,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    *,
    architecture: str,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    tied: bool,
    has_imatrix: bool = False,
) -> list[Type]:
    """The type of every tensor.

    Args:
        file_type: a key of `FILE_TYPES`.
        tensors: name as GGUF has it, and shape with the rows' width last. In any order.
        architecture: as GGUF names it.
        layers: of the model.
        heads: query heads of a layer.
        kv_heads: key and value heads of a layer.
        experts: of a layer; 0 for dense models.
        tied: the embedding is the output matrix too.
        has_imatrix: an importance matrix is at hand.
    """
    model = _Model(file_type, architecture, layers, heads // kv_heads, experts, tied, has_imatrix)
    # "The n-th attn_v" counts in the order of the layers, whatever that of the file is.
    order = sorted(range(len(tensors)), key=lambda i: (_layer(tensors[i][0]), tensors[i][0]))
    values = [i for i in order if re.search(r"attn_(v|qkv)\.weight$", tensors[i][0])]
    downs = [i for i in order if re.search(r"ffn_down.*weight$", tensors[i][0])]
    place = {i: n for n, i in enumerate(values)} | {i: n for n, i in enumerate(downs)}
    return [
        _type(model, name, shape, place.get(i, 0), len(values))
        for i, (name, shape) in enumerate(tensors)
    ]


@dataclass(frozen=True)
class _Model:
    file_type: str
    architecture: str
    layers: int
    queries_per_key: int
    experts: int
    tied: bool
    has_imatrix: bool

    @property
    def is_70b(self) -> bool:
        """llama.cpp takes any model of this form for one of 70 billion parameters."""
        if self.layers != 80:
            return False
        grouped = self.architecture == "llama" and self.queries_per_key != 1
        return grouped or self.architecture == "qwen2"


def _type(model: _Model, name: str, shape: tuple[int, ...], place: int, values: int) -> Type:
    """Of one tensor, which is the `place`-th of its kind."""
    rows = 1
    for length in shape[:-1]:
        rows *= length
    if rows == 1 or not name.endswith("weight") or _KEPT.search(name):
        return Type.F32
    base = FILE_TYPES[model.file_type].type
    if base in _PLAIN:
        return base
    return _that_divides(_mixed(model, base, name, shape[-1], place, values), shape[-1])


def _mixed(model: _Model, base: Type, name: str, width: int, place: int, values: int) -> Type:
    if name == "output.weight" or (model.tied and name in _EMBEDDINGS):
        whole = width % GGML_QUANT_SIZES[base][0] == 0
        return Type.Q6_K if whole and base != Type.Q8_0 else Type.Q8_0
    if re.search(r"attn_(v|qkv)\.weight$", name):
        return _of_values(model, base, place, values)
    if "attn_k.weight" in name:
        return Type.Q8_0 if model.experts == 8 else base
    if "attn_output.weight" in name:
        return _of_attention_output(model, base)
    if "ffn_down" in name:
        # Experts of one layer may be several tensors: they count by their layer.
        return _of_down(model, base, _layer(name) if model.experts > 1 else place)
    return base


def _more_bits(place: int, count: int) -> bool:
    """The first and last eighth, and every third in between."""
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2


def _of_values(model: _Model, base: Type, place: int, count: int) -> Type:
    if model.experts == 8:  # Small beside the experts.
        return Type.Q8_0
    kind = base
    if model.file_type == "q2_k":
        kind = Type.Q4_K if model.queries_per_key >= 4 else Type.Q3_K
    elif model.file_type == "q3_k_m":
        kind = Type.Q5_K if place < 2 else Type.Q4_K
    elif model.file_type in ("q4_k_m", "q5_k_m") and _more_bits(place, count):
        kind = Type.Q6_K
    elif model.file_type == "q4_k_s" and place < 4:
        kind = Type.Q5_K
    if model.is_70b and kind in (Type.Q3_K, Type.Q4_K):
        kind = Type.Q5_K
    return kind


def _of_attention_output(model: _Model, base: Type) -> Type:
    if model.experts == 8:
        return Type.Q5_K if base in (Type.Q2_K, Type.Q3_K, Type.Q4_K) else base
    return {"q2_k": Type.Q3_K, "q3_k_m": Type.Q4_K}.get(model.file_type, base)


def _of_down(model: _Model, base: Type, layer: int) -> Type:
    early = layer < model.layers // 8
    match model.file_type:
        case "q2_k":
            return Type.Q3_K
        case "q3_k_m":
            return Type.Q5_K if layer < model.layers // 16 else Type.Q4_K
        case "q4_k_m" | "q5_k_m" if _more_bits(layer, model.layers):
            return Type.Q6_K
        case "q4_k_s" if early:
            return Type.Q5_K
        case "q4_0" if early and model.has_imatrix:
            return Type.Q4_1
        case "q5_0" if early and model.has_imatrix:
            return Type.Q5_1
    return base


def _that_divides(kind: Type, width: int) -> Type:
    """The type, or one with smaller blocks where the rows do not divide into its blocks.

    llama.cpp refuses the types of blocks of 32 where float16 is written here.
    """
    for choice in (kind, _FALLBACK.get(kind, Type.F16)):
        if width % GGML_QUANT_SIZES[choice][0] == 0:
            return choice
    return Type.F16


def _layer(name: str) -> int:
    """The number of a tensor's layer; -1 outside of them."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
