"""Charts as paths in a square of 1000 by 1000 that the page stretches to any size.

Labels stand beside it as HTML, at percentages, so text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from mlxtune.report.charts import Chart, Curve, smoothed
from mlxtune.report.collect import Lengths

# A curve is drawn with no more points than that, the extremes of each stretch.
MOST_POINTS = 1200
_SIZE = 1000


@dataclass(frozen=True)
class Tick:
    """A label, and how far along its axis it stands, in percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Trace:
    """A curve as it is drawn.

    Attributes:
        curve: what it shows, thinned.
        line: path of the line.
        smooth: path of the smoothed line; empty where the line is enough.
        dots: path of a dot to each value; empty where there are none.
    """

    curve: Curve
    line: str
    smooth: str
    dots: str


@dataclass(frozen=True)
class Picture:
    """A chart as it is drawn.

    Attributes:
        chart: what it shows.
        traces: its curves.
        levels: (what it says, run, place from the top in percent).
        x_ticks, y_ticks: labels of the axes.
        first, last: steps at the ends.
        logarithmic_steps: equal ratios of steps since the first are equally long.
        reports: the most values that a curve has.
        thinned: some of them are not drawn.
    """

    chart: Chart
    traces: tuple[Trace, ...]
    levels: tuple[tuple[str, int, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    first: int
    last: int
    logarithmic_steps: bool
    reports: int
    thinned: bool


@dataclass(frozen=True)
class Axis:
    """From a value to a share of the axis.

    Args:
        low, high: its ends.
        logarithmic: equal ratios are equally long.
    """

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        form: Callable[[float], float] = math.log10 if self.logarithmic else float
        return (form(value) - form(self.low)) / (form(self.high) - form(self.low))

    def ticks(self, count: int) -> list[float]:
        """About so many round values."""
        if self.logarithmic:
            return _decades(self.low, self.high)
        step = nice_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class StepAxis:
    """From a step to a share of the axis.

    Args:
        first, last: its ends.
        logarithmic: equal ratios of steps since the first, that one counted, are equally long.
    """

    first: int
    last: int
    logarithmic: bool

    def share(self, step: int) -> float:
        """0 at the first step, 1 at the last."""
        form: Callable[[float], float] = math.log1p if self.logarithmic else float
        return form(step - self.first) / form(self.last - self.first)

    def ticks(self) -> list[int]:
        """A few round steps."""
        if not self.logarithmic:
            values = Axis(self.first, self.last).ticks(6)
            return [int(value) for value in values if value == int(value)]
        powers = (10**power for power in range(len(str(self.last))))
        return [step for step in powers if self.first <= step <= self.last]


def draw(chart: Chart) -> Picture:
    """Paths and labels of a chart."""
    first = min(curve.steps[0] for curve in chart.curves)
    last = max(first + 1, *(curve.steps[-1] for curve in chart.curves))
    x = StepAxis(first, last, chart.logarithmic_steps)
    y = _value_axis(chart)
    traces = tuple(_trace(curve, chart, x, y) for curve in chart.curves)
    return Picture(
        chart=chart,
        traces=traces,
        levels=tuple(
            (
                f"{level.name} {level.value / chart.scale:.2f} {chart.unit}",
                level.run,
                round(100 * (1 - y.share(level.value / chart.scale)), 3),
            )
            for level in chart.levels
        ),
        x_ticks=tuple(Tick(round(100 * x.share(step), 3), f"{step:,}") for step in x.ticks()),
        y_ticks=_labelled(y),
        first=first,
        last=last,
        logarithmic_steps=chart.logarithmic_steps,
        reports=max(len(curve.values) for curve in chart.curves),
        thinned=any(len(curve.values) > MOST_POINTS for curve in chart.curves),
    )


def nice_step(rough: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))


def tick_label(value: float, step: float, high: float) -> str:
    """A value with the digits that tell it from the next tick, alike along an axis."""
    if value == 0:
        return "0"
    place = math.floor(math.log10(step) + 1e-9)
    if place >= -3 and high < 1e6:
        return f"{value:,.{max(0, -place)}f}"
    size = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa, _, exponent = f"{value:.{max(0, size - place)}e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def bars(lengths: Lengths) -> tuple[str, tuple[Tick, ...], tuple[Tick, ...]]:
    """A histogram: path, and labels of both axes."""
    x = Axis(lengths.edges[0], lengths.edges[-1])
    y = Axis(0, max(1, *lengths.counts) * 1.05)
    path = []
    for left, right, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        if count:
            a, b = _SIZE * x.share(left), _SIZE * x.share(right)
            top = _SIZE * (1 - y.share(count))
            path.append(f"M{a:.1f} {_SIZE}V{top:.1f}H{b:.1f}V{_SIZE}Z")
    x_ticks = [Tick(round(100 * x.share(v), 3), f"{v:,.0f}") for v in x.ticks(6)]
    return "".join(path), tuple(x_ticks), _labelled(y, whole=True)


def _value_axis(chart: Chart) -> Axis:
    values = [v / chart.scale for curve in chart.curves for v in curve.values]
    values += [level.value / chart.scale for level in chart.levels]
    low, high = min(values), max(values)
    if chart.logarithmic:
        return Axis(low / 1.2, high * 1.2, logarithmic=True)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    # Where zero is near, it is shown: curves are to be compared by their height too.
    if chart.from_zero or 0 <= low < 0.4 * high:
        return Axis(min(low, 0.0), high + (room if high > 0 else 1.0))
    return Axis(low - room, high + room)


def _labelled(axis: Axis, *, whole: bool = False) -> tuple[Tick, ...]:
    values = [v for v in axis.ticks(5) if not whole or v == int(v)]
    step = values[1] - values[0] if len(values) > 1 else axis.high - axis.low
    return tuple(
        Tick(
            round(100 * (1 - axis.share(value)), 3),
            f"{value:g}" if axis.logarithmic else tick_label(round(value, 12), step, axis.high),
        )
        for value in values
    )


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them where that leaves few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]


