"""The curves of a report as a picture, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from mlxtune.errors import MlxtuneError, RunError
from mlxtune.install import install_extra
from mlxtune.report.charts import Chart, charts, smoothed
from mlxtune.report.collect import RunRecord

_COLOURS = (
    "#2563eb", "#d9730d", "#0d9267", "#9333ea", "#dc2626", "#0891b2", "#c026a3", "#6b8e0a",
)  # fmt: skip
# Of a run, in the legend.
_LONGEST_NAME = 40


def curves_png(runs: Sequence[RunRecord]) -> bytes:
    """A PNG of the page's charts, 1,800 pixels wide.

    Raises:
        MlxtuneError: matplotlib is not installed.
        RunError: the runs have reported nothing.
    """
    shown = charts(runs)
    if not shown:
        raise RunError(
            "there are no figures to draw",
            where=", ".join(str(run.path) for run in runs),
            remedy="leave --png out: the page says what is missing",
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MlxtuneError(
            "a picture needs matplotlib", where="--png", remedy=install_extra("report")
        ) from None
    rows = 1 + len(shown) // 2
    figure = Figure(figsize=(12, 3.2 * rows), dpi=150, layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    for place, chart in enumerate(shown):
        # The first, which is the loss where there is one, over both columns.
        spot = grid[0, :] if place == 0 else grid[1 + (place - 1) // 2, (place - 1) % 2]
        _draw(figure.add_subplot(spot), chart, runs, legend=place == 0)
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _draw(axes: Any, chart: Chart, runs: Sequence[RunRecord], *, legend: bool) -> None:
    for curve in chart.curves:
        second = curve.measured and len(runs) == 1
        name = runs[curve.run].name
        name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        label = curve.name if len(runs) == 1 else f"{name}, {curve.name}"
        label = label.replace("$", r"\$")  # what is between two would be a formula
        colour = _COLOURS[(curve.run + second) % len(_COLOURS)]
        values = [value / chart.scale for value in curve.values]
        if chart.is_smoothed(curve):
            axes.plot(curve.steps, values, color=colour, linewidth=0.8, alpha=0.3)
            values = smoothed(values)
        axes.plot(
            curve.steps,
            values,
            color=colour,
            linestyle=":" if curve.measured else "-",
            marker="o" if curve.measured or len(curve.values) == 1 else None,
            markersize=4,
            linewidth=1.4,
            label=label,
        )
    plans = [
        axes.axhline(
            level.value / chart.scale,
            color=_COLOURS[level.run % len(_COLOURS)],
            linestyle="--",
            linewidth=1,
            label=level.name,
        )
        for level in chart.levels
    ]
    if chart.logarithmic_steps:
        axes.set_xscale("symlog", linthresh=1)  # there is a step 0
        first = min(curve.steps[0] for curve in chart.curves)
        axes.set_xlim(first, 1.2 * max(curve.steps[-1] for curve in chart.curves))
    if chart.logarithmic:
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)
    elif plans:
        axes.legend(handles=plans[:1], frameon=False, fontsize=9)
