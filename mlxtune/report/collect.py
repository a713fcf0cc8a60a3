"""What a run's folder tells: everything that a report shows, and what is missing of it."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune.errors import RunError
from mlxtune.evaluate.results import LM_EVAL, Stored, read_results
from mlxtune.train.outcome import Outcome, outcome
from mlxtune.train.run import METRICS, RECIPE, Run

Entry = dict[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Samples by their tokens: bin i has `counts[i]` of `edges[i]` to `edges[i + 1] - 1`."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class RunRecord:
    """A run as it lies on the disk.

    Attributes:
        path: its folder.
        name: what it is called, unlike the others beside it.
        facts: run.json.
        recipe: recipe.toml as text; empty where it is missing.
        keys: dotted keys of the recipe and their values as text.
        reports: lines of metrics.jsonl with training's figures, in order of steps.
        held_out: those with a held-out loss.
        evaluations: what `mlxtune eval` kept, by suite.
        tasks: what `mlxtune eval --tasks` kept.
        plan: what was foreseen before training.
        lengths: of the samples.
        gaps: what is missing or damaged, a sentence each.
    """

    path: Path
    name: str
    facts: Entry
    recipe: str
    keys: dict[str, str]
    reports: tuple[Entry, ...]
    held_out: tuple[Entry, ...]
    evaluations: dict[str, Stored]
    tasks: Entry | None
    plan: dict[str, float]
    lengths: Lengths | None
    gaps: tuple[str, ...]

    @property
    def status(self) -> str:
        """Running, finished, interrupted or failed."""
        return str(self.facts["status"])

    @property
    def error(self) -> str | None:
        """Why it failed, if it did and that is known."""
        why = self.facts.get("error")
        return str(why) if self.status == "failed" and why else None

    @property
    def last(self) -> Entry | None:
        """The last report."""
        return self.reports[-1] if self.reports else None

    @property
    def outcome(self) -> Outcome:
        """Whether training helped."""
        return outcome((*self.held_out, *self.reports))


@dataclass(frozen=True)
class Lost:
    """A run of several that cannot be shown.

    Attributes:
        path: as it was named.
        error: why.
    """

    path: Path
    error: RunError


def collect(paths: Iterable[Path]) -> list[RunRecord]:
    """Runs, each once, with names that tell them apart.

    Raises:
        RunError: a folder is no run, or its run.json is damaged.
    """
    runs, lost = collect_readable(paths)
    if lost:
        raise lost[0].error
    return runs


def collect_readable(paths: Iterable[Path]) -> tuple[list[RunRecord], list[Lost]]:
    """Runs as `collect` gives them, and those that are none or damaged.

    Raises:
        RunError: no run is left.
    """
    folders = {path.expanduser().resolve(): path.expanduser() for path in paths}
    runs: list[RunRecord] = []
    lost: list[Lost] = []
    for path in folders.values():
        try:
            runs.append(read_run(path))
        except RunError as error:
            lost.append(Lost(path, error))
    if lost and not runs:
        raise lost[0].error
    return _told_apart(runs), lost


def read_run(path: Path) -> RunRecord:
    """A run's folder; whatever of it is missing or damaged is told in `gaps`.

    Raises:
        RunError: the folder is no run, or its run.json is damaged.
    """
    facts = Run.open(path).status()
    gaps: list[str] = []
    recipe, keys = _read_recipe(path / RECIPE, gaps)
    entries = sorted(_read_metrics(path / METRICS, gaps), key=lambda entry: int(entry["step"]))
    reports = tuple(e for e in entries if _is_number(e.get("loss")))
    held_out = tuple(e for e in entries if _is_number(e.get("held_out_loss")))
    if not held_out:
        gaps.append("no held-out loss: the recipe holds no records out, or none was measured yet")
    evaluations, tasks = _read_evaluations(path / "eval", gaps)
    plan = facts.get("plan")
    lengths = _lengths(facts.get("lengths"))
    if lengths is None:
        gaps.append("run.json has no lengths of samples")
    return RunRecord(
        path=path,
        name=_name(keys, path),
        facts=facts,
        recipe=recipe,
        keys=keys,
        reports=reports,
        held_out=held_out,
        evaluations=evaluations,
        tasks=tasks,
        plan={k: v for k, v in plan.items() if _is_number(v)} if isinstance(plan, dict) else {},
        lengths=lengths,
        gaps=tuple(gaps),
    )


def numbers(entries: Sequence[Entry], key: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The steps at which a figure was reported, and the figure."""
    known = [(e["step"], e[key]) for e in entries if _is_number(e.get(key))]
    return tuple(step for step, _ in known), tuple(value for _, value in known)


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Keys of the recipes in which runs differ, and each run's value."""
    keys = sorted({key for run in runs for key in run.keys} - {"name"})
    found = {key: [run.keys.get(key, "–") for run in runs] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _read_recipe(path: Path, gaps: list[str]) -> tuple[str, dict[str, str]]:
    """The text, and its keys. Not by the schema: a run of another version has a page too."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, dict(_flat(tomllib.loads(text)))
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing")
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} cannot be read: {error}")
    return "", {}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, table in enumerate(value):
                place = f"[{number}]" if len(value) > 1 else ""
                yield from _flat(table, f"{prefix}{key}{place}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _read_metrics(path: Path, gaps: list[str]) -> Iterator[Entry]:
    """Objects with a step; lines that are none are passed over and told."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        gaps.append(f"{path.name} is missing: there are no curves")
        return
    damaged, count = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            count += 1
            yield entry
        else:
            damaged.append(number)
    if damaged:
        named = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        word, verb = ("line", "is") if len(damaged) == 1 else ("lines", "are")
        gaps.append(f"{path.name}: {word} {named} cannot be read and {verb} left out")
    if not count:
        gaps.append(f"{path.name} reports nothing yet: there are no curves")


def _read_evaluations(folder: Path, gaps: list[str]) -> tuple[dict[str, Stored], Entry | None]:
    found: dict[str, Stored] = {}
    tasks: Entry | None = None
    for path in sorted(folder.glob("*.json")):
        if path.stem == LM_EVAL:
            tasks = _read_tasks(path, gaps)
            continue
        if path.stem.startswith(f"{LM_EVAL}-"):  # of another adapter
            continue
        try:
            found[path.stem] = stored = read_results(path)
        except RunError as error:
            gaps.append(f"eval/{path.name}: {error.what}")
            continue
        if stored.damage:
            gaps.append(f"eval/{path.name}: {stored.damage}")
    if not found and tasks is None:
        gaps.append(f"no evaluation: mlxtune eval {folder.parent} makes one")
    return found, tasks


def _read_tasks(path: Path, gaps: list[str]) -> Entry | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value["results"], dict):
            return dict(value)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    gaps.append(f"eval/{path.name} cannot be read")
    return None


def _lengths(value: Any) -> Lengths | None:
    if not isinstance(value, dict):
        return None
    edges, counts = value.get("edges"), value.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list)) or len(edges) != len(counts) + 1:
        return None
    if not counts or not all(type(n) is int for n in (*edges, *counts)):
        return None
    return Lengths(tuple(edges), tuple(counts))


def _is_number(value: Any) -> bool:
    # Neither infinite nor an integer that no float holds.
    return type(value) in (int, float) and -1e300 < value < 1e300


def _name(keys: dict[str, str], path: Path) -> str:
    return keys.get("name") or path.resolve().name


def _told_apart(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs of one name get as much of their folders beside it as it takes."""
    names = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({_tail(run, runs)})") if names[run.name] > 1 else run
        for run in runs
    ]


def _tail(run: RunRecord, runs: list[RunRecord]) -> str:
    """The shortest end of a run's path that no other run of its name has."""
    parts = run.path.resolve().parts
    others = [r.path.resolve().parts for r in runs if r is not run and r.name == run.name]
    size = 1
    while any(other[-size:] == parts[-size:] for other in others):
        size += 1
    return "/".join(parts[-size:])
