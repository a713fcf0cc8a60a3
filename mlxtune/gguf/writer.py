"""Write a model as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType, LlamaFileType

from mlxtune.errors import ExportError
from mlxtune.gguf.architectures import (
    Architecture,
    Config,
    for_config,
    interleave_rows,
    metadata,
    rotary_heads,
    to_gguf_name,
)

# File types by their recipe names: the type of its matrices, and llama.cpp's number.
FILE_TYPES: dict[str, tuple[Type, LlamaFileType]] = {
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor to be written.

    Attributes:
        name: as HF calls it.
        shape: (out, in) for a projection.
        load: gives its values as float32, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], npt.NDArray[np.float32]]


def write_gguf(
    path: Path,
    *,
    config: Config,
    tensors: Iterable[SourceTensor],
    tokenizer: dict[str, Any],
    file_type: str,
    name: str,
    general: dict[str, str] | None = None,
) -> None:
    """Write a whole model; tensors are loaded and converted one at a time.

    Args:
        path: the file.
        config: of the model, as in config.json.
        tensors: every parameter.
        tokenizer: metadata from `tokenizer_metadata`.
        file_type: a key of `FILE_TYPES`. Vectors stay float32.
        name: `general.name`.
        general: more `general.*` texts, such as `license`.

    Raises:
        ExportError: the architecture or a tensor is not known.
    """
    entry = for_config(config)
    matrix_type, number = FILE_TYPES[file_type]
    sources = list(tensors)
    names = [_gguf_name(source.name) for source in sources]
    writer = gguf.GGUFWriter(path, entry.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        for key, text in (general or {}).items():
            writer.add_string(f"general.{key}", text)
        writer.add_file_type(number)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata(entry, config).items():
            _add(writer, key, value)
        for key, value in tokenizer.items():
            _add(writer, key, value)
        types = [_type_of(source, matrix_type) for source in sources]
        for source, gguf_name, type_ in zip(sources, names, types, strict=True):
            _announce(writer, gguf_name, source.shape, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source, type_ in zip(sources, types, strict=True):
            values = _ordered(source, entry, config)
            writer.write_tensor_data(gguf.quants.quantize(values, type_))
    finally:
        writer.close()


def _gguf_name(hf_name: str) -> str:
    name = to_gguf_name(hf_name)
    if name is None:
        raise ExportError(
            f"the tensor {hf_name} has no place in a GGUF of this architecture",
            remedy="`mlxtune fuse` writes any model as safetensors",
        )
    return name


def _type_of(source: SourceTensor, wanted: Type) -> Type:
    """Vectors stay float32, and rows that do not divide into blocks float16."""
    if len(source.shape) == 1:
        return Type.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if source.shape[-1] % block == 0 else Type.F16


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], type_: Type) -> None:
    block, size = gguf.GGML_QUANT_SIZES[type_]
    count = int(np.prod(shape))
    dtypes = {Type.F32: np.float32, Type.F16: np.float16}
    if type_ in dtypes:
        writer.add_tensor_info(name, shape, np.dtype(dtypes[type_]), count * size)
    else:
        # The package wants the shape in bytes for packed types.
        packed = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(
            name, packed, np.dtype(np.uint8), count // block * size, raw_dtype=type_
        )


def _ordered(source: SourceTensor, entry: Architecture, config: Config) -> npt.NDArray[np.float32]:
    values = source.load()
    heads = rotary_heads(entry, source.name, config)
    return np.ascontiguousarray(interleave_rows(values, heads) if heads else values)


_KINDS: tuple[tuple[type, GGUFValueType], ...] = (
    (bool, GGUFValueType.BOOL),
    (int, GGUFValueType.UINT32),
    (float, GGUFValueType.FLOAT32),
    (str, GGUFValueType.STRING),
)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
        return
    for kind, type_ in _KINDS:
        if isinstance(value, kind):
            writer.add_key_value(key, value, type_)
            return
    raise TypeError(f"{key}: {type(value).__name__} has no GGUF type")
