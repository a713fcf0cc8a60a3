"""Write a model as a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType

from mlxtune.errors import ExportError
from mlxtune.gguf.architectures import (
    Architecture,
    Config,
    for_config,
)
from mlxtune.gguf.heads import reordering
from mlxtune.gguf.metadata import metadata, mistral_window
from mlxtune.gguf.mixing import FILE_TYPES, tensor_types
from mlxtune.gguf.quantize import needs_search, quantize, quantizers
from mlxtune.gguf.rope import rope_metadata, rope_tensors
from mlxtune.gguf.tensors import SourceTensor, to_float16
from mlxtune.processes import Processes

# Of a tensor in a file's header, beside its name: lengths, four dimensions, type, place; and
# what its data is filled up by.
_TENSOR_INFO = 8 + 4 + 4 * 8 + 4 + 8 + 32
Importance = Mapping[str, npt.NDArray[np.float32]]


class Writer(gguf.GGUFWriter):  # type: ignore[misc]  # the package has no types
    """The package's writer, that packs an array at once.

    The package packs one value after another, two seconds for a vocabulary of 262,144. The
    bytes are the same. And it says so if the disk is full.
    """

    def write_tensor_data(self, tensor: npt.NDArray[Any], *given: Any) -> None:
        """As the package's.

        Raises:
            OSError: with its number, which NumPy leaves out.
        """
        try:
            super().write_tensor_data(tensor, *given)
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    def packed_size(self) -> int:
        """Bytes of the metadata that was added."""
        values = (
            self._pack_val(v.value, v.type, True, v.sub_type) for v in self.kv_data[0].values()
        )
        return sum(map(len, values)) + sum(8 + len(key.encode()) for key in self.kv_data[0])

    def _pack_val(
        self,
        val: Any,
        vtype: GGUFValueType,
        add_vtype: bool,
        sub_type: GGUFValueType | None = None,
    ) -> bytes:
        body = _array_bytes(val) if sub_type is None and isinstance(val, list) else None
        if body is None:
            packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return packed
        head = struct.pack("<I", vtype) if add_vtype else b""
        return head + struct.pack("<IQ", GGUFValueType.get_type(val[0]), len(val)) + body


def _array_bytes(values: list[Any]) -> bytes | None:
    """Values of one kind as they are stored; None where the package has to see to them."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return np.array(values, "<i4").tobytes()
    if kinds == {float}:
        return np.array(values, "<f4").tobytes()
    if kinds != {str}:
        return None
    length, texts = struct.Struct("<Q").pack, [value.encode("utf-8") for value in values]
    return b"".join(part for text in texts for part in (length(len(text)), text))


@dataclass(frozen=True)
class Written:
    """What a file consists of.

    Attributes:
        types: GGUF tensor name to its type.
        files: the file, or its parts in order.
        unweighed: those that the importance, if there is one, says nothing of though their
            type weighs errors; embeddings and heads aside, which it never has.
    """

    types: dict[str, Type]
    files: tuple[Path, ...]
    unweighed: tuple[str, ...] = ()


