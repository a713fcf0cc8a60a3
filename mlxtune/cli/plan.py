"""`mlxtune plan`: memory and time of a recipe before it is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.bench.words import beyond_line, plan_lines
from mlxtune.cli.shared import PATH, SET, prepare

if TYPE_CHECKING:
    from mlxtune.bench.forecast import Said
    from mlxtune.recipe.schema import Recipe
    from mlxtune.train.corpus import Corpus
    from mlxtune.train.session import Forecast

# How `mlxtune plan` exits where nothing is wrong and the memory does not suffice.
DOES_NOT_FIT = 3


@click.command()
@click.argument("recipe", type=PATH)
@SET
@click.option("--chip", help='Plan for a Mac with this chip, such as "M2 Pro", not this machine.')
@click.option("--memory", type=click.FloatRange(min=1), help="GB of memory of that Mac.")
@click.option("--measure", is_flag=True, help="Measure this machine's rates again.")
@click.option("--fit", type=PATH, metavar="FILE", help="Write a recipe that fits to FILE.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    chip: str | None,
    memory: float | None,
    measure: bool,
    fit: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Say whether a recipe fits and how long it takes, without the model's weights.

    Nothing is trained: one training step is built from the model's sizes and gone through
    on paper. It exits with 0 if the recipe fits, with 3 if it does not, and with 1 if its
    records cannot be trained on.
    """
    if memory is not None and chip is None:
        raise click.UsageError("--memory goes with --chip")
    if measure and chip is not None:
        raise click.UsageError("--measure is for this machine, --chip for another")
    if overwrite and fit is None:
        raise click.UsageError("--overwrite goes with --fit")
    from mlxtune.bench.chips import find_chip
    from mlxtune.files import require_no_file
    from mlxtune.recipe.load import load_recipe

    if chip is not None:
        find_chip(chip, memory)  # before anything that takes a while
    checked = load_recipe(recipe, overrides)
    if fit is not None:
        require_no_file(fit, overwrite)
    prepare(long=True)
    from mlxtune.bench.machine import mac, this_machine
    from mlxtune.bench.plan import Planner
    from mlxtune.recipe.edit import write_edited

    if chip is not None:
        machine = mac(chip, memory)
    else:
        machine = this_machine(remembered=not measure, progress=_on_stderr)
    changed: dict[str, Any] = {}
    with planning_line():
        planner = Planner(checked, machine)
        beyond = planner.out_of_reach()
    if beyond is not None:
        _on_stderr(beyond_line(beyond))
    with planning_line() as progress:
        if fit is None:
            result = planner(progress)
        else:
            _, result, changed = planner.fitted(progress)
    if fit is not None:
        write_edited(recipe, fit, changed, overrides, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(result.as_json() | ({"changed": changed} if fit else {}), indent=2))
    else:
        for line in plan_lines(result):
            click.echo(line)
        for key, value in changed.items():
            click.echo(f"changed  {key} = {json.dumps(value)}")
        if fit is not None:
            click.echo(f"{fit}: written" + ("" if changed else ", unchanged: it fits as it is"))
    if planner.problem is not None:
        raise planner.problem
    if not result.fits:
        click.get_current_context().exit(DOES_NOT_FIT)


def forecast(*, force: bool) -> Forecast:
    """What `mlxtune lora` says before it trains, and where it refuses to.

    Args:
        force: train what does not fit, all the same.
    """

    def of_run(recipe: Recipe, corpus: Corpus, workers: int) -> Said:
        from mlxtune.bench.forecast import forecast

        return forecast(
            recipe,
            corpus,
            workers,
            force=force,
            tell=_on_stderr,
            planning=planning_line,
        )

    return of_run


def _on_stderr(line: str) -> None:
    click.echo(line, err=True)


def planning_line() -> AbstractContextManager[Callable[[str], None]]:
    """Says what is planned: large passes, which a plan goes through, take it a minute."""
    from mlxtune.cli.display import status_line

    return status_line("planning", every=0.2 if sys.stderr.isatty() else 10.0)
