"""Samples of a source, kept on disk: read, rendered and tokenized once, on all cores.

A source of any size trains in the same memory: rows are streamed through the renderer
into one file of tokens, and samples are read from it when their turn comes. The file is
kept in the cache folder under a hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mlxtune import processes
from mlxtune.data.files import Row, read_errors
from mlxtune.data.render import Renderer
from mlxtune.data.rules import Rules, Tally, record_samples
from mlxtune.data.sources import Source
from mlxtune.data.store import (
    LAYOUT,
    SUMMARY,
    Chunk,
    Progress,
    TokenStore,
    pack_samples,
    write_store,
)
from mlxtune.errors import DataError, OutputExists, StorageError
from mlxtune.files import atomic_folder, cache_folder, sha256

# From so many rows on other processes are started, which costs a second or two of each
# core. Two cores gain from some 20,000 rows on, more cores sooner; but rows that are read
# to count them stay in memory, and a million rows are to need no more than 100,000.
PARALLEL_ROWS = 4096
_CHUNK = 512
_UNUSED_DAYS = 30


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
            chunks = _rendered(source, renderer, rules, workers or processes.cores())
            write_store(partial, source.path, chunks, progress)
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
        "rows": renderer.rows,
        "rules": asdict(rules),
    }
    text = json.dumps(parts, sort_keys=True, default=list)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _hash(file: Path) -> str:
    with read_errors(file):
        return sha256(file)


_Rows = list[tuple[int, Row]]


def _rendered(source: Source, renderer: Renderer, rules: Rules, workers: int) -> Iterator[Chunk]:
    """Samples in the order of their rows."""
    numbered = enumerate(source.rows(), start=1)
    few = list(islice(numbered, PARALLEL_ROWS))
    alone = workers == 1 or len(few) < PARALLEL_ROWS
    rows = chain(few, numbered)
    del few  # they go when they have been read, not at the end
    chunks: Iterator[_Rows] = iter(lambda: list(islice(rows, _CHUNK)), [])
    if alone:
        for chunk in chunks:
            yield _chunk(source, renderer, rules, chunk)
        return
    try:
        with processes.started(workers, _begin, source, renderer, rules) as others:
            yield from others.map(
                _work,
                ((chunk,) for chunk in chunks),
                here=lambda chunk: _chunk(source, renderer, rules, chunk),
            )
    except BrokenProcessPool:
        raise DataError(
            "a process that was tokenizing it has ended unasked",
            where=source.path,
            remedy=processes.GUARD,
        ) from None


def _chunk(source: Source, renderer: Renderer, rules: Rules, rows: _Rows) -> Chunk:
    tally = Tally()
    samples = [
        sample
        for number, row in rows
        for sample in record_samples(source, row, number, renderer, rules, tally)
    ]
    return pack_samples(samples, tally)


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


_worker: tuple[Source, Renderer, Rules]


def _begin(*worker: Any) -> None:
    global _worker
    _worker = worker


def _work(rows: _Rows) -> Chunk:
    return _chunk(*_worker, rows)


def _remove_unused(folder: Path) -> None:
    """Forget what has not been used for a month."""
    from shutil import rmtree

    limit = time.time() - _UNUSED_DAYS * 86400
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.stat().st_mtime < limit:
                rmtree(entry, ignore_errors=True)
