"""Conversations from where they are kept: files, folders, patterns, hub datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mlxtune.data.files import Row, find_files, read_rows
from mlxtune.data.formats import FORMATS, parse_record
from mlxtune.data.records import Conversation
from mlxtune.data.splits import Split, choose_split, default_split, one_of
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
        split: of a folder or a hub dataset; by default train, or where `held_out` the
            validation split, else the test split.
        subset: configuration of a folder or a hub dataset.
        max_samples: take the first so many records.
        system: a system prompt, for records that have none of their own.
        held_out: the records are held out of training.
        allow_empty: let records without a word pass.
    """

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    max_samples: int | None = None
    system: str | None = None
    held_out: bool = False
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

    @property
    def name(self) -> str:
        """The path, and the split where the path has several."""
        if self.path.startswith(HUB):
            return f"{self.path} ({self.split})" if self.split is not None else self.path
        split = self.local_split()
        return f"{self.path} ({split.name})" if split.name else self.path

    def files(self) -> list[Path]:
        """The local files; none of a hub dataset.

        Raises:
            DataError: there are none.
        """
        return [] if self.path.startswith(HUB) else list(self.local_split().files)

    def local_split(self) -> Split:
        """The files of a path on this machine, and of its other splits.

        Raises:
            DataError: there is no such file, or no such split.
        """
        files = find_files(self.path)
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return choose_split(
                folder, files, self.split, subset=self.subset, held_out=self.held_out
            )
        for key in ("split", "subset"):
            if getattr(self, key) is not None:
                raise DataError(
                    f"{key} chooses among the files of a folder or of a hub dataset, and this is "
                    "neither",
                    where=self.path,
                    remedy=f"leave {key} out, or name the folder",
                )
        return Split("", tuple(files))

    def fingerprint(self) -> str:
        """What tells a hub dataset from others and from its other versions."""
        return str(self._hub_dataset()[1]._fingerprint)

    def rows(self) -> Iterator[Row]:
        """The raw rows, streamed."""
        if self.path.startswith(HUB):
            rows = self._hub_rows()
        else:
            rows = (row for file in self.files() for row in read_rows(file))
        return islice(rows, self.max_samples)

    def _hub_rows(self) -> Iterator[Row]:
        split, dataset = self._hub_dataset()
        for number, value in enumerate(dataset, start=1):
            yield Row(f"{self.path} {split} row {number}", value)

    def _hub_dataset(self) -> tuple[str, Any]:
        return _hub_dataset(self.path.removeprefix(HUB), self.subset, self.split, self.held_out)

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
            system=self.system,
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


def _hub_dataset(
    name: str, subset: str | None, split: str | None, held_out: bool
) -> tuple[str, Any]:
    """A split of a dataset of the hub, from the cache where it has been downloaded."""
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
        if split is None:
            whole = datasets.load_dataset(name, subset)
            split = default_split(whole, held_out=held_out)
            if split is not None:
                return split, whole[split]
        else:
            return split, datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        # The library raises its own, huggingface-hub's and pyarrow's errors.
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the dataset cannot be loaded: {reason}",
            where=f"{HUB}{name}",
            remedy="check its name, subset and split, and that the hub can be reached",
        ) from error
    raise DataError(
        f"this dataset has no {'validation or test' if held_out else 'train'} split",
        where=f"{HUB}{name}",
        remedy=f"name one that it has: split = {one_of(whole)}",
    )
