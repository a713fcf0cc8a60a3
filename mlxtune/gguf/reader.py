"""Read a GGUF file: metadata at once, tensors as views of the mapped file.

Every count and offset is checked against the file's size before anything is allocated,
so a truncated or damaged file is a clear error and never a crash. What llama.cpp refuses
(gguf.cpp of https://github.com/ggml-org/llama.cpp) is refused here.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlxtune.errors import ModelError
from mlxtune.files import LFS_POINTER, LFS_REMEDY, is_lfs_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

# Value types of the format that have a fixed size; 8 is a string and 9 an array.
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
# Texts become Python's, several times their size in the file. The largest vocabularies
# have some 262,144 tokens.
_MAX_ARRAY = 2**22

# How llama.cpp's gguf-split names the parts of a model, and what each says of itself.
_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_PARTS, _PART, _ALL_TENSORS = "split.count", "split.no", "split.tensors.count"


class Numbers(Sequence[Any]):
    """Numbers of the metadata, each Python's when it is asked for.

    As a list they would be up to forty times their size in the file.

    Args:
        values: (count,).
    """

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        """One number, or a list of some."""
        return self._values[index].tolist()

    def __iter__(self) -> Iterator[Any]:
        return (
            value for start in range(0, len(self), 1024) for value in self[start : start + 1024]
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Numbers | list) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self) if len(self) < 9 else [*self[:8], "…"])


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file.

    `shape` is in NumPy's order, slowest axis first: (out, in) for a projection. `part`
    counts the files of a split model from 0.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int
    part: int = 0


class GGUFFile:
    """A GGUF file, mapped into memory; or a split one, all of its parts.

    Args:
        path: the file, or any part `NAME-00001-of-00003.gguf`; the others lie beside it.

    Attributes:
        path: the file, or the first part.
        paths: all of its parts.
        metadata: key to value; arrays are lists of texts, or `Numbers`. Of the first part.
        tensors: name to `TensorInfo`.

    Raises:
        ModelError: the file or a part is missing, not GGUF, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        opened = _Part(path)
        count = opened.metadata.get(_PARTS, 1)
        if type(count) is not int or count < 1:
            raise damaged(path, f"{_PARTS} is {count!r}")
        self._parts = [opened] if count == 1 else _all_parts(opened, count)
        self.paths = tuple(part.path for part in self._parts)
        self.path = self.paths[0]
        self.metadata = self._parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for number, part in enumerate(self._parts):
            for info in part.tensors:
                if info.name in self.tensors:
                    raise damaged(part.path, f"tensor {info.name} is there twice")
                self.tensors[info.name] = replace(info, part=number)
        wanted = self.metadata.get(_ALL_TENSORS, len(self.tensors)) if count > 1 else None
        if wanted not in (None, len(self.tensors)):
            raise damaged(self.path, f"its parts have {len(self.tensors)} tensors, not {wanted}")

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """A view of a tensor: its own shape for plain types, (…, bytes) for packed ones.

        BF16 is given as uint16.
        """
        info = self.tensors[name]
        mapped = self._parts[info.part].mapped
        return _shaped(info, np.frombuffer(mapped, np.uint8, info.nbytes, info.start))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """As `data`, in memory of its own: what is mapped counts as the process's memory."""
        info = self.tensors[name]
        path = self._parts[info.part].path
        return _shaped(info, np.fromfile(path, np.uint8, info.nbytes, offset=info.start))


