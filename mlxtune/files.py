"""Files and folders that appear whole or not at all.

Everything is written under a temporary name beside its destination, flushed to the disk
and renamed into place, so that a crash or a full disk leaves what stood there before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlxtune.errors import OutputExists, StorageError

_STORAGE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
}


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it takes its name only when the block succeeds.

    Raises:
        StorageError: the disk is full or refuses the write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            # On a full disk even the close of a buffered file may fail; the error that
            # matters is the first one.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block succeeds.

    With `overwrite` an existing folder is replaced, and only after the new one is whole.

    Raises:
        OutputExists: `path` exists and `overwrite` is false.
        StorageError: the disk is full or refuses the write.
    """
    if path.exists() and not overwrite:
        raise OutputExists(
            "this folder exists already; nothing was written",
            where=str(path),
            remedy="choose another place with --output, or pass --overwrite to replace it",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        raise StorageError(
            f"could not write: {error.strerror or error}",
            where=str(path),
            remedy="free some space or choose another place; what was there before is unharmed",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Make a rename durable. Some filesystems cannot sync a folder; they are left alone."""
    with suppress(OSError):
        _sync(path)
