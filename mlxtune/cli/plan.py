"""`mlxtune plan`: memory and time of a recipe before it is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli.shared import PATH, SET, prepare

if TYPE_CHECKING:
    from mlxtune.bench.machine import Machine
    from mlxtune.bench.plan import RunPlan
    from mlxtune.recipe.schema import Recipe
    from mlxtune.train.corpus import Corpus
    from mlxtune.train.session import Forecast

_GB = 1e9


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
    on paper.
    """
    if memory is not None and chip is None:
        raise click.UsageError("--memory goes with --chip")
    if measure and chip is not None:
        raise click.UsageError("--measure is for this machine, --chip for another")
    from mlxtune.files import require_no_file
    from mlxtune.recipe.load import load_recipe

    checked = load_recipe(recipe, overrides)
    if fit is not None:
        require_no_file(fit, overwrite)
    prepare()
    from mlxtune.bench.machine import mac, this_machine
    from mlxtune.bench.plan import Planner
    from mlxtune.recipe.edit import write_edited

    machine = mac(chip, memory) if chip is not None else this_machine(remembered=not measure)
    changed: dict[str, Any] = {}
    with planning_line() as progress:
        planner = Planner(checked, machine)
        if fit is None:
            result = planner(progress)
        else:
            _, result, changed = planner.fitted(progress)
    if fit is not None:
        write_edited(recipe, fit, changed, overrides, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(result.as_json() | ({"changed": changed} if fit else {}), indent=2))
        return
    for line in plan_lines(result, machine):
        click.echo(line)
    for key, value in changed.items():
        click.echo(f"changed  {key} = {json.dumps(value)}")
    if fit is not None:
        click.echo(f"{fit}: written" + ("" if changed else ", unchanged: it fits as it is"))


def forecast(*, force: bool) -> Forecast:
    """What `mlxtune lora` says before it trains, and where it refuses to.

    Args:
        force: train what does not fit, all the same.
    """

    def of_run(
        recipe: Recipe, corpus: Corpus, workers: int
    ) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        from mlxtune.bench.lengths import Lengths
        from mlxtune.bench.machine import this_machine
        from mlxtune.bench.plan import Planner
        from mlxtune.errors import MlxtuneError, TooLarge

        lengths = Lengths(corpus.parts, "tokenized", f"{corpus.size} records, tokenized")
        try:
            machine = this_machine(remembered=True)
            planner = Planner(recipe, machine, lengths=lengths, workers=workers)
            result = planner.estimate(recipe)
        except MlxtuneError as error:
            return None, (f"no plan: {error}",)
        except Exception as error:  # of an architecture that was never planned: it may train
            return None, (f"no plan: {type(error).__name__}: {error}",)
        if not result.fits and not force:
            with planning_line() as progress:
                advice = advice_lines(planner(progress))
            raise TooLarge(
                f"this run needs about {result.peak_memory_bytes / _GB:.1f} GB, and "
                f"{result.budget_bytes / _GB:.1f} GB are there for it",
                remedy="\n  ".join([*advice, "or train all the same: --force"]),
            )
        figures = result.as_json()
        kept = {key: figures[key] for key in ("peak_memory_bytes", "seconds_per_step", "steps")}
        return kept, tuple(summary_lines(result))

    return of_run


def planning_line() -> AbstractContextManager[Callable[[str], None]]:
    """Says what is planned: large passes, which a plan goes through, take it a minute."""
    from mlxtune.cli.display import status_line

    return status_line("planning", every=0.2 if sys.stderr.isatty() else 10.0)


def plan_lines(result: RunPlan, machine: Machine) -> list[str]:
    """A plan as people read it."""
    lines = [
        f"machine  {result.machine}, {result.dtype}",
        f"model    {result.model}",
        f"adapter  {result.parameters_trained / 1e6:.2f} M parameters train",
        f"data     {result.lengths}",
        *summary_lines(result),
        "",
        "  " + "  ".join(f"{name} {value / _GB:.2f}" for name, value in _parts(result)) + "  GB",
    ]
    if result.checkpointed_blocks:
        lines.append(
            f"  gradient checkpointing in {result.checkpointed_blocks} of {result.blocks} blocks"
        )
    if not result.fits:
        lines += ["", *advice_lines(result)]
    return lines


def summary_lines(result: RunPlan) -> list[str]:
    """The two lines that matter: whether it fits, and how long it takes."""
    verdict = "fits" if result.fits else "DOES NOT FIT"
    memory = (
        f"memory   {result.peak_memory_bytes / _GB:.2f} GB at most of "
        f"{result.budget_bytes / _GB:.1f}: {verdict} (estimate)"
    )
    if result.seconds_per_step is None:
        return [memory, "time     unknown: no arithmetic rate of this chip is published"]
    basis = "rates measured here" if result.measured_rates else "published rates of the chip"
    each = f"{result.seconds_per_step:.2f} s"
    if result.steps is None:
        return [memory, f"time     {each} a step; the records say how many (estimate from {basis})"]
    total = _span(result.seconds_per_step * result.steps)
    return [memory, f"time     {total} for {result.steps} steps of {each} (estimate from {basis})"]


def advice_lines(result: RunPlan) -> list[str]:
    """What would make a recipe fit."""
    if not result.advice:
        return ["nothing in the recipe would make it fit: take a smaller model"]
    lines = ["what saves memory:"]
    for advice in result.advice:
        keys = ", ".join(f"{key} = {json.dumps(value)}" for key, value in advice.changes.items())
        fits = "; fits then" if advice.fits else ""
        lines.append(f"  {keys}: {advice.saves_bytes / _GB:.2f} GB less{fits} ({advice.why})")
    return lines


def _parts(result: RunPlan) -> list[tuple[str, int]]:
    return [
        ("weights", result.weights_bytes),
        ("adapters", result.adapters_bytes),
        ("gradients", result.gradients_bytes),
        ("optimizer", result.optimizer_bytes),
        ("logits", result.logits_bytes),
        ("activations", result.activations_bytes),
    ]


def _span(seconds: float) -> str:
    """A time, in the unit that one says it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
