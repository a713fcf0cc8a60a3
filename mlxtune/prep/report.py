"""What preparation did: counts, and a few examples of each thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlxtune.errors import DataError

EXAMPLES = 3  # kept of each reason


class Example(NamedTuple):
    """A row that a step touched: its place, the beginning of its text and the reason."""

    where: str
    text: str
    reason: str


@dataclass
class StepReport:
    """What one step did.

    Attributes:
        name: of the step.
        rows: how many it saw.
        removed: rows taken out, by reason.
        changed: what was changed, by kind: rows, or values where `unit` says so.
        examples: a few of each reason and kind.
        unit: what `changed` counts.
        settings: figures that explain the result.
    """

    name: str
    rows: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)
    unit: str = "rows"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def remove(self, reason: str, where: str, text: str) -> None:
        """Count a row that was taken out."""
        self._note(self.removed, reason, 1, Example(where, text, reason))

    def change(self, kind: str, where: str, text: str, count: int = 1) -> None:
        """Count what was changed in a row; `text` is the row after it."""
        self._note(self.changed, kind, count, Example(where, text, kind))

    def _note(self, counts: Counter[str], reason: str, count: int, example: Example) -> None:
        counts[reason] += count
        if sum(e.reason == reason for e in self.examples) < EXAMPLES:
            self.examples.append(example)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "step": self.name,
            "rows": self.rows,
            "removed": dict(self.removed.most_common()),
            "changed": dict(self.changed.most_common()),
            "changed_unit": self.unit,
            "settings": dict(self.settings),
            "examples": [example._asdict() for example in self.examples],
        }

    def as_text(self) -> str:
        """For people: a line a reason, its examples below."""
        removed = sum(self.removed.values())
        lines = [f"{self.name}: {self.rows:,} rows, {removed:,} removed"]
        if self.settings:
            lines[0] += f" ({', '.join(f'{k} {v}' for k, v in self.settings.items())})"
        for verb, unit, counts in (
            ("removed", "", self.removed),
            ("changed", f" {self.unit}", self.changed),
        ):
            for reason, count in counts.most_common():
                lines.append(f"  {verb} {count:,}{unit}: {reason}")
                lines += [f"    {e.where}  {e.text}" for e in self.examples if e.reason == reason]
        return "\n".join(lines)


@dataclass(frozen=True)
class PrepReport:
    """What `prepare` did.

    Attributes:
        read: rows of the source.
        train: rows written to train.jsonl.
        heldout: rows written to heldout.jsonl; 0 when nothing is held out.
        steps: each step, in order.
        balance_by: the tag that `balance` counts.
        balance: per split, how many rows have each value of that tag; empty when no row
            has the tag.
    """

    read: int
    train: int
    heldout: int
    steps: tuple[StepReport, ...]
    balance_by: str = "category"
    balance: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        return {
            "read": self.read,
            "train": self.train,
            "heldout": self.heldout,
            "steps": [step.as_dict() for step in self.steps],
            "balance_by": self.balance_by,
            "balance": {
                split: {
                    value: {"rows": count, "share": round(share, 6)}
                    for value, count, share in _shares(counts)
                }
                for split, counts in self.balance.items()
            },
        }

    def as_text(self) -> str:
        """As report.txt has it."""
        head = f"{self.read:,} rows read, {self.train:,} to train on, {self.heldout:,} held out"
        parts = [head, *(step.as_text() for step in self.steps)]
        for split, counts in self.balance.items():
            lines = [f"{self.balance_by} in {split}:"]
            lines += [f"  {value}: {n:,} ({share:.1%})" for value, n, share in _shares(counts)]
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"


class Unread:
    """Why rows could not be read: each reason, how often, and the first row of it."""

    _MOST = 50  # a reason may name what is in its row: not all of millions are kept

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, DataError] = {}

    def count(self, error: DataError) -> None:
        """One more row."""
        if error.what in self.first or len(self.first) < self._MOST:
            self.counts[error.what] += 1
            self.first.setdefault(error.what, error)


def nothing_left(read: int, steps: Sequence[StepReport], unread: Unread) -> DataError:
    """What to raise where no row is left: what took most of them, and the first row of each.

    Args:
        read: rows of the source.
        steps: what was done.
        unread: the rows that the step `read` removed.
    """
    reasons = [
        (count, what, unread.first[what].where or "", unread.first[what].remedy)
        for what, count in unread.counts.items()
    ]
    for step in steps:
        places = {example.reason: example.where for example in reversed(step.examples)}
        reasons += [
            (count, f"{reason} (step: {step.name})", places.get(reason, ""), None)
            for reason, count in step.removed.items()
            if not (step.name == "read" and unread.counts)
        ]
    most = sorted(reasons, key=lambda reason: -reason[0])[:3]
    lines = [f"{count:,} rows: {what}; the first is {where}" for count, what, where, _ in most]
    remedy = next((remedy for *_, remedy in most if remedy), None)
    return DataError(
        "\n  ".join([f"no rows are left of {read:,}", *lines]),
        remedy=remedy
        or "what goes is said in [prep] or here, as --set drop_refusals=false: docs/data.md",
    )


def _shares(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(value, count, count / total) for value, count in ordered]
