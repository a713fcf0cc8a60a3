"""A tuned model as a folder for Ollama's MLX engine and for mlx-lm: one way of quantizing.

The engine takes one way of quantizing for a whole folder. Weights that are quantized in that way
already stay as they are, to the bit; those that an adapter has changed are quantized once. All
else is written in floats.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.export.engine_tokens import EngineTokenizer, misread
from mlxtune.export.gotemplate import added_bos
from mlxtune.export.mlx_engine import KEEP, TYPES, begins_itself, takes
from mlxtune.export.verify import CHATS, SAMPLE
from mlxtune.files import write_json
from mlxtune.fuse import dense_config, write_configs
from mlxtune.gguf import pretokenizers
from mlxtune.gguf.fingerprints import TEXT
from mlxtune.gguf.templates import applied
from mlxtune.layers.adapter import Adapter
from mlxtune.layers.dense import DenseTensor, dense_tensors
from mlxtune.layers.packing import Arrays, Packing
from mlxtune.layers.quantized import PackedLayer
from mlxtune.models.fields import with_all_fields
from mlxtune.models.folder import CODES, to_dtype
from mlxtune.models.load import LoadedModel
from mlxtune.models.safetensors import Array, Piece, write_safetensors
from mlxtune.models.tokenizer_files import save_tokenizer

_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8"}
_DTYPES |= {mx.uint32: "U32"}


@dataclass(frozen=True)
class Quantized:
    """What became of a model's matrices.

    Attributes:
        packing: how they are quantized; None where none is.
        kept: how many are the base's own, to the bit.
        rounded: how many have been quantized now.
        floats: how many are in floats.
        misread: a text that the engine tokenizes otherwise; None where none was found.
    """

    packing: str | None
    kept: int
    rounded: int
    floats: int
    misread: str | None = None


@dataclass(frozen=True)
class _Matrix:
    """A tensor of the folder, and how it is written: floats, codes that are there, new codes."""

    tensor: DenseTensor
    layer: PackedLayer | None
    touched: bool


def write_mlx_folder(
    folder: Path,
    model: LoadedModel,
    kind: str,
    texts: Sequence[str] = (),
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Write a model, its adapter fused.

    Args:
        folder: exists.
        model: with or without adapter.
        kind: of `TYPES`; `keep` for the way in which most of its matrices are quantized; or a
            float type, `float32`, `float16` or `bfloat16`.
        texts: that the engine has to tokenize as they were trained.
        progress: called with what is being written.

    Raises:
        NotForEngine: the engine does not read its tokenizer, or tokenizes the texts otherwise.
        StorageError: the disk refuses the write.
    """
    dtype = kind if kind in CODES else _half(model.stored_dtype)
    matrices = list(_matrices(model.model))
    packing = _most(matrices) if kind == KEEP else TYPES.get(kind)
    config = dense_config(with_all_fields(model.config, model.source.path), dtype)
    if packing is not None:
        said = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
        config |= {"quantization": said, "quantization_config": said}
    misread = write_tokenizer(folder, model.tokenizer, config, model.source.path, texts)
    left = set() if kind == KEEP else _left_in_floats(model.model)
    how = [_how(each, packing, kind, left) for each in matrices]
    pieces = (_piece(each, what, packing, dtype) for each, what in zip(matrices, how, strict=True))
    write_safetensors(folder, pieces, progress=progress)
    counts = Counter(what for each, what in zip(matrices, how, strict=True) if _is_matrix(each))
    return Quantized(
        None if packing is None else str(packing),
        counts["kept"],
        counts["rounded"],
        counts["floats"],
        misread,
    )


def write_tokenizer(
    folder: Path, tokenizer: Any, config: dict[str, Any], source: Path, texts: Sequence[str]
) -> str | None:
    """Write a tokenizer and the configs so that the engine reads them as transformers does.

    The engine reads JSON files alone, so the chat template stands in tokenizer_config.json. Where
    it cuts text otherwise by the pre-tokenizer as it is, that is written as we know it.

    Args:
        folder: exists.
        tokenizer: mlx-lm's wrapper.
        config: for config.json.
        source: the folder or file that the model was read from.
        texts: that the engine has to tokenize as they were trained.

    Returns:
        Another text, of what people write, that it tokenizes otherwise; None if none was found.

    Raises:
        NotForEngine: it does not read such a tokenizer, or tokenizes the texts otherwise.
    """
    save_tokenizer(folder, tokenizer, template_apart=False)
    write_configs(folder, config, tokenizer, source)
    fast = tokenizer._tokenizer
    begins = bool(added_bos(fast))
    place = folder / "tokenizer_config.json"
    said = json.loads(place.read_text(encoding="utf-8"))
    # Newer files say it in the post-processor, which the engine does not read.
    write_json(place, said | {"add_bos_token": begins and not begins_itself(config)})
    needed, others = [*_chats(fast), *texts], [*SAMPLE, TEXT]
    if misread(EngineTokenizer(folder), fast, [*needed, *others]) is not None:
        if name := pretokenizers.recognise(fast.backend_tokenizer):
            _rewrite_pre_tokenizer(folder / "tokenizer.json", name)
        if (text := misread(EngineTokenizer(folder), fast, needed)) is not None:
            raise EngineTokenizer.refused(
                folder, f"of {text[:40]!r} it makes other tokens than were trained"
            )
    return misread(EngineTokenizer(folder), fast, others)


