"""`mlxtune report`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlxtune.cli.shared import PATH


@click.command()
@click.argument("runs", metavar="RUN...", type=PATH, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="The page.  [default: RUN/report.html, of several runs report.html]",
)
@click.option("--png", type=PATH, help="Write the curves as a picture too.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print the runs' figures as JSON.")
def report(
    runs: tuple[Path, ...], output: Path | None, png: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Write an HTML page of one run, or of several over each other.

    Curves, evaluation, samples, recipe. The page needs no network. RUN/report.html is
    replaced; any other file only with --overwrite.
    """
    from mlxtune.report.collect import collect_readable
    from mlxtune.report.summary import summarize
    from mlxtune.report.write import place_of, write_report

    records, lost = collect_readable(runs)
    if png is not None and png.resolve() == place_of(records, output, lost).resolve():
        raise click.UsageError(f"--png {png} is the page's own file: name another for the picture")
    written = write_report(records, output, lost=lost, png=png, overwrite=overwrite)
    for run in lost:
        click.echo(f"note: {run.path} is left out: {run.error.what}", err=True)
    if as_json:
        found = [summarize(record).as_json() for record in records]
        missing = {str(run.path): run.error.what for run in lost}
        value = {"files": [str(path) for path in written], "runs": found, "missing": missing}
        click.echo(json.dumps(value, indent=2))
        return
    for record in records:
        for gap in record.gaps:
            click.echo(f"note: {record.name}: {gap}", err=True)
    for path in written:
        click.echo(path)
