"""Tables of all machines: what was measured, and what is expected of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxtune.bench.chips import CHIPS, Chip
from mlxtune.bench.cost import Rates
from mlxtune.bench.machine import published_rates
from mlxtune.bench.results import Figures, file_name, machine_name, rates_of, read_figures
from mlxtune.bench.workloads import WORKLOADS, Bench
from mlxtune.device import as_on_gpu
from mlxtune.errors import RunError
from mlxtune.files import write_text

BEGIN, END = "<!-- mlxtune bench: begin -->", "<!-- mlxtune bench: end -->"
# Of which a Mac's owner will ask.
_EXPECTED = ("Qwen3-0.6B, 8 pairs", "Llama-3.2-1B, 8 pairs", "Mistral-7B, 4 bits, 8 pairs")


def tables(figures: Sequence[Figures]) -> str:
    """Markdown: the measured table, and the estimated one apart from it."""
    return f"{_measured(figures)}\n\n{_expected(figures)}"


def renewed(page: str, figures: Sequence[Figures], *, where: str) -> str:
    """A page with the tables between its two marks.

    Raises:
        RunError: the marks are not there.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise RunError(
            "there is no place for the tables in it", where=where, remedy=f"add {BEGIN} and {END}"
        )
    return f"{head}{BEGIN}\n{tables(figures)}\n{END}{tail}"


def renew(folder: Path) -> Path:
    """Write the tables of `folder/results` into `folder/README.md`.

    Raises:
        RunError: there is no such page, or no place in it.
    """
    page = folder / "README.md"
    if not page.is_file():
        raise RunError(
            "there is no such page",
            where=str(page),
            remedy="run it in a checkout of mlxtune, or name the folder with --folder",
        )
    figures = read_figures(folder / "results")
    write_text(page, renewed(page.read_text(encoding="utf-8"), figures, where=str(page)))
    return page


def _measured(figures: Sequence[Figures]) -> str:
    lines = [
        "Measured:",
        "",
        "| machine | workload | tokens/s | examples/s | step | planned | peak | planned "
        "| of product rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for machine in figures:
        for row in machine["workloads"]:
            if "left_out" in row:
                continue
            lines.append(
                f"| {machine_name(machine)} | {row['workload']} | {row['tokens_per_second']:.0f} "
                f"| {row['examples_per_second']:.2f} | {row['seconds']:.2f} s "
                f"| {row['planned_seconds']:.2f} s | {row['peak_bytes'] / 1e9:.2f} GB "
                f"| {row['planned_peak_bytes'] / 1e9:.2f} GB "
                f"| {row['model_flops_utilisation']:.0%} |"
            )
    return "\n".join(lines)


def _expected(figures: Sequence[Figures]) -> str:
    """What was measured takes the place of its estimate; what a machine left out does not."""
    lines = [
        "Estimated, and measured by nobody: tokens/s from each chip's published rates "
        "(`mlxtune plan --chip`); chips of which no rate of products is published are left out:",
        "",
        f"| chip | {' | '.join(_EXPECTED)} |",
        "|---|" + "---|" * len(_EXPECTED),
    ]
    measured = {machine_name(each): each for each in figures}
    chips = {str(chip): rates for chip in CHIPS if (rates := _rates(chip, measured))}
    columns = []
    with as_on_gpu():
        for name in _EXPECTED:
            [workload] = [w for w in WORKLOADS if w.name == name]
            bench = Bench(workload)
            seconds = bench.seconds_at(list(chips.values()))
            columns.append([f"{workload.tokens / s:,.0f}" for s in seconds])
    for number, chip in enumerate(chips):
        rows = {row["workload"]: row for row in measured.get(chip, {}).get("workloads", ())}
        if rows and not any("left_out" in rows.get(name, ()) for name in _EXPECTED):
            continue
        cells = [
            "measured" if name in rows and "left_out" not in rows[name] else column[number]
            for name, column in zip(_EXPECTED, columns, strict=True)
        ]
        lines.append(f"| {chip} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rates(chip: Chip, measured: Mapping[str, Figures]) -> Rates | None:
    """What is known of a chip: measured rates before published ones."""
    if (own := measured.get(str(chip))) is not None:
        return rates_of(own, where=Path(file_name(str(chip))))
    return published_rates(chip)
