"""Evaluations side by side, as the page shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mlxtune.evaluate.results import (
    FIGURE_MEANINGS,
    METRIC_NAMES,
    Stored,
    described,
    first_words,
    is_short,
    judge_line,
    share,
    shells_line,
    which_models,
)
from mlxtune.report.collect import RunRecord

SAMPLES = 8
# Longer answers are cut off; the files have all of them.
_LONGEST = 1200
_LOSSES = {
    "held_out_loss": ("held-out loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "general_loss": ("general text loss", "{:.4f}"),
}


@dataclass(frozen=True)
class Column:
    """One model of one run: what is shown side by side."""

    run: int
    title: str
    target: str
    stored: Stored

    @property
    def figures(self) -> dict[str, Any]:
        """Of this model."""
        figures: dict[str, Any] = self.stored.figures["targets"][self.target]
        return figures


@dataclass(frozen=True)
class Cell:
    """A figure; for a share also its 95% interval, and what was gained over the first model."""

    text: str
    interval: tuple[float, float, float] | None = None
    gain: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Row:
    """A figure of all models, and what it means."""

    label: str
    cells: tuple[Cell, ...]
    meaning: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether that is what was expected."""

    text: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """One record and what each model said; None where one was not asked.

    `conversation` has the role and text of each turn where there are more than the prompt.
    """

    prompt: str
    conversation: tuple[tuple[str, str], ...]
    expected: str
    answers: tuple[Answer | None, ...]