def _trace(curve: Curve, chart: Chart, x: StepAxis, y: Axis) -> Trace:
    def points(steps: Sequence[int], values: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (_SIZE * x.share(step), _SIZE * (1 - y.share(value / chart.scale)))
            for step, value in zip(steps, values, strict=True)
        ]

    smooth = ""
    if chart.is_smoothed(curve):
        kept = _ends(curve.steps, x, MOST_POINTS // 4)
        means = smoothed(curve.values)
        smooth = _line(points([curve.steps[i] for i in kept], [means[i] for i in kept]))
    kept = _extremes(curve, x, MOST_POINTS)
    steps, values = [curve.steps[i] for i in kept], [curve.values[i] for i in kept]
    thin = Curve(curve.name, curve.run, curve.key, tuple(steps), tuple(values), curve.measured)
    drawn = points(steps, values)
    # A line of no length with round ends is a dot that the stretching leaves round.
    alone = curve.measured or len(drawn) == 1
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in drawn) if alone else ""
    return Trace(thin, _line(drawn), smooth, dots)


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _stretches(steps: Sequence[int], x: StepAxis, most: int) -> list[list[int]]:
    """Numbers of the steps, those together that fall on the same of `most` parts of the axis."""
    parts = groupby(range(len(steps)), key=lambda i: int(most * x.share(steps[i])))
    return [list(part) for _, part in parts]


def _ends(steps: Sequence[int], x: StepAxis, most: int) -> list[int]:
    """The last of each stretch, and the first of all."""
    return sorted({0, *(part[-1] for part in _stretches(steps, x, most))})


def _extremes(curve: Curve, x: StepAxis, most: int) -> list[int]:
    """Where the lowest and highest of each stretch are, no more than `most` in all."""
    values = curve.values
    if len(values) <= most:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for part in _stretches(curve.steps, x, most // 2 - 2):
        kept |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return sorted(kept)