def write_gguf(
    path: Path,
    *,
    config: Config,
    tensors: Iterable[SourceTensor],
    tokenizer: dict[str, Any],
    file_type: str,
    name: str,
    importance: Importance | None = None,
    split_max_bytes: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write a whole model.

    Args:
        path: the file.
        config: of the model, as in config.json.
        tensors: every parameter.
        tokenizer: metadata from `tokenizer_metadata`.
        file_type: a key of `FILE_TYPES`.
        name: `general.name`.
        importance: GGUF tensor name to the mean square of each input feature, (in,), or
            for experts (experts, in) or the same as (experts · in,): errors weigh by it.
        split_max_bytes: begin a new file, `NAME-00001-of-…`, beyond that; 0 for never.
        progress: is told each tensor's name and number when its turn comes.

    Raises:
        ExportError: the architecture or a tensor is not known, or holds no finite numbers;
            or no name of the importance is one of the model's.
    """
    entry = for_config(config)
    facts = metadata(entry, config) | rope_metadata(entry, config) | tokenizer
    facts |= mistral_window(entry, config, name)
    sources = [*_rope_sources(entry, config), *tensors]
    names = [_gguf_name(entry, source.name) for source in sources]
    if importance and not importance.keys() & set(names):
        raise ExportError(
            f"the importance matrix is of another model: none of its {len(importance)} names, "
            f"such as {next(iter(importance))}, is one of this model's",
            remedy="make it with the model that is converted, or let --calibrate find it",
        )
    shapes = [_gguf_shape(entry, source) for source in sources]
    types = tensor_types(
        file_type,
        list(zip(names, shapes, strict=True)),
        architecture=entry.name,
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        experts=int(facts.get(f"{entry.name}.expert_count", 0)),
        tied="output.weight" not in names,
        has_imatrix=bool(importance),
    )
    writer = Writer(path, entry.name, split_max_size=split_max_bytes)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[file_type].number)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in facts.items():
            _add(writer, key, value)
        if split_max_bytes:
            # The package counts tensors alone. What else a file holds is taken from all of
            # them, though the vocabulary is in the first; where it fills half of a file, that
            # one is larger.
            head = writer.packed_size() + sum(len(n) + _TENSOR_INFO for n in names)
            writer.split_max_size -= head if head < split_max_bytes // 2 else 0
        for gguf_name, shape, type_ in zip(names, shapes, types, strict=True):
            _announce(writer, gguf_name, shape, type_)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        todo = list(zip(sources, names, types, strict=True))
        _write_data(writer, todo, entry, config, importance or {}, progress)
    finally:
        writer.close()
    files = tuple(writer.format_shard_names(path)) if split_max_bytes else (path,)
    written = dict(zip(names, types, strict=True))
    return Written(written, files, _unweighed(written, importance) if importance else ())


_WEIGH_NOTHING = (Type.F32, Type.F16, Type.BF16, Type.Q8_0)
_ENDS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


def _unweighed(types: dict[str, Type], importance: Importance) -> tuple[str, ...]:
    rounded = (name for name, type_ in types.items() if type_ not in _WEIGH_NOTHING)
    return tuple(name for name in rounded if name not in importance and name not in _ENDS)


def _write_data(
    writer: gguf.GGUFWriter,
    todo: Sequence[tuple[SourceTensor, str, Type]],
    entry: Architecture,
    config: Config,
    importance: Importance,
    progress: Callable[[str], None],
) -> None:
    """Write tensor after tensor: each with its name and type."""
    searched = sum(
        math.prod(source.shape)
        for source, name, type_ in todo
        if needs_search(type_, name in importance)
    )
    with quantizers(searched) as others:
        for number, (source, name, type_) in enumerate(todo, 1):
            progress(f"writing {name} ({number} of {len(todo)})")
            values = _values(source, entry, config)
            try:
                data = encode(values, type_, importance.get(name), others)
            except ExportError as error:
                raise ExportError(f"tensor {name}: {error.what}", remedy=error.remedy) from None
            writer.write_tensor_data(data)
            del values, data  # they would be in memory beside the next


def _values(source: SourceTensor, entry: Architecture, config: Config) -> npt.NDArray[np.float32]:
    values = source.load()
    if heads := reordering(entry, source.name, config):
        values = heads.to_gguf(values)
    if change := entry.change(source.name):
        values = change.to_gguf(values)
    return values


def encode(
    values: npt.NDArray[np.float32],
    type_: Type,
    importance: npt.NDArray[np.float32] | None = None,
    others: Processes | None = None,
) -> npt.NDArray[Any]:
    """Values (…, in) in a GGML type: floats of the same shape, or bytes (…, of a row).

    Args:
        values: float32.
        type_: of the result.
        importance: (in,); for values of (experts, out, in) also (experts, in), or the same
            as (experts · in,).
        others: processes to search for scales with.

    Raises:
        ExportError: a value is not finite, or the importance is of another shape.
    """
    if type_ == Type.F32:
        return values
    if type_ == Type.F16:
        return to_float16(values)
    if type_ == Type.BF16:
        packed: npt.NDArray[np.uint8] = gguf.quants.quantize(values, type_)
        return packed
    if importance is not None and importance.size != values.shape[-1]:
        if values.ndim != 3 or importance.size != len(values) * values.shape[-1]:
            raise ExportError(
                f"the importance matrix has {importance.size} values for it, of "
                f"{values.shape[-1]} columns",
                remedy="make it with the model that is converted",
            )
        each = zip(values, importance.reshape(len(values), -1), strict=True)
        return np.stack(
            [quantize(expert, type_, weights, others=others) for expert, weights in each]
        )
    if importance is not None:
        importance = importance.reshape(-1)
    rows = quantize(values.reshape(-1, values.shape[-1]), type_, importance, others=others)
    return rows.reshape(*values.shape[:-1], -1)


def _rope_sources(entry: Architecture, config: Config) -> list[SourceTensor]:
    def source(name: str, values: npt.NDArray[np.float32]) -> SourceTensor:
        return SourceTensor(name, values.shape, lambda: values)

    return [source(name, values) for name, values in rope_tensors(entry, config).items()]


def _gguf_name(entry: Architecture, hf_name: str) -> str:
    if hf_name.startswith("rope_"):
        return hf_name
    name = entry.to_gguf_name(hf_name)
    if name is None:
        raise ExportError(
            f"the tensor {hf_name} has no place in a GGUF of this architecture",
            remedy="`mlxtune fuse` writes any model as safetensors",
        )
    return name


def _gguf_shape(entry: Architecture, source: SourceTensor) -> tuple[int, ...]:
    change = entry.change(source.name)
    return source.shape[: len(source.shape) - change.axes] if change else source.shape


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
