"""Conversations from where they are kept: files, folders, patterns, hub datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mlxtune.data.files import Row, find_files, read_rows, without_nulls
from mlxtune.data.formats import FORMATS, parse_record
from mlxtune.data.records import Conversation
from mlxtune.errors import DataError
from mlxtune.install import install_extra

HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """Where records come from and how they are read.

    Attributes:
        path: a file, a folder, a glob pattern, or `hub:OWNER/NAME`.
        format: shape of the records, see `formats.parse_record`.
        columns: what fields of the format are called in the records.
        split: of a hub dataset.
        subset: configuration of a hub dataset.
        max_samples: take the first so many records.
        allow_empty: let records without a word pass.
    """

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    max_samples: int | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        known = {field for shape in FORMATS.values() for field in (*shape.keys, *shape.optional)}
        if unknown := sorted(self.columns.keys() - known):
            raise DataError(
                f"columns: no format has a field {unknown[0]!r}",
                where=self.path,
                remedy=f"fields are {', '.join(sorted(known))}; the file's own name for one "
                'stands behind it: {prompt = "question"}',
            )

    def files(self) -> list[Path]:
        """The local files; none of a hub dataset.

        Raises:
            DataError: there are none.
        """
        return [] if self.path.startswith(HUB) else find_files(self.path)

    def fingerprint(self) -> str:
        """What tells a hub dataset from others and from its other versions."""
        name = self.path.removeprefix(HUB)
        return str(_hub_dataset(name, self.subset, self.split or "train")._fingerprint)

    def rows(self) -> Iterator[Row]:
        """The raw rows, streamed."""
        if self.path.startswith(HUB):
            rows = _hub_rows(self.path.removeprefix(HUB), self.subset, self.split or "train")
        else:
            rows = (row for file in find_files(self.path) for row in read_rows(file))
        return islice(rows, self.max_samples)

    def parse(self, row: Row) -> Conversation:
        """A row as a conversation.

        Raises:
            DataError: it could not be decoded, or see `formats.parse_record`.
        """
        if isinstance(row.value, DataError):
            raise row.value
        return parse_record(
            row.value,
            format=self.format,
            columns=self.columns,
            allow_empty=self.allow_empty,
            where=row.where,
        )

    def __iter__(self) -> Iterator[Conversation]:
        """All records as conversations, streamed.

        Raises:
            DataError: a file is missing, damaged or empty, or a record of no known shape.
        """
        empty = True
        for row in self.rows():
            empty = False
            yield self.parse(row)
        if empty:
            raise DataError("it has no records", where=self.path)


def read_conversations(path: Path | str, **how: Any) -> list[Conversation]:
    """Every record of a source; `how` is as in `Source`.

    Raises:
        DataError: as iterating over a `Source`.
    """
    return list(Source(str(path), **how))


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    for number, value in enumerate(_hub_dataset(name, subset, split), start=1):
        yield Row(f"{HUB}{name} {split} row {number}", without_nulls(value))


def _hub_dataset(name: str, subset: str | None, split: str) -> Any:
    """A dataset of the hub, from its cache where it has been downloaded."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "hub datasets need another package",
            where=HUB + name,
            remedy=install_extra("hub"),
        ) from None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        # The library raises its own, huggingface-hub's and pyarrow's errors.
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the dataset cannot be loaded: {reason}",
            where=f"{HUB}{name}",
            remedy="check its name, subset and split, and that the hub can be reached",
        ) from error