@dataclass(frozen=True)
class Results:
    """One suite over all runs that were evaluated on it.

    `words` is what to read first, a line each, and whether it is a warning; `models` says what
    the columns are.
    """

    id: str
    suite: str
    words: tuple[tuple[str, bool], ...]
    models: tuple[str, ...]
    records: str
    short: bool
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    category_metric: str
    categories: tuple[Row, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def results(runs: Sequence[RunRecord]) -> list[Results]:
    """Each suite once, with the models of all runs side by side.

    Those of the suite's own data come first, then those of other data, then short checks.
    """
    suites = sorted({suite for run in runs for suite in run.evaluations})
    return sorted((_suite(suite, runs) for suite in suites), key=_place)


def _place(result: Results) -> tuple[bool, bool]:
    own = all(column.stored.figures.get("own", True) for column in result.columns)
    return result.short, not own


def _suite(suite: str, runs: Sequence[RunRecord]) -> Results:
    columns = _columns(suite, runs)
    metrics = list(dict.fromkeys(key for c in columns for key in c.figures["metrics"]))
    rows = [_loss_row(key, columns) for key in _LOSSES] + [_row(m, columns) for m in metrics]
    chosen = "exact" if "exact" in metrics or not metrics else metrics[0]
    records = {described(column.stored.figures) for column in columns}
    notes = [str(n) for c in columns for n in c.stored.figures.get("notes") or ()]
    notes += _judges(suite, runs)
    notes += [text for text, _ in _said(suite, runs, _shells)]
    return Results(
        id=f"evaluation-{quote(suite, safe='')}",
        suite=suite,
        words=tuple(_said(suite, runs, first_words)),
        models=tuple(text for text, _ in _said(suite, runs, _models)),
        records=" or ".join(sorted(records)),
        short=any(is_short(column.stored.figures) for column in columns),
        columns=columns,
        rows=tuple(row for row in rows if any(cell.text != "–" for cell in row.cells)),
        category_metric=METRIC_NAMES.get(chosen, chosen),
        categories=_categories(chosen, columns),
        samples=_samples(columns),
        notes=tuple(dict.fromkeys(notes)),
    )


def _judges(suite: str, runs: Sequence[RunRecord]) -> list[str]:
    """What the judge of each run's evaluation did and cost."""
    return [text for text, _ in _said(suite, runs, _judge)]


Lines = Sequence[tuple[str, bool]]


def _said(
    suite: str, runs: Sequence[RunRecord], tell: Callable[[dict[str, Any]], Lines]
) -> Iterator[tuple[str, bool]]:
    """Remarks on each run's evaluation, with its name where there are several."""
    for run in runs:
        if (stored := run.evaluations.get(suite)) is not None:
            for text, warns in tell(stored.figures):
                yield (f"{run.name}: {text}" if len(runs) > 1 else text), warns


def _judge(figures: dict[str, Any]) -> Lines:
    judge = figures.get("judge")
    return [(judge_line(judge), False)] if isinstance(judge, dict) else []


def _shells(figures: dict[str, Any]) -> Lines:
    text = shells_line(figures)
    return [(text, False)] if text else []


def _models(figures: dict[str, Any]) -> Lines:
    text = which_models(figures)
    return [(text, False)] if text else []


def _columns(suite: str, runs: Sequence[RunRecord]) -> tuple[Column, ...]:
    """Models of all runs; a base that several runs share stands there once."""
    columns: list[Column] = []
    for number, run in enumerate(runs):
        if (stored := run.evaluations.get(suite)) is None:
            continue
        for target in stored.figures["targets"]:
            title = target if len(runs) == 1 else f"{run.name}: {target}"
            columns.append(Column(number, title, target, stored))
    bases = [column for column in columns if column.target == "base"]
    if len(bases) > 1 and all(base.figures == bases[0].figures for base in bases):
        shared = Column(bases[0].run, "base", "base", bases[0].stored)
        columns = [shared, *(column for column in columns if column.target != "base")]
    return tuple(columns)


def _loss_row(key: str, columns: Sequence[Column]) -> Row:
    label, form = _LOSSES[key]
    cells = []
    for column in columns:
        value = column.figures.get(key)
        text = "–" if value is None else form.format(value)
        spread = column.figures.get("loss_interval") if key == "held_out_loss" else None
        if spread:
            text += f" ±{(spread['high'] - spread['low']) / 2:.2g}"
        cells.append(Cell(text))
    return Row(label, tuple(cells), FIGURE_MEANINGS[key])


def _row(metric: str, columns: Sequence[Column]) -> Row:
    found = [column.figures["metrics"].get(metric) for column in columns]
    most = max((interval["count"] for interval in found if interval), default=0)
    label = METRIC_NAMES.get(metric, metric)
    if most < max(len(column.stored.answers) for column in columns):
        label += f", of {most}"  # the others could not be judged
    gains = [(column.figures.get("gains") or {}).get(metric) for column in columns]
    cells = tuple(_cell(i, gain) for i, gain in zip(found, gains, strict=True))
    return Row(label, cells, FIGURE_MEANINGS.get(metric, ""))


def _cell(interval: dict[str, Any] | None, gain: dict[str, Any] | None) -> Cell:
    if not interval:
        return Cell("–")
    mean, low, high = (float(interval[key]) for key in ("mean", "low", "high"))
    text = f"{share(mean)} ±{50 * (high - low):.0f}"
    if not gain or gain["low"] == gain["high"] == 0:
        return Cell(text, (mean, low, high))
    # Where it has to be in two lines, the interval is one of them.
    mean_gain, *ends = (
        share(gain[key], signed=True).removesuffix("%") for key in ("mean", "low", "high")
    )
    span = f"({' to '.join(ends)})".replace(" ", "\N{NO-BREAK SPACE}")
    change = f"{mean_gain} {span}"
    sure = gain["low"] > 0 or gain["high"] < 0
    return Cell(text, (mean, low, high), change, gain["mean"] > 0 if sure else None)


def _categories(metric: str, columns: Sequence[Column]) -> tuple[Row, ...]:
    tables = [(c.stored.figures.get("categories") or {}).get(metric) or {} for c in columns]
    names = sorted({name for table in tables for name in table})
    if len(names) < 2:
        return ()
    rows = []
    for name in names:
        found = [table.get(name) or {} for table in tables]
        count = next((entry["records"] for entry in found if "records" in entry), "?")
        means = [entry.get(c.target) for entry, c in zip(found, columns, strict=True)]
        cells = [Cell("–") if m is None else Cell(share(m, digits=0), (m, m, m)) for m in means]
        rows.append(Row(name, (Cell(str(count)), *cells)))
    return tuple(rows)


def _samples(columns: Sequence[Column]) -> tuple[Sample, ...]:
    """Some records of the first run, spread so that not all are of one category."""
    answered = columns[0].stored.answers
    if not answered:
        return ()
    said = [
        {_identity(a): a["said"].get(column.target) for a in column.stored.answers}
        for column in columns
    ]
    every = max(1, len(answered) // SAMPLES)
    return tuple(
        Sample(
            _cut(str(record["prompt"])),
            _turns(record),
            _cut(str(record["expected"])),
            tuple(_answer(texts.get(_identity(record)), str(record["expected"])) for texts in said),
        )
        for record in answered[::every][:SAMPLES]
    )


def _identity(answer: dict[str, Any]) -> str:
    """Which record it is of: by number, and all that it asks, for runs may differ in data."""
    asked = answer.get("messages") or answer["prompt"]
    return json.dumps([answer.get("record"), asked, answer.get("tools"), answer["expected"]])


def _turns(answer: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    messages = answer.get("messages")
    turns = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    if len(turns) < 2:
        return ()
    return tuple(
        (str(m.get("role")), _cut(str(m.get("content") or m.get("tool_calls") or "")))
        for m in turns
    )


def _answer(text: str | None, expected: str) -> Answer | None:
    if text is None:
        return None
    return Answer(_cut(text), text.strip() == expected.strip())


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
