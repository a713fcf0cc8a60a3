"""`mlxtune bench`: what this machine reaches, beside what was planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxtune.cli.shared import PATH, prepare

if TYPE_CHECKING:
    from rich.table import Table

    from mlxtune.bench.results import Figures


@click.command()
@click.option(
    "--folder",
    type=PATH,
    default="benchmarks",
    show_default=True,
    help="Where results/ is, and the page with all machines.",
)
@click.option("--all", "everything", is_flag=True, help="Workloads too that take minutes a step.")
@click.option("--compare", is_flag=True, help="Measure nothing; renew the page's tables.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(folder: Path, everything: bool, compare: bool, as_json: bool) -> None:
    """Measure this machine: products, attention, and training at several model sizes.

    Weights are random and nothing is downloaded. The figures are kept in
    FOLDER/results/bench-DEVICE.json.
    """
    if compare and (everything or as_json):
        other = "--all" if everything else "--json"
        raise click.UsageError(f"--compare measures nothing: {other} has no effect with it")
    from mlxtune.bench.results import remember_figures, require_folder, write_figures

    results = folder / "results"
    if not compare:
        require_folder(results)
    prepare(long=True)
    from mlxtune.bench.compare import renew
    from mlxtune.bench.machine import this_machine
    from mlxtune.bench.measure import measure_machine

    if compare:
        click.echo(f"{renew(folder)}: tables renewed")
        return

    machine = this_machine(progress=lambda what: click.echo(what, err=True))

    def progress(what: str) -> None:
        click.echo(f"measuring {what}", err=True)

    figures = measure_machine(machine, everything=everything, progress=progress)
    # Shown before they are kept: the disk may have filled up meanwhile.
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        show(figures)
    path = write_figures(figures, results)
    remember_figures(figures)
    if not as_json:
        click.echo(f"{path}: written")


def show(figures: Figures) -> None:
    """What was measured, in a terminal of any width."""
    from rich.console import Console

    console = Console()
    table = _table(figures)
    unlimited = console.options.update(width=1000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
    else:
        console.print(figures["device"], style="italic", highlight=False, markup=False)
        for row in measured_rows(figures):
            console.print(_block(row), highlight=False, markup=False)
    click.echo(rates_text(figures["rates"]))
    for row in figures["workloads"]:
        if "left_out" in row:
            click.echo(f"left out: {row['workload']}: {row['left_out']}")


def measured_rows(figures: Figures) -> list[Figures]:
    """Of the workloads that were run."""
    return [row for row in figures["workloads"] if "left_out" not in row]


def _table(figures: Figures) -> Table:
    from rich.table import Table

    table = Table(title=figures["device"])
    for column in ("workload", "tokens/s", "step", "planned", "peak", "planned", "MFU"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for row in measured_rows(figures):
        table.add_row(row["workload"], *_cells(row))
    return table


def _block(row: Figures) -> str:
    """A workload's row as a few lines, where a table is too wide."""
    speed, step, planned_step, peak, planned_peak, utilisation = _cells(row)
    return (
        f"{row['workload']}\n  {speed} tokens/s, MFU {utilisation}\n"
        f"  step {step}, planned {planned_step}\n  peak {peak}, planned {planned_peak}"
    )


def _cells(row: Figures) -> tuple[str, ...]:
    return (
        f"{row['tokens_per_second']:.0f}",
        f"{row['seconds']:.2f} s",
        f"{row['planned_seconds']:.2f} s",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
        f"{row['planned_peak_bytes'] / 1e9:.2f} GB",
        f"{row['model_flops_utilisation']:.0%}",
    )


def rates_text(rates: Figures) -> str:
    """What the machine does, without a model: best product, packed products, attention."""
    best, packed = max(rates["products"].values()), rates["packed_products"]
    return (
        f"products {_flops(best)}  attention {_flops(rates['attention'])}"
        f"  memory {rates['bytes'] / 1e9:.1f} GB/s\n4-bit products: "
        + "  ".join(f"{rows} rows {_flops(rate)}" for rows, rate in packed.items())
    )


def _flops(rate: float) -> str:
    """A rate as people write it: 352 GFLOP/s."""
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"
