"""An evaluation as JSON and on disk."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlxtune
from mlxtune.errors import RunError
from mlxtune.files import atomic_files, write_json, write_text
from mlxtune.train.outcome import held_out_warning

if TYPE_CHECKING:
    # What was kept is read without MLX.
    from mlxtune.evaluate.comparison import Answered, Comparison, Figures, Source

# What people call the metrics.
METRIC_NAMES = {
    "exact": "exact match",
    "f1": "token F1",
    "edit": "edit similarity",
    "bash": "parses (bash)",
    "dash": "parses (dash)",
    "programs": "same programs",
    "flags": "same flags",
    "shell": "shell score",
    "output": "same output",
    "chosen_likelier": "chosen side likelier",
    "preference": "preference accuracy",
}
# What the figures mean, for who sees them for the first time.
FIGURE_MEANINGS = {
    "held_out_loss": "how badly the expected answers are predicted, per token; lower is better",
    "perplexity": "among how many tokens the model seems to guess; lower is better",
    "bits_per_byte": "the loss per byte of text: comparable between tokenizers; lower is better",
    "general_loss": "the loss on general text; where it rises, something was forgotten",
    "exact": "answers that are the expected text",
    "normalised": "the same, but for white space",
    "f1": "words in common with the expected answer",
    "edit": "characters in common with the expected answer",
    "bash": "answers that bash can read as a command",
    "dash": "answers that dash can read as a command",
    "programs": "answers that call the same programs",
    "flags": "and with the same flags",
    "shell": "how much of the command is the same",
    "output": "answers that print the same when they are run",
    "judge": "grade by another model",
    "chosen_likelier": "pairs whose chosen side is more likely than the rejected one",
    "preference": "pairs whose chosen side gained on the rejected one, next to the base",
}
# Nats a token, or made of them.
LOSSES = ("held_out_loss", "perplexity", "bits_per_byte", "general_loss")

LM_EVAL = "lm-eval"


@dataclass(frozen=True)
class Stored:
    """An evaluation as `write_results` left it.

    Attributes:
        figures: of `<suite>.json`.
        answers: objects of `<suite>.jsonl`, up to the first line that is none.
        damage: what is wrong with the answers; empty if nothing is.
    """

    figures: dict[str, Any]
    answers: tuple[dict[str, Any], ...]
    damage: str = ""


def read_results(path: Path) -> Stored:
    """Read `<suite>.json` and the answers beside it.

    Args:
        path: the file of figures.

    Raises:
        RunError: it is damaged, or no evaluation.
    """
    remedy = "`mlxtune eval` writes it anew"
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"the evaluation cannot be read: {error}", where=str(path), remedy=remedy
        ) from None
    if not _is_evaluation(figures):
        raise RunError("this is no evaluation", where=str(path), remedy=remedy)
    return Stored(figures, *_read_answers(path.with_suffix(".jsonl")))


def _is_evaluation(figures: Any) -> bool:
    if not isinstance(figures, dict) or not isinstance(figures.get("categories", {}), dict):
        return False
    targets = figures.get("targets")
    if not isinstance(targets, dict) or not targets:
        return False
    return all(isinstance(t, dict) and _has_metrics(t) for t in targets.values())


def _has_metrics(figures: dict[str, Any]) -> bool:
    metrics, gains = figures.get("metrics"), figures.get("gains") or {}
    if not isinstance(metrics, dict) or not isinstance(gains, dict):
        return False
    if not all(_is_number(figures[key]) for key in LOSSES if figures.get(key) is not None):
        return False
    intervals = (*metrics.values(), *gains.values(), figures.get("loss_interval"))
    return all(i is None or _is_interval(i) for i in intervals)


def _is_interval(value: Any) -> bool:
    parts = ("mean", "low", "high", "count")
    return isinstance(value, dict) and all(_is_number(value.get(part)) for part in parts)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _read_answers(path: Path) -> tuple[tuple[dict[str, Any], ...], str]:
    """Answers, and what is wrong with them."""
    try:
        # Not splitlines: what a model said may hold other ends of lines than ours.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        return (), f"{path.name} {reason}"
    answers: list[dict[str, Any]] = []
    for number, line in enumerate(filter(None, lines), start=1):
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        texts = isinstance(answer, dict) and isinstance(answer.get("said"), dict)
        if not texts or not {"prompt", "expected"} <= answer.keys():
            return tuple(answers), f"line {number} of {path.name} is damaged"
        answers.append(answer)
    return tuple(answers), ""


def as_json(result: Comparison) -> dict[str, Any]:
    """Figures and answers."""
    return figures_json(result) | {"answers": [answer_json(a) for a in result.answers]}


def figures_json(result: Comparison) -> dict[str, Any]:
    """Figures without the answers; `base` and `tuned` in short where there are any."""
    short = {
        name: {"held_out_loss": _finite(f.held_out_loss), "exact_match": f.exact_match}
        for name, f in result.figures.items()
        if name in ("base", "tuned")
    }
    # Of answers; preferences are of pairs, and have no answers to put into categories.
    metrics = list(next(iter(result.answers[0].scores.values()))) if result.answers else []
    return {
        "version": mlxtune.__version__,
        "run": result.subject,
        "suite": result.suite,
        "records": result.records,
        **_source(result.source),
        **short,
        "targets": {name: _target(figures) for name, figures in result.figures.items()},
        "categories": {
            metric: {
                category: {"records": count, **dict(zip(result.figures, means, strict=True))}
                for category, (count, *means) in result.by_category(metric).items()
            }
            for metric in metrics
        },
        "judge": result.judge,
        "shells": result.shells,
        "notes": list(result.notes),
    }


def _source(source: Source) -> dict[str, Any]:
    """As JSON; `tuned` has figures there."""
    values = asdict(source)
    return values | {"tuned_adapter": values.pop("tuned")}


def _target(figures: Figures) -> dict[str, Any]:
    """One model's figures. JSON has no NaN and no infinity: a loss that is one becomes null."""
    values = asdict(figures)
    for key in LOSSES:
        values[key] = _finite(values[key])
    if values["held_out_loss"] is None:
        values["loss_interval"] = None
    return values


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def answer_json(answer: Answered) -> dict[str, Any]:
    """One line of the answers' file."""
    return asdict(answer)