def _chats(tokenizer: Any) -> Iterator[str]:
    for chat in CHATS:
        try:
            yield str(applied(tokenizer, **chat))
        except Exception:  # a template may refuse any conversation, in any way
            continue


def _rewrite_pre_tokenizer(path: Path, name: str) -> None:
    said = json.loads(path.read_text(encoding="utf-8"))
    said["pre_tokenizer"] = pretokenizers.as_json(name)
    write_json(path, said)


def _half(dtype: str) -> str:
    """The engine computes in the type of the weights: float32 would take twice the memory."""
    return "bfloat16" if dtype == "float32" else dtype


def _matrices(model: nn.Module) -> Iterator[_Matrix]:
    layers = dict(model.named_modules())
    for tensor in dense_tensors(model):
        path, _, name = tensor.name.rpartition(".")
        layer = layers.get(path)
        touched = isinstance(layer, Adapter)
        base = layer.linear if isinstance(layer, Adapter) else layer
        packed = base if isinstance(base, PackedLayer) and name == "weight" else None
        yield _Matrix(tensor, packed, touched and name == "weight")


def _most(matrices: list[_Matrix]) -> Packing | None:
    """The way in which most weights are quantized, of those that the engine takes."""
    sizes: Counter[Packing] = Counter()
    for each in matrices:
        if each.layer is not None and takes(each.layer.packing):
            sizes[each.layer.packing] += prod(each.tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else None


def _is_matrix(each: _Matrix) -> bool:
    return len(each.tensor.shape) > 1 and each.tensor.name.endswith(".weight")


def _left_in_floats(model: nn.Module) -> set[str]:
    """Layers that mlx-lm does not quantize as it does all others, such as routers of experts."""
    predicate = getattr(model, "quant_predicate", None)
    if predicate is None:
        return set()
    return {path for path, layer in model.named_modules() if predicate(path, layer) is not True}


def _how(each: _Matrix, packing: Packing | None, kind: str, left: Container[str]) -> str:
    """`kept`, `rounded` or `floats`; `left` are layers that are to be in floats."""
    if packing is None or not _is_matrix(each):
        return "floats"
    same = each.layer is not None and each.layer.packing == packing
    if same and not each.touched:
        return "kept"
    if each.tensor.shape[-1] % packing.group_size:
        return "floats"
    if kind == KEEP:
        return "rounded" if same else "floats"
    return "floats" if each.tensor.name.removesuffix(".weight") in left else "rounded"


def _piece(each: _Matrix, how: str, packing: Packing | None, dtype: str) -> Piece:
    tensor = each.tensor
    if how == "floats" or packing is None:

        def load() -> list[Array]:
            return [to_dtype(tensor.source().load(), dtype)]

        return Piece(((tensor.name, CODES[dtype], tensor.shape),), load)
    module = tensor.name.removesuffix(".weight")
    there = None if each.layer is None else _narrowed(each.layer.arrays, dtype)
    if how == "kept":
        assert there is not None
        arrays, given = there, partial(lambda kept: kept, there)
    else:
        same = there is not None and each.layer is not None and each.layer.packing == packing
        floats = there["scales"].dtype if there is not None and same else getattr(mx, dtype)
        arrays = _shapes(tensor.shape, packing, floats)
        given = partial(_rounded, tensor, packing, floats)
    entries = tuple(
        (f"{module}.{name}", _DTYPES[array.dtype], tuple(array.shape))
        for name, array in arrays.items()
    )
    return Piece(entries, lambda: [_numpy(array) for array in given().values()])


def _narrowed(arrays: Arrays, dtype: str) -> Arrays:
    """Arrays with scales in this type, where it holds them exactly: a CPU computes in float32."""
    wanted = getattr(mx, dtype)
    floats = {n: a for n, a in arrays.items() if a.dtype == mx.float32}
    narrow = {n: a.astype(wanted) for n, a in floats.items()}
    exact = all(bool((narrow[n].astype(mx.float32) == floats[n]).all()) for n in floats)
    return {n: narrow.get(n, a) if exact else a for n, a in arrays.items()}


def _rounded(tensor: DenseTensor, packing: Packing, floats: mx.Dtype) -> Arrays:
    values = tensor.load().astype(mx.float32 if floats == mx.uint8 else floats)
    return packing.pack(values)


def _shapes(shape: tuple[int, ...], packing: Packing, floats: mx.Dtype) -> Arrays:
    """What quantizing gives, of the right shapes and types, without doing it."""
    *rows, width = shape
    groups = (*rows, width // packing.group_size)
    affine = packing.mode == "affine"
    scales = mx.zeros((), floats if affine else mx.uint8)
    made = {
        "weight": mx.broadcast_to(mx.zeros((), mx.uint32), (*rows, width * packing.bits // 32)),
        "scales": mx.broadcast_to(scales, groups),
    }
    return made | ({"biases": mx.broadcast_to(scales, groups)} if affine else {})


def _numpy(array: mx.array) -> Array:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
