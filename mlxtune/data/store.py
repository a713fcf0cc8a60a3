"""Samples in a folder, written as they are made and read one at a time."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from mlxtune.data.groups import Group
from mlxtune.data.render import Sample
from mlxtune.data.rules import Tally
from mlxtune.errors import DataError
from mlxtune.files import storage_errors, write_json

LAYOUT = 5  # of the files, and of what rendering makes of a record: raise it with either
TOKENS, INDEX, SUMMARY = "tokens.u32", "index.i64", "summary.json"

# The highest bit of a stored token says that it is trained.
_TRAINED = np.uint32(1 << 31)
_ENTRY = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i4"),
        ("record", "<i4"),
        ("fingerprint", "<u8"),
        ("side", "<i4"),
    ]
)

Progress = Callable[[str, int], None]


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


class Stored(Sequence[Sample]):
    """Samples that are read when their turn comes, and whose columns are known without that."""

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(at, slice):
            return Subset(self, np.arange(len(self))[at])
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._read(at % len(self))

    def _read(self, at: int) -> Sample:
        raise NotImplementedError

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sample."""
        raise NotImplementedError

    def records(self) -> npt.NDArray[np.int64]:
        """The record number of each sample."""
        raise NotImplementedError

    def sides(self) -> npt.NDArray[np.int64]:
        """Which of its group each sample is."""
        raise NotImplementedError

    def fingerprints(self) -> npt.NDArray[np.uint64]:
        """The fingerprint of each sample's record."""
        raise NotImplementedError


class TokenStore(Stored):
    """Samples in a folder, read one at a time.

    Args:
        folder: as `tokenize` writes it.
        name: of the source, for messages.
        first: what is added to record numbers.
    """

    def __init__(self, folder: Path, name: str = "", *, first: int = 0) -> None:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        self.tally = Tally(**summary["tally"])
        self._folder, self._name, self._first = folder, name, first
        self._tokens = os.open(folder / TOKENS, os.O_RDONLY)
        self._index = os.open(folder / INDEX, os.O_RDONLY)
        self._references: int | None = None
        self._length = os.fstat(self._index).st_size // _ENTRY.itemsize
        # Unlike a `__del__` it also works while Python shuts down.
        weakref.finalize(self, _close, self._tokens, self._index)

    def __len__(self) -> int:
        return self._length

    def _read(self, at: int) -> Sample:
        # Read, not mapped: pages of a mapped file would count as memory in use.
        place = at * _ENTRY.itemsize
        [entry] = np.frombuffer(os.pread(self._index, _ENTRY.itemsize, place), _ENTRY)
        size, start = int(entry["length"]) * 4, int(entry["offset"]) * 4
        stored = np.frombuffer(os.pread(self._tokens, size, start), np.uint32)
        record = int(entry["record"])
        references = None
        if self._references is not None:
            references = np.frombuffer(os.pread(self._references, size, start), np.float32)
        return Sample(
            (stored & ~_TRAINED).astype(np.int32),
            (stored >> np.uint32(31)).astype(np.float32),
            record + self._first,
            f"{self._name} record {record}",
            int(entry["fingerprint"]),
            int(entry["side"]),
            references,
        )

    def with_references(self, name: str, make: Callable[[Path], None]) -> bool:
        """Give each sample from now on its `references`, which are kept beside the tokens.

        Args:
            name: of the file, of its own for all that the values depend on.
            make: writes the file where it is not there yet: float32, as many and in the order of
                the tokens. Given the path to write to.

        Returns:
            Whether the file was made now.

        Raises:
            StorageError: it cannot be written.
        """
        path = self._folder / name
        size = os.fstat(self._tokens).st_size
        missing = not path.is_file() or path.stat().st_size != size
        if missing:
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            try:
                with storage_errors(path):
                    make(partial)
                    partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        self._references = os.open(path, os.O_RDONLY)
        weakref.finalize(self, _close, self._references)
        return missing

    def offsets(self) -> npt.NDArray[np.int64]:
        """Where the tokens of each sample begin in the file of them, counted in tokens."""
        return self._column("offset")

    def records(self) -> npt.NDArray[np.int64]:
        """The record number of each sample."""
        return self._column("record") + self._first

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sample."""
        return self._column("length")

    def sides(self) -> npt.NDArray[np.int64]:
        """Which of its group each sample is."""
        return self._column("side")

    def fingerprints(self) -> npt.NDArray[np.uint64]:
        """The fingerprint of each sample's record."""
        return np.fromfile(self._folder / INDEX, _ENTRY)["fingerprint"]

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        return np.fromfile(self._folder / INDEX, _ENTRY)[name].astype(np.int64)