def write_results(result: Comparison, folder: Path) -> tuple[Path, Path]:
    """Write `<suite>.json` with the figures and `<suite>.jsonl` with every answer.

    What is measured on other data than the suite's, on some of it, with another adapter than
    the run's, with answers cut off elsewhere, with other models beside it or with answers run
    says so in its name too, so that it neither passes for the run's own nor takes its place.
    Both files appear when both are whole; what an earlier evaluation of that name left is
    replaced.

    Raises:
        StorageError: the disk refuses them.
    """
    figures, answers = (folder / f"{_stem(result)}.{kind}" for kind in ("json", "jsonl"))
    lines = [json.dumps(answer_json(a), ensure_ascii=False) + "\n" for a in result.answers]
    with atomic_files(figures, overwrite=True) as temporary:
        # Surrogates that a model may spell have no UTF-8.
        text = "".join(lines).encode("utf-8", "replace").decode()
        write_text(temporary / answers.name, text)
        write_text(temporary / figures.name, json.dumps(figures_json(result), indent=2) + "\n")
    return figures, answers


def write_tasks(
    result: dict[str, Any], folder: Path, *, limit: int | None, adapter: Path | None
) -> Path:
    """Write what `run_tasks` measured to `lm-eval.json`, beside what it has of other tasks.

    Figures of another adapter than the run's have a file of their own, named after it. How
    each task was measured is kept under `measured`.

    Raises:
        StorageError: the disk refuses it.
    """
    path = folder / f"{_joined(LM_EVAL, [] if adapter is None else [adapter.resolve().name])}.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept, how = dict(before["results"]), dict(before.get("measured") or {})
    except (OSError, ValueError, KeyError, TypeError):
        kept, how = {}, {}
    of = {"lm_eval": result["lm_eval"], "limit": limit, "adapter": str(adapter or "") or None}
    results = kept | result["results"]
    measured = how | dict.fromkeys(result["results"], of)
    with atomic_files(path, overwrite=True) as temporary:
        write_json(temporary / path.name, result | {"results": results, "measured": measured})
    return path


def _stem(result: Comparison) -> str:
    source = result.source
    others = [] if source.own else [Path(path).stem for path in source.data]
    if source.adapter is not None:
        others.append(Path(source.adapter).resolve().name)
    if source.limit is not None:
        others.append(f"first-{source.limit}")
    if source.max_tokens is not None:
        others.append(f"tokens-{source.max_tokens}")
    if source.models:
        others.append("-".join(["with", *sorted(source.models)]))
    if source.executed:
        others.append("executed")
    return _joined(result.suite, others)


def _joined(name: str, others: list[str]) -> str:
    # As names of suites are.
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9._-]+", "_", other) for other in others)])


def described(figures: dict[str, Any]) -> str:
    """Which records an evaluation is of, such as `the first 28 records of other.jsonl`.

    Args:
        figures: what `figures_json` made.
    """
    count, data, limit = figures.get("records", "?"), figures.get("data"), figures.get("limit")
    kind = "records" if data else "held-out records"
    if limit is None:
        text = f"{count} {kind}"
    else:
        text = (
            f"the first {count} {kind}"
            if limit == count
            else f"{count} of the first {limit} {kind}"
        )
    if data:
        text += " of " + ", ".join(Path(path).name for path in data)
    if cut := figures.get("max_tokens"):
        text += f", answers cut off at {cut} tokens"
    return text + (f", adapter {figures['adapter']}" if figures.get("adapter") else "")


