"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

import mlxtune
from mlxtune.evaluate.results import task_rows
from mlxtune.report.charts import charts
from mlxtune.report.collect import Lengths, Lost, RunRecord, differences
from mlxtune.report.results import Results, results
from mlxtune.report.summary import (
    Summary,
    clock,
    gigabytes,
    loss_text,
    rate_text,
    share_text,
    summarize,
)
from mlxtune.report.svg import bars, draw

# Facts that have a place of their own on the page.
_SHOWN_ELSEWHERE = ("status", "plan", "lengths", "hashes")


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first, and what is to be said of it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """Lengths of samples as they are drawn: those of a run, or None for those of all."""

    title: str
    run: int | None
    lengths: Lengths
    path: str
    x_ticks: tuple[Any, ...]
    y_ticks: tuple[Any, ...]


def page(runs: Sequence[RunRecord], lost: Sequence[Lost] = ()) -> str:
    """The page of one run, or of several laid over each other.

    Args:
        runs: at least one.
        lost: others, which cannot be shown.
    """
    summaries = [summarize(run) for run in runs]
    found = results(runs)
    script, style = _text("page.js"), _text("page.css")
    return _template().render(
        title=", ".join(run.name for run in runs),
        version=mlxtune.__version__,
        runs=runs,
        summaries=summaries,
        tiles=_tiles(runs[0], summaries[0], found) if len(runs) == 1 else [],
        gaps=[
            *((str(run.path), [f"left out: {run.error.what}"]) for run in lost),
            *((run.name, run.gaps) for run in runs if run.gaps),
        ],
        named=len(runs) + len(lost) > 1,
        differences=differences(runs) if len(runs) > 1 else {},
        pictures=[draw(chart) for chart in charts(runs)],
        histograms=_histograms(runs),
        plans=_plans(runs, summaries),
        results=found,
        tasks=[(run.name, run.tasks, task_rows(run.tasks["results"])) for run in runs if run.tasks],
        facts=_facts(runs),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _tiles(run: RunRecord, summary: Summary, found: Sequence[Results]) -> list[Tile]:
    tiles = []
    if summary.held_out_loss is not None:
        before = loss_text(summary.first_held_out_loss)
        note = f"from {before}, best at step {summary.best_step:,}"
        tiles.append(Tile("held-out loss", loss_text(summary.held_out_loss), note))
    if run.last is not None:
        note = f"step {summary.steps:,}"
        if summary.epochs is not None:
            note += f", {summary.epochs:.3g} epochs"
        tiles.append(Tile("training loss", loss_text(summary.loss), note))
    tiles += _score_tiles(found)
    if summary.tokens_per_second is not None:
        note = f"{rate_text(summary.examples_per_second)} examples a second"
        tiles.append(Tile("throughput", f"{rate_text(summary.tokens_per_second)} tok/s", note))
    if summary.peak_memory_bytes is not None:
        planned = summary.planned_memory_bytes
        note = f"planned {gigabytes(planned)}" if planned is not None else "MLX's peak"
        tiles.append(Tile("peak memory", gigabytes(summary.peak_memory_bytes), note))
    if summary.seconds is not None:
        note = f"{summary.examples or 0:,} examples, {summary.tokens or 0:,} tokens"
        tiles.append(Tile("in training steps", clock(summary.seconds), note))
    return tiles


def _score_tiles(found: Sequence[Results]) -> list[Tile]:
    """Exact match of the adapted model, where that was asked: of a whole evaluation, if any."""
    for result in found:
        names = [column.target for column in result.columns]
        if "tuned" not in names:
            continue
        metrics = result.columns[names.index("tuned")].figures["metrics"]
        if (tuned := metrics.get("exact")) is None:
            continue
        note = result.records if result.short else f"{tuned['count']} records"
        if "base" in names:
            base = result.columns[names.index("base")].figures["metrics"].get("exact")
            note = f"base {share_text(base['mean'] if base else None)}, {note}"
        return [Tile("exact match", share_text(tuned["mean"]), note)]
    return []


def _plans(runs: Sequence[RunRecord], summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """What was foreseen beside what came."""
    rows: list[tuple[str, ...]] = []
    for run, summary in zip(runs, summaries, strict=True):
        pairs = [
            ("peak memory", summary.planned_memory_bytes, summary.peak_memory_bytes, gigabytes),
            ("time of a step", summary.planned_seconds_per_step, summary.seconds_per_step, clock),
        ]
        for label, planned, came, form in pairs:
            if planned and came is not None:
                rows.append(
                    (run.name, label, form(planned), form(came), f"{came / planned - 1:+.0%}")
                )
    return rows


def _histograms(runs: Sequence[RunRecord]) -> list[Histogram]:
    """One for each set of samples that runs were trained on."""
    groups: dict[Lengths, list[int]] = {}
    for number, run in enumerate(runs):
        if run.lengths is not None:
            groups.setdefault(run.lengths, []).append(number)
    found = []
    for lengths, numbers in groups.items():
        path, x_ticks, y_ticks = bars(lengths)
        title = "Length of samples"
        own = numbers[0] if len(groups) > 1 or len(runs) == 1 else None
        if len(groups) > 1:
            title += ": " + ", ".join(runs[n].name for n in numbers)
        found.append(Histogram(title, own, lengths, path, x_ticks, y_ticks))
    return found


def _facts(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Circumstances, a row each, and each run's."""
    tables = []
    for run in runs:
        facts = {"folder": str(run.path), "status": run.status}
        for key, value in run.facts.items():
            if key == "versions" and isinstance(value, dict):
                facts |= {str(package): str(version) for package, version in value.items()}
            elif key not in _SHOWN_ELSEWHERE:
                facts[key] = value if isinstance(value, str) else json.dumps(value)
        hashes = run.facts.get("hashes")
        if isinstance(hashes, dict):
            facts |= {f"hash of {name}": str(value) for name, value in hashes.items()}
        tables.append(facts)
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: [table.get(key, "–") for table in tables] for key in keys}


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "loss": loss_text,
        "gigabytes": gigabytes,
        "rate": rate_text,
        "clock": clock,
        "count": lambda count: "–" if count is None else f"{count:,}",
    }
    return environment.from_string(_text("page.html"))


def _text(name: str) -> str:
    return (files("mlxtune.report") / name).read_text(encoding="utf-8")
