"""Importance matrices: how large the inputs of each matrix's columns are.

llama.cpp's `llama-imatrix` runs a model over a text and sums the squares of what goes into
each matrix. There are two forms of its files: GGUF since 2025-07, and an older binary one.
Both are read as `common_imatrix_load` and `llama-quantize` read them
(common/imatrix-loader.cpp and tools/quantize of https://github.com/ggml-org/llama.cpp, MIT).
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ExportError, ModelError
from mlxtune.files import atomic_file
from mlxtune.gguf.reader import MAGIC, GGUFFile

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, Floats]:
    """Read an importance matrix, of either form.

    Args:
        path: the file.

    Returns:
        The mean squared input of each column, float32 (width,), by the GGUF name of the
        matrix. Those of stacked experts follow one another: (experts · width,). An expert
        that the text never went through has ones.

    Raises:
        ExportError: the file is missing, damaged or no importance matrix.
    """
    try:
        with path.open("rb") as handle:
            is_gguf = handle.read(len(MAGIC)) == MAGIC
        found = _read_gguf(path) if is_gguf else _read_binary(path)
    except OSError as error:
        raise ExportError(
            f"the importance matrix cannot be read: {error.strerror}", where=str(path)
        ) from None
    except ModelError as error:
        raise ExportError(error.what, where=error.where, remedy=error.remedy) from None
    if not found:
        raise _damaged(path, "it has no entries")
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise _damaged(path, f"{name} has a value that is no mean of squares")
    return found


def write_imatrix(
    path: Path,
    sums: Mapping[str, Floats],
    counts: Mapping[str, Floats],
    datasets: Sequence[str],
    *,
    chunk_size: int = 512,
) -> None:
    """Write an importance matrix in the GGUF form.

    Args:
        path: the file.
        sums: sums of squared inputs, float32 (width,) or (experts, width), by the GGUF
            name of the matrix.
        counts: how many inputs are in each sum, float32 (1,) or (experts,).
        datasets: names of the texts.
        chunk_size: tokens that were run at a time, for the record.

    Raises:
        ExportError: sums and counts do not fit together.
        StorageError: the disk refuses the file.
    """
    for name in sums.keys() | counts.keys():
        if name not in sums or name not in counts:
            raise ExportError(f"{name} has sums or counts, but not both")
        if len(np.atleast_2d(sums[name])) != np.size(counts[name]):
            raise ExportError(f"{name} has sums and counts of different numbers of experts")
    most = max((float(np.max(c)) for c in counts.values()), default=0.0)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "imatrix.gguf")
        writer = gguf.GGUFWriter(written, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets) or [""])
        writer.add_uint32("imatrix.chunk_count", -int(-most // chunk_size))
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name in sorted(sums):
            squares = np.atleast_2d(np.asarray(sums[name], np.float32))
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(squares))
            number = np.asarray(counts[name], np.float32).reshape(-1, 1)
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(number))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with written.open("rb") as source, atomic_file(path) as target:
            shutil.copyfileobj(source, target)


def _read_gguf(path: Path) -> dict[str, Floats]:
    file = GGUFFile(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise ExportError(
            f"this GGUF file is no importance matrix: its general.type is {kind!r}",
            where=str(path),
            remedy="make one with llama.cpp's `llama-imatrix`",
        )
    ends = (_SUMS, _COUNTS)
    names = {name.removesuffix(end) for name in file.tensors for end in ends if name.endswith(end)}
    found = {}
    for name in sorted(names):
        for part in (name + _SUMS, name + _COUNTS):
            if part not in file.tensors:
                raise _damaged(path, f"{part} is missing")
            if file.tensors[part].type != Type.F32:
                raise _damaged(path, f"{part} is not float32")
        counts = np.rint(file.data(name + _COUNTS).reshape(-1, 1))
        sums = file.data(name + _SUMS).reshape(-1)
        if sums.size % counts.size:
            raise _damaged(path, f"{name} has {sums.size} sums for {counts.size} experts")
        by_expert = sums.reshape(counts.size, -1)
        with np.errstate(all="ignore"):
            means = np.where(counts > 0, by_expert / counts, np.float32(1))
        found[name] = means.astype(np.float32).reshape(-1)
    return found


def _read_binary(path: Path) -> dict[str, Floats]:
    """Count, then of each entry: name, number of runs, sums over the runs' means.

    All numbers are little-endian int32 and float32. What follows is for the record.
    """
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise _damaged(path, "it is truncated, or no importance matrix at all")
        at += count
        return data[at - count : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", errors="replace")
        runs, width = number(), number()
        if width < 1:
            raise _damaged(path, f"{name} has no values")
        sums = np.frombuffer(take(4 * width), "<f4")
        found[name] = (sums / np.float32(runs) if runs > 0 else sums).astype(np.float32)
    return found


def _damaged(path: Path, what: str) -> ExportError:
    return ExportError(
        f"the importance matrix is damaged: {what}",
        where=str(path),
        remedy="make it again with llama.cpp's `llama-imatrix`",
    )
