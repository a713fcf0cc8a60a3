"""Preparation from a source to a folder: mend, scrub, filter, remove duplicates, split.

Rows pass one by one to files on the disk; what stays in memory of a row is its place in
them, its group and its keys for duplicates.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mlxtune.data.convert import json_line, to_record
from mlxtune.data.formats import FORMATS, detect
from mlxtune.data.records import Conversation
from mlxtune.data.sources import Source
from mlxtune.errors import DataError
from mlxtune.files import atomic_folder, write_json, write_text
from mlxtune.prep.dedup import Near, clusters, find_duplicates
from mlxtune.prep.filters import filters, mend_encoding
from mlxtune.prep.report import PrepReport, StepReport, Unread, nothing_left
from mlxtune.prep.scrub import Scrubber
from mlxtune.prep.split import balance, group_key, hold_out, require_tag, tie
from mlxtune.prep.spool import Picked, Spool
from mlxtune.prep.texts import compared, excerpt
from mlxtune.recipe.schema import PrepSection

TRAIN, HELDOUT = "train.jsonl", "heldout.jsonl"
REPORT, REPORT_TEXT = "report.json", "report.txt"


def prepare(
    source: Source,
    output: Path,
    settings: PrepSection,
    *,
    against: Source | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> PrepReport:
    """Prepare a source for training; the source is not changed.

    The folder `output` gets `train.jsonl`, with `val_size` also `heldout.jsonl`, and what
    was done as `report.json` and `report.txt`. Rows keep their order and their shape.
    They are scrubbed before they are filtered, so that the examples in the report hold
    nothing that was to be scrubbed.

    Args:
        source: the rows.
        output: the folder to be; it appears whole or not at all.
        settings: what to do.
        against: rows, such as a held-out file, of which no near-duplicate may remain; no
            copy, where `dedup` is `exact`.
        seed: of the split.
        overwrite: replace `output`, where it is what this function wrote.

    Raises:
        DataError: a row cannot be read, nothing is left, the split asked for cannot be
            made, or an optional package is missing.
        OutputExists: `output` exists and may not be replaced.
        StorageError: the disk is full or refuses the write.
    """
    with atomic_folder(output, overwrite=overwrite, marker=REPORT) as folder:
        with Spool(folder) as lines, Spool(folder) as texts, Spool(folder) as places:
            rows = _Rows(lines, texts, places)
            clean = _Cleaner(settings)
            if against is not None:
                for conversation, _ in _records(against, settings):
                    rows.protect(clean.tidy(conversation)[0])
            for conversation, format in _records(source, settings, clean.unreadable):
                tidy = clean(conversation)
                if tidy is not None:
                    rows.add(tidy, format, conversation, settings)
            report = _finish(rows, clean, settings, seed, folder)
        write_json(folder / REPORT, report.as_dict())
        write_text(folder / REPORT_TEXT, report.as_text())
    return report


def _records(
    source: Source,
    settings: PrepSection,
    unreadable: Callable[[DataError], None] | None = None,
) -> Iterator[tuple[Conversation, str]]:
    """Conversations, and the shape that each came in; `unreadable` is told of the others."""
    # What says nothing is for the filter to drop.
    source = replace(source, allow_empty=settings.drop_empty)
    row = None
    for row in source.rows():
        try:
            conversation = source.parse(row)
        except DataError as error:
            if unreadable is None or not settings.drop_unreadable:
                raise
            unreadable(error)
            continue
        named = source.format in FORMATS
        keys = [*row.value, *source.columns] if isinstance(row.value, dict) else []
        yield conversation, source.format if named else detect(dict.fromkeys(keys), row.where)
    if row is None:
        raise DataError("it has no records", where=source.path)


class _Rows:
    """The rows that passed so far."""

    def __init__(self, lines: Spool, texts: Spool, places: Spool) -> None:
        self.lines = lines
        self.texts = texts  # those of protected rows come first
        self.places = places
        self.protected = 0
        self.worth = array("q")
        self.groups: list[Hashable | None] = []
        self.categories: list[Hashable | None] = []
        self._same: dict[Hashable | None, Hashable | None] = {}

    def protect(self, conversation: Conversation) -> None:
        """A row that none of the others may be like."""
        self._append(conversation)
        self.protected += 1

    def add(
        self, tidy: Conversation, format: str, original: Conversation, settings: PrepSection
    ) -> None:
        """A row to be written; its group is that of the original, before it was scrubbed."""
        self._append(tidy)
        self.lines.append(json_line(_record(tidy, format), tidy.where).decode())
        for values, tag, row in (
            (self.groups, settings.group_by, original),
            (self.categories, settings.balance_by, tidy),
        ):
            key = group_key(row, tag) if tag is not None else None
            # One object for equal keys, however many rows there are.
            values.append(self._same.setdefault(key, key))

    def _append(self, conversation: Conversation) -> None:
        self.texts.append(compared(conversation))
        self.places.append(conversation.where)
        self.worth.append(len(conversation.answer() or conversation.text()))

    def example(self, row: int) -> tuple[str, str]:
        """Place and beginning of a row, counted with the protected ones."""
        text = " → ".join(self.texts[row].split("\n"))
        return self.places[row], text if len(text) <= 120 else text[:119] + "…"


def _record(conversation: Conversation, format: str) -> dict[str, object]:
    try:
        return to_record(conversation, format)
    except DataError:
        # Its own shape cannot say all that was read from it; messages can.
        return to_record(conversation, "messages")


class _Cleaner:
    """What is done to each row by itself, and the reports on it."""

    def __init__(self, settings: PrepSection) -> None:
        self._mend = mend_encoding() if settings.fix_encoding else None
        self._scrub = Scrubber(settings.scrub, settings.phone_region) if settings.scrub else None
        self._filters = filters(settings)
        self.rows = 0
        self.reading = StepReport("read") if settings.drop_unreadable else None
        self.unread = Unread()
        self.encoding = StepReport("encoding")
        self.scrubbed = StepReport("scrub", unit="values")
        self.filtered = StepReport("filter")

    def unreadable(self, error: DataError) -> None:
        """Count a row that is none."""
        if self.reading is not None:
            self.reading.remove("unreadable", error.where or "", error.what)
            self.unread.count(error)

    def __call__(self, conversation: Conversation) -> Conversation | None:
        """The row mended and scrubbed, or None when a filter drops it."""
        self.rows += 1
        tidy, mended, found = self.tidy(conversation)
        if mended:
            self.encoding.change("wrong encoding undone", tidy.where, excerpt(tidy))
        for kind, count in found.items():
            self.scrubbed.change(kind, tidy.where, excerpt(tidy), count)
        for check in self._filters:
            if (reason := check(tidy)) is not None:
                self.filtered.remove(reason, tidy.where, excerpt(tidy))
                return None
        return tidy

    def tidy(self, conversation: Conversation) -> tuple[Conversation, bool, Counter[str]]:
        """The row mended and scrubbed; whether it was mended; what was scrubbed."""
        tidy = self._mend(conversation) if self._mend else conversation
        mended = tidy != conversation
        scrubbed, found = self._scrub(tidy) if self._scrub else (tidy, Counter[str]())
        return scrubbed, mended, found

    def reports(self) -> list[StepReport]:
        """Of the steps that were asked for, in order."""
        asked = [
            (self.encoding, self._mend),
            (self.scrubbed, self._scrub),
            (self.filtered, self._filters),
        ]
        steps = [step for step, used in asked if used]
        for step in steps:
            step.rows = self.rows
        if self.reading is not None and self.reading.removed:
            self.reading.rows = self.read
            steps.insert(0, self.reading)
        return steps

    @property
    def read(self) -> int:
        """All rows of the source."""
        unreadable = sum(self.reading.removed.values()) if self.reading is not None else 0
        return self.rows + unreadable


def _finish(
    rows: _Rows, clean: _Cleaner, settings: PrepSection, seed: int, folder: Path
) -> PrepReport:
    """Remove duplicates, split and write."""
    steps = clean.reports()
    near = Near(settings.dedup_threshold, settings.dedup_permutations, settings.dedup_shingle)
    gone = _remove_duplicates(rows, settings, near, steps)
    kept = [row for row in range(rows.protected, len(rows.texts)) if row not in gone]
    if not kept:
        raise nothing_left(clean.read, steps, clean.unread)
    held = _split(rows, kept, settings, near, seed, steps)
    _write(folder / TRAIN, rows, [k for k, out in zip(kept, held, strict=True) if not out])
    if any(held):
        _write(folder / HELDOUT, rows, [k for k, out in zip(kept, held, strict=True) if out])
    categories = [rows.categories[row - rows.protected] for row in kept]
    return PrepReport(
        read=clean.read,
        train=len(held) - sum(held),
        heldout=sum(held),
        steps=tuple(steps),
        balance_by=settings.balance_by,
        balance=balance(categories, held),
    )


def _remove_duplicates(
    rows: _Rows, settings: PrepSection, near: Near, steps: list[StepReport]
) -> set[int]:
    """The rows that go, each counted in the report of its step."""
    among = settings.dedup != "off"
    if not (among or rows.protected):
        return set()
    exact = settings.dedup == "exact"
    how = {} if exact else {"threshold": near.threshold, "permutations": near.permutations}
    how |= {} if exact else {"shingle": near.shingle, "bands": near.bands, "band": near.band}
    total = len(rows.texts) - rows.protected
    leaks = StepReport("against", total, settings=how)
    copies = StepReport("dedup", total, settings=how)
    duplicates = find_duplicates(
        rows.texts, rows.worth, None if exact else near, protected=rows.protected, among=among
    )
    for duplicate in duplicates:
        where, text = rows.example(duplicate.row)
        text += f" | like {rows.places[duplicate.kept]} ({duplicate.similarity:.2f})"
        kind = "the same text" if duplicate.same else "nearly the same text"
        step = leaks if duplicate.kept < rows.protected else copies
        step.remove(kind, where, text)
    copies.rows -= sum(leaks.removed.values())
    steps += [leaks] * bool(rows.protected) + [copies] * among
    return {duplicate.row for duplicate in duplicates}


def _split(
    rows: _Rows,
    kept: Sequence[int],
    settings: PrepSection,
    near: Near,
    seed: int,
    steps: list[StepReport],
) -> list[bool]:
    """Which of the kept rows are held out."""
    if not settings.val_size:
        return [False] * len(kept)
    groups = [rows.groups[row - rows.protected] for row in kept]
    if settings.group_by is not None:
        require_tag(groups, settings.group_by)
    if settings.dedup == "near":  # no two that are left are near
        alike = list(range(len(kept)))
    else:
        alike = clusters(Picked(rows.texts, kept), near)
    ties = tie(alike, groups)
    held = hold_out(ties, settings.val_size, seed)
    figures: dict[str, object] = {"val_size": settings.val_size, "held out": sum(held)}
    figures |= {"groups": len(set(ties)), "seed": seed}
    steps.append(StepReport("split", len(kept), settings=figures))
    return held


def _write(path: Path, rows: _Rows, chosen: Sequence[int]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(rows.lines[row - rows.protected] for row in chosen)
