"""`mlxtune data`: look at records, change their shape, prepare them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli.completing import complete_prep
from mlxtune.cli.output import json_text
from mlxtune.cli.shared import PATH, SET, complete_paths, quieten_libraries
from mlxtune.cli.suggest import NearChoice, Verbs
from mlxtune.errors import DataError

if TYPE_CHECKING:
    from mlxtune.data.sources import Source

_FORMAT = click.option(
    "--format", "format_", default="auto", help="Shape of the input.  [default: by its keys]"
)
_COLUMN = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="FIELD=COLUMN",
    help="What a field of the format is called in the input, such as prompt=question.",
)
SHAPES = ("alpaca", "sharegpt", "messages", "shell")


@click.group(cls=Verbs)
def data() -> None:
    """Look at records, change their shape, prepare them for training."""


@data.command(short_help="Show records as the model sees them.")
@click.argument("recipe", type=PATH)
@SET
@click.option(
    "--rows",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="How many records of each source to show.",
)
@click.option("--row", "chosen", type=click.IntRange(1), help="Show this record.")
@click.option("--ids", is_flag=True, help="Show token ids too.")
@click.option("--json", "as_json", is_flag=True, help="Print figures and rows as JSON.")
def inspect(
    recipe: Path,
    overrides: tuple[str, ...],
    rows: int,
    chosen: int | None,
    ids: bool,
    as_json: bool,
) -> None:
    """Show a recipe's records as the model will see them, and what of them is trained."""
    quieten_libraries()
    from mlxtune.cli.display import status_line
    from mlxtune.cli.inspect import show
    from mlxtune.recipe.load import load_recipe
    from mlxtune.train.inspection import inspect_recipe

    with status_line("tokenizing", every=5.0) as say:
        found = inspect_recipe(
            load_recipe(recipe, overrides),
            rows=rows,
            chosen=chosen,
            progress=lambda path, done: say(f"tokenizing {path}: {done:,} records"),
        )
    if as_json:
        click.echo(json_text(found.as_dict()))
    else:
        show(found, ids=ids)


@data.command()
@click.argument("source", shell_complete=complete_paths)
@click.argument("output", type=PATH)
@click.option("--to", "shape", type=NearChoice(SHAPES), required=True)
@_FORMAT
@_COLUMN
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def convert(
    source: str,
    output: Path,
    shape: str,
    format_: str,
    columns: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Write records in another shape, as JSONL."""
    from mlxtune.data.convert import convert_file

    with _columns_as_options():
        count = convert_file(_source(source, format_, columns), output, shape, overwrite=overwrite)
    click.echo(f"{output}: {count} {shape} records")


@data.command(short_help="Filter, scrub, deduplicate and split records.")
@click.argument("source", shell_complete=complete_paths)
@click.argument("output", type=PATH)
@click.option("--recipe", type=PATH, help="Take [prep] and the seed of this recipe.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of [prep], such as dedup=exact or languages=en,de.",
    shell_complete=complete_prep,
)
@click.option("--scrub", help="Replace these by placeholders: email,ip,phone,card,secret,presidio.")
@click.option("--dedup", type=NearChoice(["off", "exact", "near"]))
@click.option("--val-size", type=float, help="Rows to hold out: a share below 1, or a number.")
@click.option("--group-by", help="Rows with the same value of this field stay on one side.")
@click.option("--against", help="A held-out file that nothing kept may be a near-duplicate of.")
@click.option("--seed", type=click.IntRange(0), help="Of the split.  [default: the recipe's, or 0]")
@_FORMAT
@_COLUMN
@click.option("--overwrite", is_flag=True, help="Replace what this command wrote before.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def prep(
    source: str,
    output: Path,
    recipe: Path | None,
    overrides: tuple[str, ...],
    scrub: str | None,
    dedup: str | None,
    val_size: float | None,
    group_by: str | None,
    against: str | None,
    seed: int | None,
    format_: str,
    columns: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Filter, scrub, deduplicate and split records into the folder OUTPUT.

    The steps are those of the recipe's [prep] table; `mlxtune init` shows them all. The
    input is never changed, and OUTPUT/report.txt says what was.
    """
    from mlxtune.data.sources import Source
    from mlxtune.prep.pipeline import prepare
    from mlxtune.recipe.load import load_prep

    flags: dict[str, Any] = {
        "scrub": scrub and [kind for part in scrub.split(",") if (kind := part.strip())],
        "dedup": dedup,
        "val_size": val_size,
        "group_by": group_by,
    }
    settings, recipe_seed = load_prep(
        recipe, overrides, {k: v for k, v in flags.items() if v is not None}
    )
    with _columns_as_options():
        report = prepare(
            _source(source, format_, columns),
            output,
            settings,
            against=Source(against) if against is not None else None,
            seed=recipe_seed if seed is None else seed,
            overwrite=overwrite,
        )
    if as_json:
        click.echo(json_text(report.as_dict()))
    else:
        click.echo(report.as_text().rstrip())
        click.echo(f"written to {output}")


@contextmanager
def _columns_as_options() -> Iterator[None]:
    """Have a remedy that is a recipe's `columns = {…}` name the option in its place."""
    try:
        yield
    except DataError as error:
        if (found := re.search(r"columns = \{(.*?)\}", error.remedy or "")) and error.remedy:
            pairs = re.findall(r'(\w+) = "(.*?)"', found[1])
            options = " ".join(f"--column {field}={column}" for field, column in pairs)
            error.remedy = error.remedy.replace(found[0], options)
        raise


def _source(path: str, format: str, columns: tuple[str, ...]) -> Source:
    from mlxtune.data.formats import FORMATS
    from mlxtune.data.sources import Source

    if format != "auto" and format not in FORMATS:
        raise click.UsageError(f"--format is one of {', '.join(FORMATS)}")
    mapped = dict(column.partition("=")[::2] for column in columns)
    if not all(mapped.values()):
        raise click.UsageError("--column has the form FIELD=COLUMN")
    return Source(path, format, mapped)
