"""Rows of files: JSONL, JSON, CSV, TSV, Parquet and Arrow, plain or compressed, one at a time.

Rows are streamed, so a file may be larger than memory; a `.json` file alone is read whole.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import jsonlines

from mlxtune.data.compressed import needs_extra, opened
from mlxtune.data.formats import FORMATS
from mlxtune.errors import DataError
from mlxtune.files import LFS_POINTER, LFS_REMEDY, is_lfs_pointer


class Row(NamedTuple):
    """A decoded row and where it stands: `file:line`, or `file row N` in Parquet.

    The value of a line that cannot be decoded, while those after it can, is a `DataError`,
    for whoever reads the rows to raise or to count.
    """

    where: str
    value: object


# JSON files that lie beside records and hold none: of `datasets`, of LLaMA-Factory, of a
# model, and the report of `mlxtune data prep`.
_NO_RECORDS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
    "metadata.json",
    "config.json",
    "report.json",
}


def find_files(path: str) -> list[Path]:
    """The data files that a path, a folder or a glob pattern names, in order of name.

    Of a folder they are those whose endings say that they hold records, in it and below.

    Raises:
        DataError: there is none.
    """
    try:
        return _find(path)
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long, a user without a home, a pattern such as `a**b`.
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"this cannot be a path: {reason}", where=path) from None


def _find(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if "\0" in path:
        raise ValueError("it has a NUL character in it")
    if place.is_dir():
        found = [f for f in sorted(place.rglob("*")) if f.is_file() and _holds_records(f, place)]
        if not found:
            raise DataError(
                "this folder has no data files in it",
                where=path,
                remedy=f"they end in {', '.join(READERS)}, and may be compressed: .gz, .zst",
            )
        return found
    if place.exists() or not any(c in path for c in "*?["):
        return [place]
    anchor = Path(place.anchor) if place.is_absolute() else Path()
    pattern = str(place.relative_to(anchor))
    # As in a shell, `*` passes over hidden files.
    shown = (f for f in anchor.glob(pattern) if place.name[0] == "." or f.name[0] != ".")
    found = sorted(f for f in shown if f.is_file())
    if not found:
        raise DataError("no file matches this pattern", where=path)
    return found


def _holds_records(file: Path, below: Path) -> bool:
    if _reader(file) is None or _hidden(file, below) or file.name.lower() in _NO_RECORDS:
        return False
    return file.suffix != ".arrow" or _of_dataset(file)


def _of_dataset(file: Path) -> bool:
    """Whether an Arrow file is part of what `save_to_disk` wrote, rather than of its cache."""
    try:
        state = json.loads((file.parent / "state.json").read_text(encoding="utf-8"))
        return file.name in [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return not file.name.startswith("cache-")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file.

    The kind of file is told by its ending; one without a known ending is read as JSONL.

    Raises:
        DataError: the file is missing, damaged or not of its kind; names the line.
    """
    read = _reader(path) or _json_lines
    with read_errors(path):
        if is_lfs_pointer(path):
            raise DataError(LFS_POINTER, where=str(path), remedy=LFS_REMEDY)
        yield from read(path)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read `path` into a `DataError`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            "there is no such file",
            where=str(path),
            remedy=f"it was looked for at {path.absolute()}",
        ) from None
    except IsADirectoryError:
        raise DataError("this is a folder; a file was expected", where=str(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the file cannot be read: {reason}", where=str(path)) from None


def _json_lines(path: Path) -> Iterator[Row]:
    with opened(path) as handle:
        number = 0

        def lines() -> Iterator[bytes]:
            nonlocal number
            try:
                for line in handle:
                    number += 1
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)  # Windows' beginning
                    if line.strip():
                        yield line
            except EOFError as error:  # gzip's; jsonlines means the regular end by it
                raise DataError(f"the file is cut off: {error}", where=str(path)) from None

        reader = jsonlines.Reader(lines())
        value: object
        while True:
            try:
                value = reader.read(allow_none=True)
            except EOFError:
                return
            except jsonlines.InvalidLineError as error:
                value = _no_json(error.__cause__ or error, f"{path}:{number}")
            except RecursionError as error:
                value = _no_json(error, f"{path}:{number}")
            yield Row(f"{path}:{number}", value)


def _no_json(error: BaseException, where: str) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"this line is not UTF-8 text: {error.reason}", where=where)
    if isinstance(error, RecursionError):
        return DataError("this line is not JSON: it is nested too deeply", where=where)
    return DataError(
        f"this line is not JSON: {error}", where=where, remedy="each line holds one JSON object"
    )


def _json(path: Path) -> Iterator[Row]:
    """A list of records, one record, or an object with one list of records in it.

    Elements are decoded one by one so that each has its line.
    """
    with opened(path) as handle:
        text = _decoded(handle.read(), path)
    decoder = json.JSONDecoder()
    start = _skip_space(text, 0)
    if text[start : start + 1] != "[":
        value, end = _decode_at(decoder, text, start, path)
        _require_end(text, end, path, 'one record a line is JSONL: let its name end in ".jsonl"')
        records = _records_in(value)
        if records is None:
            yield Row(f"{path}:{1 + text.count(chr(10), 0, start)}", value)
            return
        for number, record in enumerate(records, start=1):
            yield Row(f"{path} record {number}", record)
        return
    position, line, seen = _skip_space(text, start + 1), 1, 0
    while text[position : position + 1] != "]":
        line, seen = line + text.count("\n", seen, position), position
        value, position = _decode_at(decoder, text, position, path)
        yield Row(f"{path}:{line}", value)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", seen, position)
            raise DataError("a comma or ']' was expected here", where=f"{path}:{line}")
    _require_end(text, position + 1, path)


