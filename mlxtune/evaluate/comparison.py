"""What comes out of setting models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtune.evaluate.bootstrap import Interval
from mlxtune.evaluate.scores import Scores

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Figures:
    """One model's figures.

    Attributes:
        held_out_loss: nats a supervised token.
        loss_interval: the same with its confidence interval, records drawn whole.
        perplexity: exp of it.
        bits_per_byte: the loss over the bytes of the supervised text, end of turn counted
            in the loss: comparable between tokenizers.
        tokens: supervised tokens.
        general_loss: nats a token of the suite's plain text.
        metrics: mean of each metric with its confidence interval.
        gains: difference of each metric from the first model's, record by record.
    """

    held_out_loss: float
    loss_interval: Interval | None
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    general_loss: float | None
    metrics: dict[str, Interval | None]
    gains: dict[str, Interval | None]

    @property
    def exact_match(self) -> float | None:
        """Share of answers equal to the expected one, white space around both removed."""
        interval = self.metrics.get("exact")
        return interval.mean if interval is not None else None


@dataclass(frozen=True)
class Answered:
    """One record, what each model said, and what that is worth.

    Attributes:
        record: its number in the data, from 1.
        prompt: what the user said last, to show.
        messages: all that the models were given, turn by turn, as OpenAI's API has it.
        tools: JSON schemas of the functions that they might call.
        expected: the answer of the data.
        category: of the record's own field.
        said: each model's answer.
        scores: metric to score, of each.
    """

    record: int
    prompt: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    expected: str
    category: str
    said: dict[str, str]
    scores: dict[str, Scores]

    @property
    def base(self) -> str:
        """The base model's answer."""
        return self.said[BASE]

    @property
    def tuned(self) -> str:
        """The tuned model's answer."""
        return self.said[TUNED]


@dataclass(frozen=True)
class Source:
    """Where the figures are from.

    Attributes:
        data: paths of the records; none for those that the recipe holds out.
        own: whether they are the suite's or the recipe's; another file was named otherwise.
        limit: only the first so many were used; None if that is all there are.
        max_tokens: answers were cut off there, whatever the suite says.
        adapter: used instead of the run's own.
        tuned: the folder of the adapter that `tuned` has, and after which step it was kept.
        models: name to model, of those beside the subject's.
        executed: answers were run.
    """

    data: tuple[str, ...] = ()
    own: bool = True
    limit: int | None = None
    max_tokens: int | None = None
    adapter: str | None = None
    tuned: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    executed: bool = False


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        subject: the run or model that was named.
        suite: name of the suite.
        records: how many.
        figures: of each model; the first is what others are compared with.
        answers: of records that ask for one.
        notes: what could not be measured.
        judge: what the judge did and cost; None without one.
        shells: shell to version, of those that were asked what parses.
        source: which records they are, and which models.
    """

    subject: str
    suite: str
    records: int
    figures: dict[str, Figures]
    answers: tuple[Answered, ...]
    notes: tuple[str, ...] = ()
    judge: dict[str, Any] | None = None
    shells: dict[str, str] = field(default_factory=dict)
    source: Source = field(default_factory=Source)

    @property
    def base(self) -> Figures:
        """The base model's figures."""
        return self.figures[BASE]

    @property
    def tuned(self) -> Figures:
        """The tuned model's figures."""
        return self.figures[TUNED]

    def by_category(self, metric: str = "exact") -> dict[str, tuple[float | int | None, ...]]:
        """Category to the number of records and each model's mean of a metric."""
        groups: dict[str, list[Answered]] = {}
        for answer in self.answers:
            groups.setdefault(answer.category, []).append(answer)
        return {
            category: (len(group), *(_mean(group, name, metric) for name in self.figures))
            for category, group in sorted(groups.items())
        }


def _mean(group: Sequence[Answered], model: str, metric: str) -> float | None:
    values = [answer.scores[model].get(metric) for answer in group]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