def is_short(figures: dict[str, Any]) -> bool:
    """Whether an evaluation is of some records only, of answers cut off, or of another adapter.

    Args:
        figures: what `figures_json` made.
    """
    return any(figures.get(key) is not None for key in ("limit", "max_tokens", "adapter"))


def share(value: float, *, digits: int = 1, signed: bool = False) -> str:
    """A share in percent; never minus zero, which looks like a loss."""
    text = f"{value:{'+' if signed else ''}.{digits}%}"
    return text.lstrip("+-") if not any(c in "123456789" for c in text) else text


def first_words(figures: dict[str, Any]) -> list[tuple[str, bool]]:
    """What to read first of an evaluation, a line each, and whether it is a warning.

    A warning where the adapter did not lower the loss; then each model against the first one:
    its loss, and the suite's first metric, whichever way they turned out.

    Args:
        figures: what `figures_json` made.
    """
    targets = figures["targets"]
    lines = []
    if {"base", "tuned"} <= targets.keys():
        before, after = (targets[name].get("held_out_loss") for name in ("base", "tuned"))
        if before is not None and (told := held_out_warning(before, after)) is not None:
            lines.append((told, True))
    first, *others = targets
    return [*lines, *((_against(first, name, targets), False) for name in others)]


def _against(first: str, name: str, targets: dict[str, Any]) -> str:
    """A model against the first one."""
    old, new = targets[first], targets[name]
    losses = (_loss_text(figures.get("held_out_loss")) for figures in (old, new))
    text = f"{first} → {name}: held-out loss {' → '.join(losses)}"
    gains = new.get("gains") or {}
    metric = next((metric for metric, gain in gains.items() if gain is not None), None)
    if metric is None or not (old["metrics"].get(metric) and new["metrics"].get(metric)):
        return text
    label, gain = METRIC_NAMES.get(metric, metric), gains[metric]
    before, after = (figures["metrics"][metric]["mean"] for figures in (old, new))
    if gain["low"] == gain["high"] == 0:
        return f"{text}; {label} {share(before)} with both"
    change, low, high = (
        share(gain[key], signed=True).removesuffix("%") for key in ("mean", "low", "high")
    )
    return (
        f"{text}; {label} {share(before)} → {share(after)} ({change} points, 95% interval "
        f"{low} to {high})"
    )


def _loss_text(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"


def which_models(figures: dict[str, Any]) -> str:
    """Which models the columns of an evaluation are; nothing of a model alone."""
    names = figures["targets"]
    if not {"base", "tuned"} <= names.keys():
        return ""
    adapter = figures.get("tuned_adapter") or "the run's adapter"
    others = figures.get("models")
    known = others.items() if isinstance(others, dict) else ()
    told = {"base": "the model before training", "tuned": f"the same with {adapter}", **dict(known)}
    return "; ".join(f"{name}: {told[name]}" for name in names if name in told)


def shells_line(figures: dict[str, Any]) -> str:
    """Which versions of the shells say what parses; nothing where none says its own.

    Args:
        figures: what `figures_json` made.
    """
    shells = figures.get("shells")
    if not isinstance(shells, dict) or not shells:
        return ""
    return "parses: according to " + ", ".join(f"{name} {said}" for name, said in shells.items())


def judge_line(judge: dict[str, Any]) -> str:
    """What the judge did and what it cost.

    Args:
        judge: what `Judge.report` gives.
    """
    known = {key: judge.get(key, "?") for key in ("model", "answers", "graded", "from_cache")}
    cost = judge.get("cost")
    return (
        f"judge {known['model']}: {known['graded']} of {known['answers']} answers graded, "
        f"{known['from_cache']} from the cache, {judge.get('prompt_tokens', '?')} + "
        f"{judge.get('completion_tokens', '?')} tokens"
        + (f", cost {cost:.4g}" if _is_number(cost) and cost else "")
    )


def task_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Task, metric, value and standard error of lm-eval's figures, a row each.

    Args:
        results: `results` of what `run_tasks` returns.
    """
    rows = []
    for task, figures in results.items():
        for metric, value in figures.items() if isinstance(figures, dict) else ():
            name, _, kind = metric.partition(",")
            if name.endswith("_stderr") or not isinstance(value, float):
                continue
            error = figures.get(f"{name}_stderr,{kind}")
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            label = name if kind in ("none", "") else f"{name} ({kind})"
            rows.append((task, label, f"{value:.4f}", spread))
    return rows