class Subset(Stored):
    """Some of a sequence's samples."""

    def __init__(self, samples: Sequence[Sample], chosen: npt.NDArray[np.int64]) -> None:
        self._samples, self._chosen = samples, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def _read(self, at: int) -> Sample:
        return self._samples[int(self._chosen[at])]

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sample."""
        return lengths_of(self._samples)[self._chosen]

    def records(self) -> npt.NDArray[np.int64]:
        """The record number of each sample."""
        return records_of(self._samples)[self._chosen]

    def sides(self) -> npt.NDArray[np.int64]:
        """Which of its group each sample is."""
        return sides_of(self._samples)[self._chosen]

    def fingerprints(self) -> npt.NDArray[np.uint64]:
        """The fingerprint of each sample's record."""
        return fingerprints_of(self._samples)[self._chosen]


class Joined(Stored):
    """Several sequences of samples, one after another."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(self, at: int) -> Sample:
        number = int(np.searchsorted(self._ends, at, side="right"))
        return self._parts[number][at - int(self._ends[number])]

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sample."""
        return np.concatenate([lengths_of(part) for part in self._parts])

    def records(self) -> npt.NDArray[np.int64]:
        """The record number of each sample."""
        return np.concatenate([records_of(part) for part in self._parts])

    def sides(self) -> npt.NDArray[np.int64]:
        """Which of its group each sample is."""
        return np.concatenate([sides_of(part) for part in self._parts])

    def fingerprints(self) -> npt.NDArray[np.uint64]:
        """The fingerprint of each sample's record."""
        return np.concatenate([fingerprints_of(part) for part in self._parts])


class Groups(Sequence[Group]):
    """The groups of a sequence of samples; those of a store are read when their turn comes."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        starts = np.flatnonzero(sides_of(samples) == 0)
        # None where each sample is a group of its own.
        self._starts = None if len(starts) == len(samples) else np.append(starts, len(samples))

    def __len__(self) -> int:
        return len(self._samples) if self._starts is None else len(self._starts) - 1

    def __getitem__(self, at: int) -> Group:  # type: ignore[override]
        if self._starts is None:
            return [self._samples[at]]
        start, stop = self._starts[at], self._starts[at + 1]
        return [self._samples[i] for i in range(start, stop)]

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of all samples of each group."""
        lengths = lengths_of(self._samples)
        return lengths if self._starts is None else np.add.reduceat(lengths, self._starts[:-1])


def lengths_of(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """The tokens of each sample; those of a store are not read for it."""
    if isinstance(samples, Stored):
        return samples.lengths()
    return np.array([len(sample.tokens) for sample in samples], np.int64)


def records_of(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """The record number of each sample; samples of a store are not read for it."""
    if isinstance(samples, Stored):
        return samples.records()
    return np.array([sample.record for sample in samples], np.int64)


def sides_of(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """Which of its group each sample is; samples of a store are not read for it."""
    if isinstance(samples, Stored):
        return samples.sides()
    return np.array([sample.side for sample in samples], np.int64)


def fingerprints_of(samples: Sequence[Sample]) -> npt.NDArray[np.uint64]:
    """The fingerprint of each sample's record; samples of a store are not read for it."""
    if isinstance(samples, Stored):
        return samples.fingerprints()
    return np.array([sample.fingerprint for sample in samples], np.uint64)


@dataclass(frozen=True)
class Chunk:
    """Samples of some rows, as they are stored: two arrays cross between processes fast."""

    tokens: npt.NDArray[np.uint32]
    entries: npt.NDArray[np.void]  # offsets count from the chunk's own beginning
    tally: Tally


def pack_samples(samples: Sequence[Sample], tally: Tally) -> Chunk:
    """Samples as they are stored."""
    entries = np.zeros(len(samples), _ENTRY)
    entries["length"] = [len(sample.tokens) for sample in samples]
    entries["record"] = [sample.record for sample in samples]
    entries["fingerprint"] = [sample.fingerprint for sample in samples]
    entries["side"] = [sample.side for sample in samples]
    entries["offset"] = np.cumsum(entries["length"]) - entries["length"]
    none = np.empty(0, np.uint32)
    tokens = np.concatenate([none, *(s.tokens.astype(np.uint32) for s in samples)])
    trained = np.concatenate([none, *(s.weights for s in samples)]) > 0
    return Chunk(tokens | trained * _TRAINED, entries, tally)


def write_store(folder: Path, name: str, chunks: Iterable[Chunk], progress: Progress) -> Tally:
    """Write chunks as they come into a folder that a `TokenStore` reads.

    Raises:
        DataError: there are no rows.
    """
    total, offset = Tally(), 0
    with (folder / TOKENS).open("wb") as tokens, (folder / INDEX).open("wb") as index:
        for chunk in chunks:
            chunk.entries["offset"] += offset
            offset += len(chunk.tokens)
            tokens.write(chunk.tokens.tobytes())
            index.write(chunk.entries.tobytes())
            total.add(chunk.tally)
            progress(name, total.rows)
    if not total.rows:
        raise DataError("it has no records", where=name)
    summary = {"source": name, "tally": asdict(total)}
    write_json(folder / SUMMARY, summary)
    return total
