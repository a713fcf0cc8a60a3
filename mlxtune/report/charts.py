"""Which curves a report has, for the page and for the picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mlxtune.recipe.objectives import MEANINGS
from mlxtune.report.collect import Entry, RunRecord, numbers

GB = 1e9
# Fewer values than that are drawn as they are.
_ENOUGH_TO_SMOOTH = 50
# Where the longest run has more than so many times the steps of the shortest, the shortest
# would be a line upwards.
_LENGTHS = 20
# Above this many times the median, the largest value would flatten all others.
_SPREAD = 20


@dataclass(frozen=True)
class Curve:
    """One figure of one run over its steps.

    Attributes:
        name: of the figure.
        run: number of the run.
        key: of metrics.jsonl.
        steps, values: as they were reported.
        measured: seldom and for itself, so each value gets a dot.
    """

    name: str
    run: int
    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    measured: bool = False


@dataclass(frozen=True)
class Level:
    """A value that does not change, as a line across."""

    name: str
    run: int
    value: float


@dataclass(frozen=True)
class Chart:
    """Curves over steps.

    Attributes:
        key: a short name.
        title: what it shows.
        unit: of the values, once divided by `scale`.
        meaning: what that is, for who sees it for the first time.
        curves: of all runs.
        levels: lines across.
        scale: values are divided by it.
        from_zero: the axis begins there.
        logarithmic: the axis has equal ratios.
        smooth: neighbouring values are much unlike, so a smoothed curve is drawn too.
        logarithmic_steps: the runs are of very unlike lengths, so steps have equal ratios.
    """

    key: str
    title: str
    unit: str
    meaning: str
    curves: tuple[Curve, ...]
    levels: tuple[Level, ...] = ()
    scale: float = 1.0
    from_zero: bool = False
    logarithmic: bool = False
    smooth: bool = False
    logarithmic_steps: bool = False

    def is_smoothed(self, curve: Curve) -> bool:
        """Whether a smoothed curve is drawn beside this one."""
        return self.smooth and not curve.measured and len(curve.values) >= _ENOUGH_TO_SMOOTH


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The charts that the runs have figures for."""
    norms = _curves(runs, "grad_norm", "gradient norm")
    meanings: dict[str, str] = {}
    for run in runs:
        meanings |= MEANINGS.get(run.keys.get("objective", ""), {})
    per_token = "mean cross-entropy per token, in nats; lower is better"
    said = "How badly the model predicts the answers, token by token; 0 is perfect."
    found = [
        Chart(
            "loss",
            "Loss",
            "lower is better" if "loss" in meanings else per_token,
            f"{meanings.get('loss', said)} Training: "
            "on the records it learns from, while it does. Held-out: on records it never learns "
            "from, which shows whether what it learned holds for others too.",
            _of_both(runs, "loss"),
            smooth=True,
        ),
        *(
            Chart(key, _title(key), "", meanings.get(key, ""), _of_both(runs, key), smooth=True)
            for key in _own_figures(runs)
        ),
        Chart(
            "learning_rate",
            "Learning rate",
            "",
            "How far each step may move the adapter.",
            _curves(runs, "learning_rate", "learning rate"),
        ),
        Chart(
            "grad_norm",
            "Gradient norm",
            "before it is clipped",
            "How strongly the records of a step pull at the adapter. Sudden jumps are a sign of "
            "unstable training.",
            norms,
            logarithmic=_is_spread(norms),
            from_zero=not _is_spread(norms),
            smooth=True,
        ),
        Chart(
            "tokens_per_second",
            "Throughput",
            "tokens per second",
            "How fast training went.",
            _curves(runs, "tokens_per_second", "throughput"),
            from_zero=True,
            smooth=True,
        ),
        Chart(
            "peak_memory_bytes",
            "Peak memory",
            "GB",
            "The most memory that MLX had in use up to each step.",
            _curves(runs, "peak_memory_bytes", "measured"),
            _plans(runs),
            scale=GB,
            from_zero=True,
        ),
    ]
    lasts = [run.last["step"] for run in runs if run.last is not None]
    unlike = max(lasts, default=0) > _LENGTHS * max(1, min(lasts, default=0))
    return [replace(chart, logarithmic_steps=unlike) for chart in found if chart.curves]


def _own_figures(runs: Sequence[RunRecord]) -> list[str]:
    """Figures that objectives report beside the loss: their names have a slash in them."""
    found = dict.fromkeys(key for run in runs for entry in run.reports for key in entry)
    return [key for key in found if "/" in key]


def _title(key: str) -> str:
    """`Rewards: margins` for `rewards/margins`."""
    group, _, name = key.partition("/")
    return f"{group.capitalize()}: {name}"


def _of_both(runs: Sequence[RunRecord], key: str) -> tuple[Curve, ...]:
    """A figure on the records that are trained on, and on those that are held out."""
    return _curves(runs, key, "training") + _curves(runs, f"held_out_{key}", "held-out")


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a twentieth of the values, half of them before, half after each one.

    Means of those before alone would lag behind values that fall. Towards the beginning,
    where they fall fastest, fewer are taken, down to the first alone.
    """
    sums = [0.0, *accumulate(values)]
    most = len(values) // 40
    means = []
    for place in range(len(values)):
        reach = min(most, place // 2)
        start, end = place - reach, min(len(values), place + reach + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _curves(runs: Sequence[RunRecord], key: str, name: str) -> tuple[Curve, ...]:
    held_out = key.startswith("held_out_")
    found = []
    for number, run in enumerate(runs):
        entries: Sequence[Entry] = run.held_out if held_out else run.reports
        steps, values = numbers(entries, key)
        if steps:
            found.append(Curve(name, number, key, steps, values, measured=held_out))
    return tuple(found)


def _plans(runs: Sequence[RunRecord]) -> tuple[Level, ...]:
    key = "peak_memory_bytes"
    return tuple(
        Level("planned", n, run.plan[key]) for n, run in enumerate(runs) if key in run.plan
    )


def _is_spread(curves: Sequence[Curve]) -> bool:
    values = [value for curve in curves for value in curve.values]
    return bool(values) and min(values) > 0 and max(values) > _SPREAD * statistics.median(values)
