"""A model's folder as a stream of tensors, one in memory at a time, and written as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxtune.errors import ModelError
from mlxtune.gguf.tensors import SourceTensor, to_float16
from mlxtune.models.published import as_in_mlx_lm, mxfp4_experts
from mlxtune.models.quantization import KINDS, mlx_arrays, packing_of
from mlxtune.models.safetensors import (
    Array,
    Piece,
    StoredTensor,
    from_bfloat16,
    to_bfloat16,
)
from mlxtune.models.weights import stored_tensors

Values = npt.NDArray[np.float32]
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# transformers keeps every expert's matrices apart, mlx-lm all in one; it takes them apart
# too for these families.
_EXPERT = re.compile(r"^(.*\.mlp)\.experts\.(\d+)\.(\w+_proj)\.(\w+)$")
_EXPERTS_APART = ("qwen2_moe", "qwen3_moe", "olmoe")
_STACKED = re.compile(r"^(.*\.mlp)\.switch_mlp\.(\w+_proj)\.weight$")


def folder_tensors(path: Path, config: dict[str, Any]) -> Iterator[SourceTensor]:
    """Every parameter of a folder of Hugging Face's or MLX's layout, packed ones expanded.

    Args:
        path: the folder.
        config: its config.json.

    Raises:
        ModelError: a file is missing, damaged, or of a packing that is not known.
    """
    stored = stored_tensors(path)
    yield from as_in_mlx_lm(_stacked(path, _expanded(stored, config)), config)


def _expanded(stored: dict[str, StoredTensor], config: dict[str, Any]) -> Iterator[SourceTensor]:
    """Floats of all that is stored."""
    for name, tensor in stored.items():
        if _left_out(name, stored, config):
            continue
        if name.endswith(".qweight"):
            yield _awq_or_gptq(name.removesuffix(".qweight"), stored, config)
        elif tensor.dtype == "U32":
            yield _packed(tensor, stored, config)
        elif scales := stored.get(_scales_of_blocks(name)):
            yield mxfp4_experts(tensor, scales)
        else:
            yield SourceTensor(name, tensor.shape, tensor.float32)


def _stacked(path: Path, tensors: Iterable[SourceTensor]) -> Iterator[SourceTensor]:
    """Experts of a block together, behind all else."""
    experts: dict[str, dict[int, SourceTensor]] = {}
    for tensor in tensors:
        if expert := _EXPERT.match(tensor.name):
            block, number, projection, kind = expert.groups()
            stacked = f"{block}.switch_mlp.{projection}.{kind}"
            experts.setdefault(stacked, {})[int(number)] = tensor
        else:
            yield tensor
    for name, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise ModelError(f"of {name} some experts are missing", where=str(path))
        ordered = [parts[number] for number in range(len(parts))]
        yield SourceTensor(name, (len(parts), *ordered[0].shape), _stack(ordered))


def _left_out(name: str, stored: dict[str, StoredTensor], config: dict[str, Any]) -> bool:
    """Tensors that other tensors imply: a tied head, frequencies, scales of packed ones."""
    module, _, kind = name.rpartition(".")
    if kind in ("scales", "biases"):
        return f"{module}.weight" in stored or f"{module}.qweight" in stored
    if kind in ("qzeros", "g_idx"):
        return f"{module}.qweight" in stored
    if name.endswith("_scales"):
        return f"{name.removesuffix('_scales')}_blocks" in stored
    tied = config.get("tie_word_embeddings", False)
    return kind == "inv_freq" or (tied and module.endswith("lm_head"))


def _scales_of_blocks(name: str) -> str:
    return f"{name.removesuffix('_blocks')}_scales" if name.endswith("_blocks") else ""


def _stack(parts: list[SourceTensor]) -> Callable[[], Values]:
    def load() -> Values:
        stacked = np.empty((len(parts), *parts[0].shape), np.float32)
        for number, part in enumerate(parts):
            stacked[number] = part.load()
        return stacked

    return load


def _packed(
    tensor: StoredTensor, stored: dict[str, StoredTensor], config: dict[str, Any]
) -> SourceTensor:
    """A weight that MLX packed, expanded when it is loaded."""
    module = tensor.name.removesuffix(".weight")
    said = config.get("quantization") or config.get("quantization_config") or {}
    own = said.get(module)
    how = own if isinstance(own, dict) else said
    bits, group_size = how.get("bits"), how.get("group_size")
    scales = stored.get(f"{module}.scales")
    if scales is None or not bits:
        raise ModelError(
            f"the tensor {tensor.name} is packed in a way that its config.json does not tell",
            where=str(tensor.file),
        )
    width = tensor.shape[-1] * 32 // bits

    def load() -> Values:
        biases = stored.get(f"{module}.biases")
        return _floats(
            _mx(tensor),
            _mx(scales),
            None if biases is None else _mx(biases),
            group_size=group_size,
            bits=bits,
            mode=how.get("mode", "affine"),
        )

    return SourceTensor(tensor.name, (*tensor.shape[:-1], width), load)


def _awq_or_gptq(
    module: str, stored: dict[str, StoredTensor], config: dict[str, Any]
) -> SourceTensor:
    """The weight of a layer that AWQ or GPTQ packed, expanded when it is loaded."""
    found = {kind: stored.get(f"{module}.{kind}") for kind in KINDS}
    packing = packing_of(module, {k: t.shape for k, t in found.items() if t}, config)

    def load() -> Values:
        given = {kind: _mx(tensor) for kind, tensor in found.items() if tensor}
        packed = mlx_arrays(module, given, config)
        return _floats(*packed, group_size=packing.group_size, bits=packing.bits)

    return SourceTensor(f"{module}.weight", packing.shape, load)


def _floats(codes: mx.array, scales: mx.array, biases: mx.array | None, **how: Any) -> Values:
    full = mx.dequantize(codes, scales, biases, **how)
    values = np.array(full.astype(mx.float32))
    del full
    mx.clear_cache()
    return values


def _mx(tensor: StoredTensor) -> mx.array:
    """As MLX's array; scales in float32, so that nothing is rounded on the way."""
    values = tensor.read()
    if tensor.dtype == "BF16":
        return mx.array(from_bfloat16(values))
    return mx.array(values.astype(np.float32) if tensor.dtype == "F16" else values)


