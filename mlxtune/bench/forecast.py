"""What is said before a run trains, and whether it may."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mlxtune.bench.lengths import Lengths
from mlxtune.bench.machine import this_machine
from mlxtune.bench.plan import Planner, RunPlan
from mlxtune.bench.words import advice_lines, size, summary_lines
from mlxtune.errors import MlxtuneError, TooLarge
from mlxtune.recipe.schema import Recipe
from mlxtune.train.corpus import Corpus

Tell = Callable[[str], None]
Said = tuple[dict[str, Any] | None, tuple[str, ...]]
# Of a plan, what is kept with the run.
_KEPT = ("peak_memory_bytes", "seconds_per_step", "steps")


def forecast(
    recipe: Recipe,
    corpus: Corpus,
    workers: int,
    *,
    force: bool,
    measuring: Tell,
    planning: Callable[[], AbstractContextManager[Tell]],
) -> Said:
    """What a run will take on this machine: figures for run.json, and lines for people.

    Args:
        recipe: checked.
        corpus: its records.
        workers: that train together.
        force: train what does not fit, all the same.
        measuring: is told if the machine has to be measured first.
        planning: something that is told what is tried, while advice is looked for.

    Raises:
        TooLarge: it does not fit.
    """
    lengths = Lengths(corpus.parts, "tokenized", f"{corpus.size} records, tokenized")
    try:
        machine = this_machine(remembered=True, progress=measuring)
        planner = Planner(recipe, machine, lengths=lengths, workers=workers)
        result = planner.estimate(recipe)
    except MlxtuneError as error:
        return None, (f"no plan: {error}",)
    except Exception as error:  # of an architecture that was never planned: it may train
        return None, (f"no plan: {type(error).__name__}: {error}",)
    if not result.fits and not force:
        with planning() as progress:
            raise refusal(planner(progress))
    figures = result.as_json()
    return {key: figures[key] for key in _KEPT}, tuple(summary_lines(result))


def refusal(result: RunPlan) -> TooLarge:
    """That a run does not fit, and what to do about it."""
    return TooLarge(
        f"this run needs about {size(result.peak_memory_bytes)}, and "
        f"{size(result.budget_bytes)} are there for it",
        remedy="\n  ".join([*advice_lines(result), "or train all the same: --force"]),
    )
