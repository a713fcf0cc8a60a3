"""Samples of a source, kept on disk: read, rendered and tokenized once, on all cores.

A source of any size trains in the same memory: rows are streamed through the renderer
into one file of tokens, and samples are read from it when their turn comes. The file is
kept in the cache folder under a hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mlxtune.data.files import Row, read_errors
from mlxtune.data.formats import NothingSaid
from mlxtune.data.render import Masking, NothingTrained, Renderer, Sample
from mlxtune.data.sources import Source
from mlxtune.errors import DataError, OutputExists, StorageError
from mlxtune.files import atomic_folder, cache_folder, sha256, write_json

LAYOUT = 1  # of the files below; a change makes older ones unused
TOKENS, INDEX, SUMMARY = "tokens.u32", "index.i64", "summary.json"

TOO_LONG, UNTRAINED = "longer than max_seq_length", "no token trained"

# The highest bit of a stored token says that it is trained.
_TRAINED = np.uint32(1 << 31)
_ENTRY = np.dtype([("offset", "<i8"), ("length", "<i4"), ("record", "<i4")])

# Below so many rows, starting other processes costs more than they save.
PARALLEL_ROWS = 4096
_CHUNK = 512
_UNUSED_DAYS = 30


Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Rules:
    """What becomes of a record.

    Attributes:
        masking: which of its tokens are trained.
        max_seq_length: the longest sample, in tokens; None for no limit.
        truncate: what is done with a longer one: `error`, `left` and `right` cut off
            its beginning or its end, `drop` leaves it out.
        on_empty: a record that trains no token is an `error`, or left out (`skip`).
    """

    masking: Masking = field(default_factory=Masking)
    max_seq_length: int | None = None
    truncate: str = "error"
    on_empty: str = "error"


@dataclass
class Tally:
    """What became of the records of a source.

    Attributes:
        rows: records read.
        samples: samples made of them; more than `rows` where a template rewrites turns.
        tokens, trained: tokens of all samples, and those of them that carry weight.
        longest: tokens of the longest sample, before anything was cut off.
        truncated: samples that were cut.
        dropped: samples left out, by reason.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count another one's records too."""
        for name in ("rows", "samples", "tokens", "trained", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for reason, count in other.dropped.items():
            self.drop(reason, count)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count samples that were left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


def record_samples(
    source: Source, row: Row, number: int, renderer: Renderer, rules: Rules, tally: Tally
) -> list[Sample]:
    """The samples of one row, as they are trained on; `tally` counts them.

    Raises:
        DataError: the row is wrong, or too long or trains nothing and may not be.
    """
    tally.rows += 1
    try:
        made = renderer.samples(source.parse(row), number, rules.masking)
    except (NothingSaid, NothingTrained):
        if rules.on_empty == "error":
            raise
        tally.drop(UNTRAINED)
        return []
    kept = []
    for sample in made:
        tally.longest = max(tally.longest, len(sample.tokens))
        fitted = _fitted(sample, rules, tally)
        if fitted is not None:
            kept.append(fitted)
            tally.samples += 1
            tally.tokens += len(fitted.tokens)
            tally.trained += fitted.supervised
    return kept


def _fitted(sample: Sample, rules: Rules, tally: Tally) -> Sample | None:
    limit = rules.max_seq_length
    if limit is None or len(sample.tokens) <= limit:
        return sample
    if rules.truncate == "error":
        raise DataError(
            f"this record has {len(sample.tokens)} tokens, more than train.max_seq_length = "
            f"{limit}",
            where=sample.where,
            remedy='raise it, or say what to do with such records: truncate = "left", "right" '
            'or "drop"',
        )
    if rules.truncate == "drop":
        tally.drop(TOO_LONG)
        return None
    tally.truncated += 1
    kept = slice(-limit, None) if rules.truncate == "left" else slice(limit)
    cut = Sample(sample.tokens[kept], sample.weights[kept], sample.record, sample.where)
    if cut.weights[1:].any():
        return cut
    if rules.on_empty == "error":
        raise NothingTrained(
            f"nothing trained is left of this record, cut off at {limit} tokens",
            where=sample.where,
            remedy='raise train.max_seq_length, or leave such records out: on_empty = "skip"',
        )
    tally.drop(UNTRAINED)
    return None


class TokenStore(Sequence[Sample]):
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
        self._length = os.fstat(self._index).st_size // _ENTRY.itemsize

    def __del__(self) -> None:
        for name in ("_tokens", "_index"):
            with suppress(OSError, AttributeError):
                os.close(getattr(self, name))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(at, slice):
            return Subset(self, np.arange(len(self))[at])
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        # Read, not mapped: pages of a mapped file would count as memory in use.
        place = (at % len(self)) * _ENTRY.itemsize
        [entry] = np.frombuffer(os.pread(self._index, _ENTRY.itemsize, place), _ENTRY)
        size, start = int(entry["length"]) * 4, int(entry["offset"]) * 4
        stored = np.frombuffer(os.pread(self._tokens, size, start), np.uint32)
        record = int(entry["record"])
        return Sample(
            (stored & ~_TRAINED).astype(np.int32),
            (stored >> np.uint32(31)).astype(np.float32),
            record + self._first,
            f"{self._name} record {record}",
        )

    def records(self) -> npt.NDArray[np.int64]:
        """The record number of each sample."""
        return self._column("record") + self._first

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sample."""
        return self._column("length")

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        return np.fromfile(self._folder / INDEX, _ENTRY)[name].astype(np.int64)


class Subset(Sequence[Sample]):
    """Some of a sequence's samples."""

    def __init__(self, samples: Sequence[Sample], chosen: npt.NDArray[np.int64]) -> None:
        self._samples, self._chosen = samples, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(at, slice):
            return Subset(self._samples, self._chosen[at])
        return self._samples[int(self._chosen[at])]


def tokenize(
    source: Source,
    renderer: Renderer,
    rules: Rules,
    *,
    first: int = 0,
    workers: int | None = None,
    progress: Progress = lambda _path, _rows: None,
) -> TokenStore:
    """All samples of a source, from the cache if they have been made before.

    Args:
        source: the records.
        renderer: of the model's tokenizer.
        rules: what becomes of each record.
        first: what is added to record numbers, for sources that follow others.
        workers: processes; all cores by default.
        progress: is told, now and then, the source's path and how many rows are done.

    Raises:
        DataError: a record is wrong, or none is left to train on.
        StorageError: the cache folder takes no files.
    """
    folder = cache_folder() / "tokens" / _key(source, renderer, rules)
    if not (folder / SUMMARY).is_file():
        with suppress(OutputExists), _cached(folder) as partial:
            chunks = _rendered(source, renderer, rules, workers or os.cpu_count() or 1)
            tally = _write(partial, source, chunks, progress)
            write_json(partial / SUMMARY, {"source": source.path, "tally": asdict(tally)})
        _remove_unused(folder.parent)
    with suppress(OSError):
        os.utime(folder)
    store = TokenStore(folder, source.path, first=first)
    if not len(store):
        raise DataError(
            f"none of its {store.tally.rows} records is left to train on: "
            + ", ".join(f"{n} {reason}" for reason, n in store.tally.dropped.items()),
            where=source.path,
        )
    return store


def _key(source: Source, renderer: Renderer, rules: Rules) -> str:
    """A hash of data, tokenizer, template and settings."""
    parts: dict[str, Any] = {
        "layout": LAYOUT,
        "versions": [version(p) for p in ("mlxtune", "transformers", "tokenizers", "jinja2")],
        "files": [_hash(f) for f in source.files()] or source.fingerprint(),
        "source": asdict(source) | {"path": None},
        "renderer": renderer.identity(),
        "rules": asdict(rules),
    }
    text = json.dumps(parts, sort_keys=True, default=list)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _hash(file: Path) -> str:
    with read_errors(file):
        return sha256(file)


@dataclass(frozen=True)
class _Chunk:
    """Samples of some rows, as they are stored: two arrays cross between processes fast."""

    tokens: npt.NDArray[np.uint32]
    entries: npt.NDArray[np.void]  # offsets count from the chunk's own beginning
    tally: Tally


def _write(folder: Path, source: Source, chunks: Iterable[_Chunk], progress: Progress) -> Tally:
    total, offset = Tally(), 0
    with (folder / TOKENS).open("wb") as tokens, (folder / INDEX).open("wb") as index:
        for chunk in chunks:
            chunk.entries["offset"] += offset
            offset += len(chunk.tokens)
            tokens.write(chunk.tokens.tobytes())
            index.write(chunk.entries.tobytes())
            total.add(chunk.tally)
            progress(source.path, total.rows)
    if not total.rows:
        raise DataError("it has no records", where=source.path)
    return total


_Rows = list[tuple[int, Row]]


def _rendered(source: Source, renderer: Renderer, rules: Rules, workers: int) -> Iterator[_Chunk]:
    """Samples in the order of their rows."""
    numbered = enumerate(source.rows(), start=1)
    few = list(islice(numbered, PARALLEL_ROWS))
    rows = chain(few, numbered)
    chunks: Iterator[_Rows] = iter(lambda: list(islice(rows, _CHUNK)), [])
    if workers == 1 or len(few) < PARALLEL_ROWS:
        for chunk in chunks:
            yield _chunk(source, renderer, rules, chunk)
        return
    # Started afresh, not forked: the GPU's driver does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (source, renderer, rules)) as pool:
        with _without_interrupts():
            # A process is started for each task that finds none idle.
            started, *_ = [pool.submit(_work, []) for _ in range(workers)]
        pending: deque[Future[_Chunk]] = deque()
        try:
            for chunk in chunks:
                if not started.done():  # a second or two, which need not be lost
                    yield _chunk(source, renderer, rules, chunk)
                    continue
                pending.append(pool.submit(_work, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _chunk(source: Source, renderer: Renderer, rules: Rules, rows: _Rows) -> _Chunk:
    tally = Tally()
    samples = [
        sample
        for number, row in rows
        for sample in record_samples(source, row, number, renderer, rules, tally)
    ]
    entries = np.zeros(len(samples), _ENTRY)
    entries["length"] = [len(sample.tokens) for sample in samples]
    entries["record"] = [sample.record for sample in samples]
    entries["offset"] = np.cumsum(entries["length"]) - entries["length"]
    none = np.empty(0, np.uint32)
    tokens = np.concatenate([none, *(s.tokens.astype(np.uint32) for s in samples)])
    trained = np.concatenate([none, *(s.weights for s in samples)]) > 0
    return _Chunk(tokens | trained * _TRAINED, entries, tally)


@contextmanager
def _cached(folder: Path) -> Iterator[Path]:
    try:
        with atomic_folder(folder) as partial:
            yield partial
    except StorageError as error:
        raise StorageError(
            error.what,
            where=error.where,
            remedy="tokens are kept there; MLXTUNE_CACHE names another folder for them",
        ) from error


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in here leave Ctrl-C, which a terminal sends to all, to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[Source, Renderer, Rules]


def _begin(*worker: Any) -> None:
    global _worker
    _worker = worker
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End when the process that started this one does: if it was killed, it cannot say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(rows: _Rows) -> _Chunk:
    return _chunk(*_worker, rows)


def _remove_unused(folder: Path) -> None:
    """Forget what has not been used for a month."""
    from shutil import rmtree

    limit = time.time() - _UNUSED_DAYS * 86400
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.stat().st_mtime < limit:
                rmtree(entry, ignore_errors=True)