def _shaped(info: TensorInfo, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    plain = {
        GGMLQuantizationType.F32: np.float32,
        GGMLQuantizationType.F16: np.float16,
        GGMLQuantizationType.BF16: np.uint16,
    }
    if info.type in plain:
        return raw.view(plain[info.type]).reshape(info.shape)
    return raw.reshape(*info.shape[:-1], -1)


def _all_parts(opened: _Part, count: int) -> list[_Part]:
    """The parts of a split model in order; `opened` is one of them."""
    found = _PART_NAME.fullmatch(opened.path.name)
    if found is None or int(found[3]) != count:
        raise ModelError(
            f"this is one of {count} parts of a model, and its name does not say which",
            where=str(opened.path),
            remedy=f"give the parts their names back: NAME-00001-of-{count:05d}.gguf and so on",
        )
    parts = []
    for number in range(count):
        path = opened.path.with_name(f"{found[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not path.exists():
            raise ModelError(
                f"this part of a model in {count} parts is missing",
                where=str(path),
                remedy="put all parts into one folder",
            )
        part = opened if path == opened.path else _Part(path)
        if (part.metadata.get(_PARTS), part.metadata.get(_PART)) != (count, number):
            raise damaged(path, f"it does not say that it is part {number + 1} of {count}")
        parts.append(part)
    return parts


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def damaged(path: Path, what: str) -> ModelError:
    """What to raise for a file that makes no sense."""
    return ModelError(what, where=str(path), remedy="download or export the file again")


class _Part:
    """One file: its header, read, and its bytes, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self.mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(
                f"the file cannot be read: {error.strerror}", where=str(path)
            ) from None
        except ValueError:  # an empty file cannot be mapped
            raise damaged(path, "the file is empty") from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: list[TensorInfo] = []
        self._read_header()

    def _read_header(self) -> None:
        if is_lfs_pointer(self.path):
            raise ModelError(LFS_POINTER, where=str(self.path), remedy=LFS_REMEDY)
        if bytes(self._take(4)) != MAGIC:
            raise self._damaged("this is not a GGUF file: it does not begin with 'GGUF'")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._damaged(f"GGUF version {version} is not one of {VERSIONS}")
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        for _ in range(key_count):
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"the key {key} is there twice")
            self.metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, which is no power of two")
        start = -(-self._at // alignment) * alignment
        self.tensors = [replace(info, start=start + info.start) for info in infos]
        self._check_places()

    def _check_places(self) -> None:
        """Each tensor lies in the file, and none in another."""
        for info in self.tensors:
            if info.start + info.nbytes > len(self.mapped):
                raise self._damaged(
                    f"the file ends at byte {len(self.mapped)}, inside tensor {info.name}, which "
                    f"goes to byte {info.start + info.nbytes}: it is truncated"
                )
        for info, following in pairwise(sorted(self.tensors, key=lambda info: info.start)):
            if info.start + info.nbytes > following.start:
                raise self._damaged(f"tensors {info.name} and {following.name} overlap")

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self._damaged(f"tensor {name} has the empty shape {shape}")
        number, offset = self._number("<I"), self._number("<Q")
        try:
            type_ = GGMLQuantizationType(number)
        except ValueError:
            raise self._damaged(f"tensor {name} has the unknown type {number}") from None
        block, size = GGML_QUANT_SIZES[type_]
        if shape[-1] % block:
            raise self._damaged(f"tensor {name}: {shape[-1]} is no multiple of {block}")
        return TensorInfo(name, shape, type_, offset, prod(shape) // block * size)

    def _value(self, type_: int) -> Any:
        if type_ in _SCALARS:
            return np.frombuffer(self._take(_SCALARS[type_].itemsize), _SCALARS[type_])[0].item()
        if type_ == _STRING:
            return self._string()
        if type_ == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            if count > _MAX_ARRAY:
                raise self._damaged(f"an array of {count} values")
            if inner in _SCALARS:
                raw = self._take(count * _SCALARS[inner].itemsize)
                return Numbers(np.frombuffer(raw, _SCALARS[inner]).copy())
            if inner == _STRING:
                # Each string takes 8 bytes at least; a count beyond that is damage.
                self._room_for(count * 8)
                return self._strings(count)
            raise self._damaged(f"an array of the unknown type {inner}")
        raise self._damaged(f"a value of the unknown type {type_}")

    def _string(self) -> str:
        raw = self._take(self._number("<Q"))
        return bytes(raw).decode("utf-8", errors="replace")

    def _strings(self, count: int) -> list[str]:
        """As so many calls of `_string`, several times as fast: a vocabulary has 500,000."""
        mapped, at = self.mapped, self._at
        last = len(mapped) - 8
        length_at, strings = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if at > last:
                self._room_for(len(mapped))
            start = at + 8
            at = start + length_at(mapped, at)[0]
            strings.append(mapped[start:at].decode("utf-8", errors="replace"))
        self._room_for(at - self._at)
        self._at = at
        return strings

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> memoryview:
        self._room_for(count)
        part = memoryview(self.mapped)[self._at : self._at + count]
        self._at += count
        return part

    def _room_for(self, count: int) -> None:
        if self._at + count > len(self.mapped):
            raise self._damaged(
                f"the file ends at byte {len(self.mapped)}, inside its header: it is truncated"
            )

    def _damaged(self, what: str) -> ModelError:
        return damaged(self.path, what)
