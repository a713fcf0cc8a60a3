"""What a run reports, and to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Report:
    """Figures since the last report; counts and seconds are of the whole run.

    Attributes:
        step: steps done.
        epoch: epochs done, as a fraction.
        loss: the objective's since the last report; of supervised fine-tuning a mean over
            supervised tokens, nats.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        tokens: tokens of all samples seen, each as if it stood alone, without padding.
        supervised_tokens: those that carried loss.
        examples: samples seen.
        tokens_per_second, examples_per_second: since the last report.
        peak_memory_bytes: MLX's peak so far.
        seconds: spent in training steps.
        figures: those of the objective beside its loss, since the last report.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    examples: int
    tokens_per_second: float
    examples_per_second: float
    peak_memory_bytes: int
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_entry(self) -> dict[str, Any]:
        """As a line of metrics.jsonl, in which the objective's figures stand by themselves."""
        entry = asdict(self)
        figures: dict[str, float] = entry.pop("figures")
        return entry | figures


@dataclass(frozen=True)
class Outline:
    """What is about to be trained."""

    run: Path
    model: str
    device: str
    dtype: str
    packed: bool
    notes: tuple[str, ...]
    trainable: int
    parameters: int
    samples: int
    held_out: int
    first_step: int
    total_steps: int
    workers: int = 1
    plan: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


class Reporter(Protocol):
    """Someone who wants to know how training goes."""

    def tokenized(self, path: str, rows: int) -> None:
        """So many records of a source have become tokens so far."""

    def referenced(self, done: int, total: int) -> None:
        """The reference's log-probabilities are known of `done` of all `total` tokens."""

    def started(self, outline: Outline) -> None:
        """Training begins, or goes on."""

    def stepped(self, step: int) -> None:
        """A step is done."""

    def reported(self, report: Report) -> None:
        """Figures are due."""

    def measured(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """The held-out `loss` and the objective's other figures were measured."""

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""


class Silent:
    """A reporter that says nothing."""

    def tokenized(self, path: str, rows: int) -> None:
        """Say nothing."""

    def referenced(self, done: int, total: int) -> None:
        """Say nothing."""

    def started(self, outline: Outline) -> None:
        """Say nothing."""

    def stepped(self, step: int) -> None:
        """Say nothing."""

    def reported(self, report: Report) -> None:
        """Say nothing."""

    def measured(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """Say nothing."""

    def saved(self, path: Path) -> None:
        """Say nothing."""


class Several:
    """Tells several reporters, one after the other."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters

    def tokenized(self, path: str, rows: int) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.tokenized(path, rows)

    def referenced(self, done: int, total: int) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.referenced(done, total)

    def started(self, outline: Outline) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.started(outline)

    def stepped(self, step: int) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.stepped(step)

    def reported(self, report: Report) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.reported(report)

    def measured(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.measured(step, figures, best)

    def saved(self, path: Path) -> None:
        """Tell all."""
        for reporter in self._reporters:
            reporter.saved(path)
