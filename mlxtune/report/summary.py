"""The few figures by which runs are compared, and how figures are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from mlxtune.evaluate.results import share
from mlxtune.report.charts import GB
from mlxtune.report.collect import RunRecord
from mlxtune.train.outcome import advice_of
from mlxtune.train.run import Run


@dataclass(frozen=True)
class Summary:
    """A run in short; None where it is not known.

    Attributes:
        error: why it failed.
        steps, epochs: done.
        loss: of the last report.
        first_held_out_loss: before training, or the first there is.
        held_out_loss: the last one, which is that of `adapter/`.
        best_held_out_loss, best_step: the lowest, and after how many steps; unless that is 0,
            `adapter-best/` is of then.
        warning: what to say first of `adapter/` where training did not help.
        advice: what to do about that, or where another adapter is better.
        command: that the run was started with.
        started, ended: when, as ISO 8601.
        tokens, examples: seen.
        seconds: spent in training steps.
        seconds_per_step, tokens_per_second, examples_per_second: over the whole run.
        peak_memory_bytes: MLX's peak.
        planned_memory_bytes, planned_seconds_per_step: what was foreseen.
    """

    name: str
    path: str
    status: str
    error: str | None
    steps: int | None
    epochs: float | None
    loss: float | None
    first_held_out_loss: float | None
    held_out_loss: float | None
    best_held_out_loss: float | None
    best_step: int | None
    tokens: int | None
    examples: int | None
    seconds: float | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    examples_per_second: float | None
    peak_memory_bytes: int | None
    planned_memory_bytes: float | None
    planned_seconds_per_step: float | None
    warning: str | None
    advice: str | None
    command: str | None
    started: str | None
    ended: str | None
    gaps: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As `mlxtune report --json` prints it."""
        return asdict(self)


def summarize(run: RunRecord) -> Summary:
    """A run in short."""
    last, found = run.last or {}, run.outcome
    seconds = last.get("seconds")
    return Summary(
        name=run.name,
        path=str(run.path),
        status=run.status,
        error=run.error,
        steps=last.get("step"),
        epochs=last.get("epoch"),
        loss=last.get("loss"),
        first_held_out_loss=run.held_out[0]["held_out_loss"] if run.held_out else None,
        held_out_loss=found.after,
        best_held_out_loss=min(found.losses.values(), default=None),
        best_step=found.best_step,
        tokens=last.get("tokens"),
        examples=last.get("examples"),
        seconds=seconds,
        seconds_per_step=_ratio(seconds, last.get("step")),
        tokens_per_second=_ratio(last.get("tokens"), seconds),
        examples_per_second=_ratio(last.get("examples"), seconds),
        peak_memory_bytes=last.get("peak_memory_bytes"),
        planned_memory_bytes=run.plan.get("peak_memory_bytes"),
        planned_seconds_per_step=run.plan.get("seconds_per_step"),
        warning=found.warning,
        advice=advice_of(Run(run.path)),
        command=_text(run.facts.get("command")),
        started=_text(run.facts.get("started")),
        ended=_text(run.facts.get("ended")),
        gaps=run.gaps,
    )


def loss_text(value: float | None) -> str:
    """Nats."""
    return "–" if value is None else f"{value:.4f}"


def share_text(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else share(value)


def time_text(started: str | None, ended: str | None) -> str:
    """When a run was trained, such as `2026-11-30, 15:20 to 15:24`; empty if not known."""
    begin, end = _time(started), _time(ended)
    if begin is None:
        return ""
    text = f"{begin:%Y-%m-%d, %H:%M}"
    if end is None or end.replace(second=0) == begin.replace(second=0):
        return text
    return f"{text} to {end:{'%H:%M' if end.date() == begin.date() else '%Y-%m-%d, %H:%M'}}"


def gigabytes(value: float | None) -> str:
    """Bytes, less than a GB in MB."""
    if value is None:
        return "–"
    if value >= GB:
        return f"{value / GB:.2f} GB"
    return f"{1000 * value / GB:.{0 if value >= GB / 100 else 1}f} MB"


def rate_text(value: float | None) -> str:
    """So many a second."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _ratio(above: Any, below: Any) -> float | None:
    return above / below if above is not None and below else None