def _records_in(value: object) -> list[object] | None:
    """The one list of records in an object that is no record itself."""
    if type(value) is not dict or any(value.keys() >= {*f.keys} for f in FORMATS.values()):
        return None
    lists = [v for v in value.values() if isinstance(v, list)]
    return lists[0] if len(lists) == 1 and all(type(v) is dict for v in lists[0]) else None


def _require_end(text: str, position: int, path: Path, remedy: str | None = None) -> None:
    rest = _skip_space(text, position)
    if rest != len(text):
        where = f"{path}:{1 + text.count(chr(10), 0, rest)}"
        raise DataError("there is more after the end of the JSON", where=where, remedy=remedy)


def _decode_at(decoder: json.JSONDecoder, text: str, position: int, path: Path) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise DataError(
            f"this is not JSON: {error.msg} (column {error.colno})", where=f"{path}:{error.lineno}"
        ) from None
    except (ValueError, RecursionError) as error:
        line = 1 + text.count("\n", 0, position)
        deep = isinstance(error, RecursionError)
        raise DataError(
            f"this is not JSON: {'it is nested too deeply' if deep else error}",
            where=f"{path}:{line}",
        ) from None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


# Excel's own first line, which says what stands between cells.
_SEPARATOR = re.compile(r'^"?sep=(.)"?\s*$', re.IGNORECASE)


def _csv(path: Path) -> Iterator[Row]:
    """Rows under a header line; commas, semicolons, tabs or bars, whichever it has most."""
    # A cell may be as long as a document; the default limit is 128 KiB.
    csv.field_size_limit(2**31 - 1)
    with opened(path) as handle:
        number = read = 0

        def decoded() -> Iterator[str]:
            nonlocal read
            for read, data in enumerate(handle, start=1):
                # One by one, so that a byte that is no UTF-8 has its line.
                line = data.decode("utf-8-sig" if read == 1 else "utf-8")
                yield from line.splitlines(keepends=True) if "\r" in line[:-2] else [line]

        try:
            lines = decoded()
            header = next(lines, "")
            if excel := _SEPARATOR.match(header):
                delimiter, header = excel.group(1), next(lines, "")
            else:
                bare = re.sub(r'"[^"]*"', "", header)  # a quoted name may have any of them in it
                delimiter = max(",;\t|", key=bare.count)
            names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
            names = [name.strip() for name in names]
            number = read
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(
                    f"two columns are called {twice[0]!r}",
                    where=f"{path}:{read}",
                    remedy="give each a name of its own, or remove empty ones",
                )
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in reader:
                # A row's line is that on which it ends; a quoted cell may have line breaks.
                number = read
                if not cells:
                    continue
                where = f"{path}:{number}"
                if len(cells) == len(names):
                    yield Row(where, dict(zip(names, cells, strict=True)))
                    continue
                wrong = DataError(
                    f"this row has {len(cells)} cells and the header {len(names)}",
                    where=where,
                    remedy="a cell with the delimiter or a line break in it stands in quotes",
                )
                yield Row(where, wrong)
        except UnicodeDecodeError as error:
            raise DataError(
                f"this line is not UTF-8 text: {error.reason}",
                where=f"{path}:{read}",
                remedy="save the file as UTF-8; Excel calls it CSV UTF-8",
            ) from None
        except csv.Error as error:
            raise DataError(f"this row is not CSV: {error}", where=f"{path}:{number + 1}") from None


def _parquet(path: Path) -> Iterator[Row]:
    def batches(handle: IO[bytes]) -> Iterator[Any]:
        from pyarrow import parquet

        with parquet.ParquetFile(handle) as file:
            yield from file.iter_batches(batch_size=1024)

    return _table(path, "Parquet", batches)


def _arrow(path: Path) -> Iterator[Row]:
    """What `datasets` writes with `save_to_disk`: a stream of record batches."""

    def batches(handle: IO[bytes]) -> Iterator[Any]:
        from pyarrow import ArrowInvalid, ipc

        try:
            stream = ipc.open_stream(handle)
        except ArrowInvalid:
            file = ipc.open_file(handle)
            yield from map(file.get_batch, range(file.num_record_batches))
        else:
            yield from stream

    return _table(path, "Arrow", batches)


def _table(path: Path, kind: str, batches: Callable[[IO[bytes]], Iterator[Any]]) -> Iterator[Row]:
    try:
        import pyarrow as arrow
    except ImportError:
        raise needs_extra(kind, path) from None
    number = 0
    try:
        with path.open("rb") as handle:
            for batch in batches(handle):
                if len({*batch.schema.names}) != len(batch.schema.names):
                    raise DataError("two columns have the same name", where=str(path))
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", value)
    except (arrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"this is no whole {kind} file: {error}", where=f"{path} row {number + 1}"
        ) from None


# Endings that say what a file holds; .gz or .zst may follow those of text.
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise DataError(
            f"this line is not UTF-8 text: {error.reason}", where=f"{path}:{line}"
        ) from None
