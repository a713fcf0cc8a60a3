"""What an evaluation looks like in a terminal, 60 columns wide or more.

What is not ours goes in as `Text`: rich would take `[/b]` in a plain string for markup.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtune.evaluate.bootstrap import Interval
from mlxtune.evaluate.comparison import Answered, Comparison, Figures
from mlxtune.evaluate.results import (
    METRIC_NAMES,
    described,
    figures_json,
    first_words,
    judge_line,
    share,
    shells_line,
    task_rows,
    which_models,
)

# In columns of a terminal, the lines between them counted.
_WIDEST_LABEL, _NARROWEST_FIGURE, _NARROWEST_TEXT = 21, 9, 15


def show_comparison(result: Comparison, *, samples: int) -> None:
    """What to read first, figures side by side, by category, and some answers."""
    console = Console()
    figures = figures_json(result)
    for line, warns in first_words(figures):
        console.print(Text(f"warning: {line}" if warns else line, style="bold red" * warns))
    console.print(_figures(result, console.width))
    for line in filter(None, (which_models(figures), shells_line(figures))):
        console.print(Text(line, style="dim"))
    first = next(iter(result.figures.values()))
    if any(first.metrics.values()):
        console.print("[dim]±: half of the 95% confidence interval, from resampling the records[/]")
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if result.judge is not None:
        console.print(judge_line(result.judge), highlight=False, markup=False)
    # Exact match, or the suite's first metric where it does not ask for that.
    metric = "exact" if "exact" in first.metrics else next(iter(first.metrics), None)
    if metric is not None and len(result.by_category(metric)) > 1:
        console.print(_categories(result, metric))
    if samples and result.answers:
        console.print(_samples(result, samples, console.width))


def show_tasks(result: dict[str, Any]) -> None:
    """What lm-eval measured, a row a figure."""
    table = Table(title=f"lm-eval {result['lm_eval']}")
    for column in ("task", "metric", "value", "±"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in task_rows(result["results"]):
        table.add_row(*map(Text, row))
    Console().print(table)


def _figures(result: Comparison, width: int) -> Table:
    table = Table(title=Text(described(figures_json(result))))
    # Words stay whole as long as figures do.
    whole = _WIDEST_LABEL + _NARROWEST_FIGURE * len(result.figures) < width
    table.add_column("", no_wrap=whole, overflow="fold")
    for name in result.figures:
        table.add_column(Text(name), justify="right", overflow="fold")
    models = list(result.figures.values())

    def row(label: str, form: Callable[[Figures], str]) -> None:
        cells = [form(figures) for figures in models]
        if any(cell != "–" for cell in cells):
            table.add_row(label, *cells)

    row("held-out loss", lambda f: f"{f.held_out_loss:.4f}")
    row("± of the loss", lambda f: _half(f.loss_interval))
    row("perplexity", lambda f: f"{f.perplexity:.4g}")
    row("bits per byte", lambda f: _number(f.bits_per_byte))
    row("general text loss", lambda f: _number(f.general_loss))
    for metric in models[0].metrics:
        label = METRIC_NAMES.get(metric, metric)
        counts = [i.count for f in models if (i := f.metrics[metric]) is not None]
        if counts and max(counts) < len(result.answers):
            label += f", of {max(counts)}"  # the others could not be told
        row(label, lambda f, m=metric: _share(f.metrics[m]))  # type: ignore[misc]
    return table


def _categories(result: Comparison, metric: str) -> Table:
    table = Table(title=f"{METRIC_NAMES.get(metric, metric)} by category")
    for column in ("category", "records", *result.figures):
        table.add_column(Text(column), justify="left" if column == "category" else "right")
    for name, (count, *means) in result.by_category(metric).items():
        table.add_row(Text(name), str(count), *("–" if m is None else f"{m:.0%}" for m in means))
    return table


def _samples(result: Comparison, samples: int, width: int) -> Table:
    """A row a sample, or a line a text where columns would be too narrow for words."""
    # Spread over the records, so that not all are of one category.
    every = max(1, len(result.answers) // samples)
    shown = result.answers[::every][:samples]
    columns = ("prompt", "expected", *result.figures)
    rows = [[Text(a.prompt), Text(a.expected), *_said(a)] for a in shown]
    if width >= _NARROWEST_TEXT * len(columns):
        table = Table(title="samples", show_lines=True)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table
    table = Table(title="samples", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        for column, text in zip(columns, row, strict=True):
            table.add_row(Text(column), text)
        table.add_section()
    return table


def _said(answer: Answered) -> list[Text]:
    return [
        Text(_short(text), style="green" if text == answer.expected else "")
        if text
        else Text("nothing", style="dim italic")
        for text in answer.said.values()
    ]


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    half = (interval.high - interval.low) / 2
    return f"{share(interval.mean)} ±{half * 100:.0f}"


def _half(interval: Interval | None) -> str:
    return "–" if interval is None else f"{(interval.high - interval.low) / 2:.4f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