def dense_pieces(
    tensors: Iterable[SourceTensor], dtype: str, config: dict[str, Any]
) -> Iterator[Piece]:
    """Tensors as transformers and mlx-lm both read them: floats, every expert by itself.

    Args:
        tensors: of a model.
        dtype: `float32`, `float16` or `bfloat16`.
        config: its config.json; experts of families that are not known to mlx-lm in
            transformers' form stay stacked.
    """
    apart = config.get("model_type") in _EXPERTS_APART
    for tensor in tensors:
        if apart and (stacked := _STACKED.match(tensor.name)):
            block, projection = stacked.groups()
            names = [f"{block}.experts.{n}.{projection}.weight" for n in range(tensor.shape[0])]
            entries = tuple((name, CODES[dtype], tensor.shape[1:]) for name in names)
        else:
            entries = ((tensor.name, CODES[dtype], tensor.shape),)
        yield Piece(entries, _converted(tensor, dtype))


def _converted(tensor: SourceTensor, dtype: str) -> Callable[[], list[Array]]:
    return lambda: [to_dtype(tensor.load(), dtype)]


def to_dtype(values: Values, dtype: str) -> Array:
    """Values in a float type; bfloat16 as uint16."""
    if dtype == "bfloat16":
        return to_bfloat16(values)
    return to_float16(values) if dtype == "float16" else values.astype(np.float32, copy=False)


def packed_pieces(
    tensors: Iterable[SourceTensor], *, bits: int, group_size: int, dtype: str
) -> Iterator[Piece]:
    """Tensors with all matrices packed affinely by MLX, named as mlx-lm loads them.

    Args:
        tensors: of a model.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128.
        dtype: of scales, biases and what is not packed.
    """
    for tensor in tensors:
        if not packable(tensor, group_size):
            yield Piece(((tensor.name, CODES[dtype], tensor.shape),), _converted(tensor, dtype))
            continue
        module = tensor.name.removesuffix(".weight")
        *rows, width = tensor.shape
        groups = (*rows, width // group_size)
        yield Piece(
            (
                (f"{module}.weight", "U32", (*rows, width * bits // 32)),
                (f"{module}.scales", CODES[dtype], groups),
                (f"{module}.biases", CODES[dtype], groups),
            ),
            _quantized(tensor, bits, group_size, dtype),
        )


def packable(tensor: SourceTensor, group_size: int) -> bool:
    """Whether mlx-lm packs this parameter: the weight of a projection or an embedding."""
    return (
        len(tensor.shape) > 1
        and tensor.name.endswith(".weight")
        and tensor.shape[-1] % group_size == 0
    )


def _quantized(
    tensor: SourceTensor, bits: int, group_size: int, dtype: str
) -> Callable[[], list[Array]]:
    def load() -> list[Array]:
        values = mx.array(tensor.load()).astype(getattr(mx, dtype))
        codes, scales, biases = mx.quantize(values, group_size=group_size, bits=bits)
        given = [
            np.array(a.view(mx.uint16) if dtype == "bfloat16" else a) for a in (scales, biases)
        ]
        arrays = [np.array(codes), *given]
        del values, codes, scales, biases
        mx.clear_cache()
        return arrays

    return load
