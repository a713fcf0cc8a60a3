"""Read a GGUF file: metadata at once, tensors as views of the mapped file.

Every count and offset is checked against the file's size before anything is allocated,
so a truncated or damaged file is a clear error and never a crash.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mlxtune.errors import ModelError

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


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file.

    `shape` is in NumPy's order, slowest axis first: (out, in) for a projection.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file, mapped into memory.

    Args:
        path: the file.

    Attributes:
        metadata: key to value; arrays are lists of Python values.
        tensors: name to `TensorInfo`.

    Raises:
        ModelError: the file is missing, not GGUF, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self._data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(
                f"the file cannot be read: {error.strerror}", where=str(path)
            ) from None
        except ValueError:  # an empty file cannot be mapped
            raise self._damaged("the file is empty") from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """A view of a tensor: its own shape for plain types, (…, bytes) for packed ones.

        BF16 is given as uint16.
        """
        info = self.tensors[name]
        return self._shaped(info, np.frombuffer(self._data, np.uint8, info.nbytes, info.start))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """As `data`, in memory of its own: what is mapped counts as the process's memory."""
        info = self.tensors[name]
        return self._shaped(info, np.fromfile(self.path, np.uint8, info.nbytes, offset=info.start))

    def _shaped(self, info: TensorInfo, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        plain = {
            GGMLQuantizationType.F32: np.float32,
            GGMLQuantizationType.F16: np.float16,
            GGMLQuantizationType.BF16: np.uint16,
        }
        if info.type in plain:
            return raw.view(plain[info.type]).reshape(info.shape)
        return raw.reshape(*info.shape[:-1], -1)

    def _read_header(self) -> None:
        if bytes(self._take(4)) != MAGIC:
            raise self._damaged("this is not a GGUF file: it does not begin with 'GGUF'")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._damaged(f"GGUF version {version} is not one of {VERSIONS}")
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._number("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for info in infos:
            placed = TensorInfo(info.name, info.shape, info.type, start + info.start, info.nbytes)
            if placed.start + placed.nbytes > len(self._data):
                raise self._damaged(
                    f"the file ends at byte {len(self._data)}, inside tensor {info.name}, which "
                    f"goes to byte {placed.start + placed.nbytes}: it is truncated"
                )
            self.tensors[info.name] = placed

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
            if inner in _SCALARS:
                raw = self._take(count * _SCALARS[inner].itemsize)
                return np.frombuffer(raw, _SCALARS[inner]).tolist()
            if inner == _STRING:
                # Each string takes 8 bytes at least; a count beyond that is damage.
                self._room_for(count * 8)
                return [self._string() for _ in range(count)]
            raise self._damaged(f"an array of the unknown type {inner}")
        raise self._damaged(f"a value of the unknown type {type_}")

    def _string(self) -> str:
        raw = self._take(self._number("<Q"))
        return bytes(raw).decode("utf-8", errors="replace")

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> memoryview:
        self._room_for(count)
        part = memoryview(self._data)[self._at : self._at + count]
        self._at += count
        return part

    def _room_for(self, count: int) -> None:
        if self._at + count > len(self._data):
            raise self._damaged(
                f"the file ends at byte {len(self._data)}, inside its header: it is truncated"
            )

    def _damaged(self, what: str) -> ModelError:
        return ModelError(what, where=str(self.path), remedy="download or export the file again")
