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
from mlxtune.evaluate.results import share, task_rows
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
    time_text,
)
from mlxtune.report.svg import bars, draw
from mlxtune.train.run import status_text

# What people call some of the facts.
_FACT_NAMES = {
    "seed": "seed of all that is random",
    "workers": "processes that trained together",
    "checkpointed_blocks": "blocks with gradient checkpointing",
    "quantized_matmul": "how products with quantized weights were computed",
}
# Facts that have a place of their own on the page.
_SHOWN_ELSEWHERE = ("status", "error", "plan", "lengths", "hashes")


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first, its explanation, and whether it is a bad one."""

    label: str
    value: str
    note: str = ""
    bad: bool = False


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
        contents=_contents(runs, found),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _contents(runs: Sequence[RunRecord], found: Sequence[Results]) -> list[tuple[str, str]]:
    """Sections of the page: id and name of each."""
    several = [("differences", "What differs")] if len(runs) > 1 and differences(runs) else []
    evaluations = [(result.id, f"Evaluation: {result.suite}") for result in found]
    tasks = [("tasks", "lm-eval")] if any(run.tasks for run in runs) else []
    gaps = [("gaps", "What is missing")] if any(run.gaps for run in runs) else []
    return [
        *several,
        ("training", "Training"),
        *evaluations,
        *tasks,
        *gaps,
        ("recipe", "Recipe and environment"),
    ]


def _tiles(run: RunRecord, summary: Summary, found: Sequence[Results]) -> list[Tile]:
    """Figures of `adapter/`, which is what eval, fuse and export take."""
    tiles = []
    if summary.held_out_loss is not None:
        step, bad = max(run.outcome.losses), summary.warning is not None
        tiles.append(Tile(f"held-out loss after step {step:,}", *_loss_tile(summary), bad=bad))
    if run.last is not None:
        note = f"on the records it learns from, at step {summary.steps:,}"
        if summary.epochs is not None:
            note += f" ({summary.epochs:.3g} epochs)"
        tiles.append(Tile("training loss", loss_text(summary.loss), note))
    tiles += _score_tiles(found)
    if summary.seconds is not None:
        note = f"{summary.examples or 0:,} records, {summary.tokens or 0:,} tokens"
        tiles.append(Tile("time in training steps", clock(summary.seconds), note))
    if summary.tokens_per_second is not None:
        note = f"tokens per second; {rate_text(summary.examples_per_second)} records per second"
        tiles.append(Tile("speed", rate_text(summary.tokens_per_second), note))
    if summary.peak_memory_bytes is not None:
        planned = summary.planned_memory_bytes
        note = f"planned {gigabytes(planned)}" if planned is not None else "that MLX had in use"
        tiles.append(Tile("peak memory", gigabytes(summary.peak_memory_bytes), note))
    return tiles


def _loss_tile(summary: Summary) -> tuple[str, str]:
    """The held-out loss of `adapter/`, and those before."""
    note = f"{loss_text(summary.first_held_out_loss)} before training"
    if summary.best_step and summary.best_held_out_loss != summary.held_out_loss:
        note += (
            f"; lowest after step {summary.best_step:,}: {loss_text(summary.best_held_out_loss)}"
        )
    return loss_text(summary.held_out_loss), note


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
            note = f"{share_text(base['mean'] if base else None)} before training; {note}"
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
                    (run.name, label, form(planned), form(came), _difference(came / planned - 1))
                )
    return rows


def _difference(change: float) -> str:
    return share(change, digits=0, signed=True)


def _histograms(runs: Sequence[RunRecord]) -> list[Histogram]:
    """One for each set of samples that runs were trained on."""
    groups: dict[Lengths, list[int]] = {}
    for number, run in enumerate(runs):
        if run.lengths is not None:
            groups.setdefault(run.lengths, []).append(number)
    found = []
    for lengths, numbers in groups.items():
        path, x_ticks, y_ticks = bars(lengths)
        title = "Length of the training records"
        own = numbers[0] if len(groups) > 1 or len(runs) == 1 else None
        if len(groups) > 1:
            title += ": " + ", ".join(runs[n].name for n in numbers)
        found.append(Histogram(title, own, lengths, path, x_ticks, y_ticks))
    return found


def _facts(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Circumstances, a row each, and each run's."""
    tables = []
    for run in runs:
        facts = {"folder of the run": str(run.path), "status": status_text(run.facts)}
        first = {key: run.facts.get(key) for key in ("command", "started", "ended")}
        for key, value in (first | run.facts).items():
            if key == "versions" and isinstance(value, dict):
                facts |= {f"version of {name}": str(version) for name, version in value.items()}
            elif key not in _SHOWN_ELSEWHERE and value not in (None, "", [], {}):
                told = value if isinstance(value, str) else json.dumps(value)
                facts[_FACT_NAMES.get(key, key.replace("_", " "))] = told
        hashes = run.facts.get("hashes")
        if isinstance(hashes, dict):
            facts |= {f"SHA-256 of {name}": str(value) for name, value in hashes.items()}
        tables.append(facts)
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: [table.get(key) or "–" for table in tables] for key in keys}


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
        "time": time_text,
        "status": status_text,
        "capital": lambda text: text[:1].upper() + text[1:],
        "count": lambda count: "–" if count is None else f"{count:,}",
    }
    return environment.from_string(_text("page.html"))


def _text(name: str) -> str:
    return (files("mlxtune.report") / name).read_text(encoding="utf-8")
