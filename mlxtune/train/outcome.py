"""Whether training helped, judged by the losses that were measured before and after it.

One rule for all who say it: `mlxtune lora`, `eval`, `fuse`, `export` and the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from mlxtune.train.run import STATUS, Run

# As many digits as losses are printed with: what looks the same is the same.
_DIGITS = 4


def judge(before: float, after: float | None) -> Literal["better", "same", "worse"]:
    """A loss after training against the one before; None and not finite are no numbers."""
    if after is None or not math.isfinite(after):
        return "worse"
    change = round(after, _DIGITS) - round(before, _DIGITS)
    return "same" if change == 0 else "worse" if change > 0 else "better"


def held_out_warning(before: float, after: float | None, end: str = "after training") -> str | None:
    """What to say first of an adapter that did not lower the held-out loss; None if it did.

    Args:
        before, after: mean loss a token; None if it was no number.
        end: when the second was measured, such as `after step 12`.
    """
    told = "no number" if after is None or not math.isfinite(after) else f"{after:.4f}"
    match judge(before, after):
        case "worse":
            return (
                f"the held-out loss is worse than before training: {before:.4f} before, "
                f"{told} {end}"
            )
        case "same":
            return f"the held-out loss has not changed: {told} before training and {end}"
    return None


@dataclass(frozen=True)
class Outcome:
    """What a run's metrics say of the adapters that it left.

    Attributes:
        losses: steps done to the held-out loss then; of 0 is that before training.
        last_step: steps done in all.
        training: mean training loss over the first and the last quarter of the reports;
            None where there are fewer than two.
    """

    losses: dict[int, float]
    last_step: int
    training: tuple[float, float] | None = None

    @property
    def before(self) -> float | None:
        """The held-out loss before training."""
        return self.losses.get(0)

    @property
    def after(self) -> float | None:
        """The held-out loss that was measured last, which is that of `adapter/`."""
        return self.losses[max(self.losses)] if self.losses else None

    @property
    def best_step(self) -> int | None:
        """Steps done when the held-out loss was lowest; `adapter-best/` is of then, but of 0."""
        return min(self.losses, key=lambda step: self.losses[step], default=None)

    @property
    def better_before(self) -> int | None:
        """The step whose adapter, in `adapter-best/`, has a lower loss than `adapter/`."""
        best = self.best_step
        return best if best and best != max(self.losses) else None

    @property
    def warning(self) -> str | None:
        """What to say first of `adapter/` if training did not help; None if it did.

        Without a held-out loss the training loss decides.
        """
        if self.before is not None and max(self.losses):
            return held_out_warning(self.before, self.after, f"after step {max(self.losses)}")
        if self.training is not None and not self.losses:
            first, last = self.training
            if judge(first, last) != "better":
                return (
                    f"the training loss did not fall: {first:.4f} in the first quarter of the "
                    f"run, {last:.4f} in the last"
                )
        return None

    def advice(self, best: Path) -> str | None:
        """What to do where `adapter/` is not the best that there is; None where it is.

        Args:
            best: the folder `adapter-best/`, to name.
        """
        if (step := self.better_before) is not None:
            return (
                f"the held-out loss was lowest after step {step} ({self.losses[step]:.4f}): that "
                f"adapter is in {best}; eval, fuse and export take it with --adapter"
            )
        if self.warning is not None:
            return "train again with a lower train.learning_rate, or look at the records"
        return None


def outcome(metrics: Iterable[Mapping[str, Any]]) -> Outcome:
    """Judge a run by its metrics; what is no finite number in them is passed over.

    Args:
        metrics: objects of metrics.jsonl.
    """
    entries = [entry for entry in metrics if type(entry.get("step")) is int]
    losses = {e["step"]: float(e["held_out_loss"]) for e in entries if _has(e, "held_out_loss")}
    reports = [float(entry["loss"]) for entry in entries if _has(entry, "loss")]
    last = max((entry["step"] for entry in entries), default=0)
    return Outcome(losses, last, _ends(reports))


def advice_of(run: Run) -> str | None:
    """What to do where a run's `adapter/` is not the best that there is; None where it is."""
    found = outcome(run.metrics())
    has_best = found.better_before is None or run.best_adapter.is_dir()
    return found.advice(run.best_adapter) if has_best else None


def outcome_lines(run: Run) -> list[str]:
    """What has to be said of a run's `adapter/` before anything else; nothing if all is well."""
    found, advice = outcome(run.metrics()), advice_of(run)
    if found.warning is not None:
        return [f"warning: {found.warning}", *([f"  {advice}"] if advice else [])]
    return [f"note: {advice}"] if advice else []


def adapter_lines(adapter: Path) -> list[str]:
    """The same of the folder of any adapter, where it is known how it was trained."""
    run = _run_of(adapter)
    return outcome_lines(run) if run is not None and adapter.name == run.adapter.name else []


def adapter_step(adapter: Path) -> int | None:
    """After which step of its run the adapter in a folder was kept; None if it is unknown."""
    run = _run_of(adapter)
    if run is None:
        return None
    found = outcome(run.metrics())
    return (found.last_step if adapter.name == run.adapter.name else found.best_step) or None


def adapter_name(adapter: Path) -> str:
    """An adapter's folder, and after which step of its run it was kept, where that is known."""
    step = adapter_step(adapter)
    return str(adapter) if step is None else f"{adapter} (after step {step})"


def _run_of(adapter: Path) -> Run | None:
    run = Run(adapter.parent)
    own = adapter.name in (run.adapter.name, run.best_adapter.name)
    return run if own and (run.path / STATUS).is_file() else None


def _has(entry: Mapping[str, Any], key: str) -> bool:
    value = entry.get(key)
    return isinstance(value, float | int) and math.isfinite(value)


def _ends(losses: Sequence[float]) -> tuple[float, float] | None:
    quarter = max(1, len(losses) // 4)
    return (fmean(losses[:quarter]), fmean(losses[-quarter:])) if len(losses) > 1 else None
