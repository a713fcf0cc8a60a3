"""Read records from files."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

import jsonlines

from mlxtune.data.records import Conversation, parse_record
from mlxtune.errors import DataError


def read_conversations(path: Path, *, format: str = "auto") -> list[Conversation]:
    """Every record of a JSONL file.

    Args:
        path: the file, UTF-8, one JSON object a line; blank lines are passed over.
        format: shape of the records, see `records.parse_record`.

    Raises:
        DataError: the file is missing, empty or not text, or a line is no JSON or no
            record; names the line.
    """
    try:
        with path.open("rb") as lines:
            conversations = [
                parse_record(_decode(line, where), format=format, where=where)
                for number, line in enumerate(_without_mark(lines), start=1)
                if line.strip() and (where := f"{path}:{number}")
            ]
    except FileNotFoundError:
        raise DataError(
            "there is no such file",
            where=str(path),
            remedy=f"paths are taken from the folder you are in: {Path.cwd()}",
        ) from None
    except IsADirectoryError:
        raise DataError("this is a folder; a JSONL file was expected", where=str(path)) from None
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    if not conversations:
        raise DataError("the file has no records", where=str(path))
    return conversations


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without the byte-order mark that files from Windows begin with."""
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _decode(line: bytes, where: str) -> object:
    try:
        with jsonlines.Reader([line.decode()]) as reader:
            return reader.read(allow_none=True)
    except UnicodeDecodeError as error:
        raise DataError(f"this line is not UTF-8 text: {error.reason}", where=where) from None
    except RecursionError:
        raise DataError("this line is not JSON: it is nested too deeply", where=where) from None
    except jsonlines.InvalidLineError as error:
        reason = str(error.__cause__ or error)
        raise DataError(
            f"this line is not JSON: {reason}",
            where=where,
            remedy="each line holds one JSON object",
        ) from None
