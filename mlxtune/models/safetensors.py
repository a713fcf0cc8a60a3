"""Safetensors files, read and written one tensor at a time.

The `safetensors` package maps a whole file, which the system counts as the process's
memory, and writes one only from memory. Format: an unsigned 64-bit length, that many
bytes of JSON (name to dtype, shape and place), the tensors.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.errors import ModelError
from mlxtune.files import LFS_POINTER, LFS_REMEDY, is_lfs_pointer, write_json

Array = npt.NDArray[Any]

# NumPy has no bfloat16; its bits are given as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "F8_E4M3": np.dtype("<u1"),
    "F8_E5M2": np.dtype("<u1"),
    "F8_E8M0": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
_FLOATS = {"F16", "BF16", "F32", "F64"}
# The reference implementation reads no longer header.
_MAX_HEADER = 100_000_000

SHARD_BYTES = 5 * 10**9


_PIECE = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its bytes begin at `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Array:
        """Its values as they are stored; bfloat16 as uint16."""
        count = prod(self.shape)
        flat = np.fromfile(self.file, DTYPES[self.dtype], count, offset=self.start)
        return flat.reshape(self.shape)

    def float32(self) -> npt.NDArray[np.float32]:
        """Its values as float32.

        Raises:
            ModelError: they are no floats of 16, 32 or 64 bits.
        """
        if self.dtype not in _FLOATS:
            raise ModelError(
                f"the tensor {self.name} is stored as {self.dtype}, which is not read here",
                where=str(self.file),
            )
        stored, count = DTYPES[self.dtype], prod(self.shape)
        wide = np.empty(count, np.float32)
        # Piece by piece: what is stored of the largest tensor is not in memory beside it.
        for start in range(0, count, _PIECE):
            size = min(_PIECE, count - start)
            values = np.fromfile(
                self.file, stored, size, offset=self.start + start * stored.itemsize
            )
            wide[start : start + size] = from_bfloat16(values) if self.dtype == "BF16" else values
        return wide.reshape(self.shape)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; its header is checked against its size.

    Raises:
        ModelError: the file is truncated or a pointer of Git LFS, or its header makes no sense.
    """
    if is_lfs_pointer(path):
        raise ModelError(LFS_POINTER, where=str(path), remedy=LFS_REMEDY)
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}
    except (
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ModelError(
            f"this is not a whole safetensors file: {error}",
            where=str(path),
            remedy="download or save it again",
        ) from None
    end = 8 + length
    # As the reference implementation has it: one behind the other, without gaps.
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise ModelError(
                f"the tensor {tensor.name} begins at byte {tensor.start}, and what lies before "
                f"it ends at byte {end}",
                where=str(path),
                remedy="download or save it again",
            )
        end += tensor.nbytes
    if end != size:
        raise ModelError(
            f"the file has {size} bytes and its header speaks of {end}: it is truncated",
            where=str(path),
            remedy="download or save it again",
        )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a file that `read_safetensors` has read says of itself; empty where it says nothing."""
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        said = json.loads(handle.read(length)).get("__metadata__")
    return {k: str(v) for k, v in said.items()} if isinstance(said, dict) else {}


def _stored(path: Path, begin: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape = entry["dtype"], entry["shape"]
    start, stop = entry["data_offsets"]
    numbers = [*shape, start, stop]
    if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"tensor {name!r} is {dtype} {shape} at {start}")
    tensor = StoredTensor(name, dtype, tuple(shape), path, begin + start)
    if stop - start != tensor.nbytes:
        raise ValueError(f"tensor {name!r} has {stop - start} bytes, not {tensor.nbytes}")
    return tensor


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed together and lie one behind the other in a file.

    Attributes:
        entries: name, dtype and shape of each.
        load: gives arrays whose bytes, joined, are those of all entries.
    """

    entries: tuple[tuple[str, str, tuple[int, ...]], ...]
    load: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return sum(prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in self.entries)


def write_safetensors(
    folder: Path,
    pieces: Iterable[Piece],
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write `model.safetensors`, or numbered shards of it with their index.

    Args:
        folder: exists.
        pieces: of the model; one at a time is in memory.
        progress: is told each piece's name and number when its turn comes.
    """
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + piece.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(piece)
    count = len(shards)
    total, turn = sum(map(len, shards)), itertools.count(1)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        numbered = f"model-{number:05d}-of-{count:05d}.safetensors"
        name = numbered if count > 1 else "model.safetensors"
        _write_file(
            folder / name,
            shard,
            lambda first: progress(f"writing {first} ({next(turn)} of {total})"),
        )
        weight_map |= {entry[0]: name for piece in shard for entry in piece.entries}
    if count > 1:
        size = sum(piece.nbytes for shard in shards for piece in shard)
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
        )


def _write_file(path: Path, pieces: Sequence[Piece], tell: Callable[[str], None]) -> None:
    # mlx-lm and transformers ask the metadata for the maker's framework.
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for piece in pieces:
        for name, dtype, shape in piece.entries:
            size = prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            tell(piece.entries[0][0])
            for array in piece.load():
                handle.write(np.ascontiguousarray(array).data)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    # Rounding would carry a NaN's bits into another number.
    return np.where(np.isnan(values), bits >> 16 | 64, rounded).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers that bfloat16 bits stand for."""
    wide = bits.astype(np.uint32)
    wide <<= 16  # in place: a third copy of the largest tensor is felt
    return wide.view(np.float32)
