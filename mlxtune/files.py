"""Files and folders that appear whole or not at all.

Everything is written under a temporary name beside its destination, flushed to the disk
and renamed into place, so that a crash or a full disk leaves what stood there before.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlxtune.errors import MlxtuneError, OutputExists, StorageError

# The disk has no room for a write, or the path cannot be written to at all.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _FULL | {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
}


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it takes its name only when the block succeeds.

    Raises:
        StorageError: the disk is full or refuses the write.
    """
    temporary = _beside(path, "partial")
    with storage_errors(path), _parents_of(path):
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
def atomic_folder(
    path: Path, *, overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block succeeds.

    An empty folder at `path` counts as nothing.

    Args:
        path: the folder to be.
        overwrite: replace what is at `path`, once the new folder is whole.
        marker: with `overwrite`, a file that what is replaced must hold; so that a
            slip of the hand does not replace a home folder by a model.

    Raises:
        OutputExists: `path` exists and may not be replaced.
        StorageError: the disk is full or refuses the write.
    """
    _require_free(path, overwrite, marker)
    temporary, replaced = _beside(path, "partial"), _beside(path, "replaced")
    try:
        with storage_errors(path), _parents_of(path):
            _clear_dead(path)
            temporary.mkdir()
            try:
                yield temporary
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _sync(file)
                # Something may have appeared there while the block ran.
                _require_free(path, overwrite, marker)
                if overwrite and (path.exists() or path.is_symlink()):
                    path.rename(replaced)
                try:
                    temporary.rename(path)
                except BaseException as error:
                    if replaced.exists() or replaced.is_symlink():
                        replaced.rename(path)
                    if isinstance(error, OSError) and error.errno in (
                        errno.ENOTEMPTY,
                        errno.EEXIST,
                    ):
                        _require_free(path, overwrite, marker)  # it has just appeared there
                    raise
                _remove(replaced)
            finally:
                _remove(temporary)
            _sync_folder(path.parent)
    except MlxtuneError as error:
        _tell_place(error, temporary, path)
        raise


@contextmanager
def atomic_files(
    path: Path, *, overwrite: bool = False, parts: str | None = None
) -> Iterator[Path]:
    """Yield a temporary folder whose files move beside `path` when the block succeeds.

    For a file that may come in parts, of which only the writer knows how many.

    Args:
        path: the file to be; the folder's other files are left alone.
        overwrite: replace files that are there.
        parts: pattern of the names that its parts have; what is there of an earlier time,
            whole or in parts, is refused or replaced, however many they were.

    Raises:
        OutputExists: a file exists and may not be replaced.
        StorageError: the disk is full or refuses the write.
    """
    earlier = sorted(path.parent.glob(parts)) if parts else []
    for old in (path, *earlier):
        require_no_file(old, overwrite)
    temporary = _beside(path, "partial")
    try:
        with storage_errors(path), _parents_of(path):
            _clear_dead(path)
            temporary.mkdir()
            try:
                yield temporary
                files = sorted(temporary.iterdir())
                for file in files:
                    _sync(file)
                    require_no_file(path.parent / file.name, overwrite)
                for file in files:
                    file.replace(path.parent / file.name)
                for old in {path, *earlier} - {path.parent / file.name for file in files}:
                    old.unlink(missing_ok=True)
            finally:
                _remove(temporary)
            _sync_folder(path.parent)
    except MlxtuneError as error:
        _tell_place(error, temporary, path)
        raise


def _tell_place(error: MlxtuneError, temporary: Path, path: Path) -> None:
    """Have an error about something in a temporary folder name what that was to become."""
    if isinstance(error, StorageError) or str(temporary) in (error.where or ""):
        error.where = str(path)


def clear_unfinished(folder: Path) -> None:
    """Put right what programs that were killed while writing into `folder` have left there.

    What they had put aside comes back if nothing took its place; their unfinished work goes.
    For a folder that nobody is writing into.
    """
    for path in folder.glob(".*"):
        if not (match := _BESIDE.fullmatch(path.name)):
            continue
        place = folder / match["name"]
        if match["kind"] == "replaced" and not (place.exists() or place.is_symlink()):
            path.rename(place)
        else:
            _remove(path)


def require_no_file(path: Path, overwrite: bool) -> None:
    """Say early that a file would be refused.

    Raises:
        OutputExists: it is there and `overwrite` is false, or it is a folder.
    """
    if path.is_dir():
        raise OutputExists("this is a folder", where=str(path), remedy="name a file in it")
    if path.exists() and not overwrite:
        raise OutputExists(
            "this exists already; nothing was written",
            where=str(path),
            remedy="choose another place, or pass --overwrite to replace it",
        )


def require_apart(output: Path, sources: Iterable[Path], *, beside: bool = False) -> None:
    """Refuse an output that would replace what it is made of.

    Args:
        output: to be written.
        sources: files and folders that are used for it.
        beside: whether it is a file, which may join a folder that is read.

    Raises:
        OutputExists: it is one of them, holds one or, if it is a folder, lies in one.
    """
    for source in sources:
        if _lies_in(source, output):
            what = f"{source} is used for it, and would be replaced"
        elif not beside and _lies_in(output, source):
            what = f"this is inside {source}, which is used for it"
        else:
            continue
        raise OutputExists(
            f"{what}; nothing was written", where=str(output), remedy="choose another place"
        )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or in it, by whatever names: there are links, and disks on
    which `Model` is `model`."""
    place, wanted = path.resolve(), folder.resolve()
    above = (place, *place.parents)
    return wanted in above or (
        wanted.exists() and any(one.exists() and wanted.samefile(one) for one in above)
    )


def _beside(path: Path, kind: str) -> Path:
    """A name in the same folder that nobody else uses; `.` has a name too."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


_BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>partial|replaced)")


def _clear_dead(path: Path) -> None:
    """Remove what processes that are no more have left of an unfinished `path`."""
    for left in path.absolute().parent.glob(f".{glob.escape(path.name)}.*.partial"):
        match = _BESIDE.fullmatch(left.name)
        if match and match["name"] == path.name and not _lives(int(match["process"])):
            _remove(left)


def _lives(process: int) -> bool:
    """Whether another process of this number runs here."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _require_free(path: Path, overwrite: bool, marker: str | None) -> None:
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputExists(
            "this exists already; nothing was written",
            where=str(path),
            remedy="choose another place, or pass --overwrite to replace it",
        )
    if marker is not None and not (path / marker).is_file():
        raise OutputExists(
            f"this exists and is nothing that this command wrote (it has no {marker}), so it is "
            "not replaced",
            where=str(path),
            remedy="choose another place, or remove it yourself",
        )


def require_writable(path: Path) -> None:
    """See that a file or folder could be made at `path`, before anything is worked on.

    Raises:
        StorageError: one of the folders above it is none, or nothing may be made in it.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        what = f"{above} is a file, not a folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        what = f"nothing may be written in {above}"
    else:
        return
    raise StorageError(what, where=str(path), remedy="choose another place with --output")


@contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those that were missing go again on failure."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where what can be made again is kept: `$MLXTUNE_CACHE`, else the user's cache."""
    if named := os.environ.get("MLXTUNE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxtune"


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# The first line of the text that Git LFS keeps in a repository in the place of a large file.
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_LFS = b"version https://git-lfs.github.com/spec/"
LFS_POINTER = "this is Git LFS's pointer to a file, not the file itself"
LFS_REMEDY = "run `git lfs pull` in the repository that it is from"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in the place of a large one."""
    try:
        with path.open("rb") as handle:
            return handle.read(len(_LFS)) == _LFS
    except OSError:
        return False


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a `StorageError`.

    Errors about other files, such as one that is read in the block, pass through.
    """
    try:
        yield
    except OSError as error:
        ours = error.filename is None
        if not ours:
            named, place = Path(os.fsdecode(error.filename)).absolute(), path.absolute()
            ours = place.parent in named.parents or named in place.parents
        if error.errno not in (_REFUSED if ours else _FULL):
            raise
        raise StorageError(
            f"could not write: {error.strerror or error}",
            where=str(path),
            remedy=f"{'free some space or ' * (error.errno in _FULL)}choose another place; what "
            "was there before is unharmed",
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
