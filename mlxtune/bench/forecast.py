"""What is said before a run trains, and whether it may."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mlxtune.bench.lengths import Lengths
from mlxtune.bench.machine import this_machine
from mlxtune.bench.plan import Planner, RunPlan
from mlxtune.bench.words import advice_lines, beyond_line, size, summary_lines
from mlxtune.errors import MlxtuneError, NoPlan, TargetError, TooLarge
from mlxtune.gpu_errors import fault_of
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
    tell: Tell,
    planning: Callable[[], AbstractContextManager[Tell]],
) -> Said:
    """What a run will take on this machine: figures for run.json, and lines for people.

    Where no plan can be made the run may train, and a warning says that its memory was not checked.
    A plan that fails is a fault of ours and is called that.

    Args:
        recipe: checked.
        corpus: its records.
        workers: that train together.
        force: train what does not fit, all the same.
        tell: called at once with what takes a while, and with what went wrong.
        planning: something that is told what is tried, while advice is looked for.

    Raises:
        TooLarge: it does not fit.
    """
    lengths = Lengths(corpus.parts, "tokenized", f"{corpus.size} records, tokenized")
    try:
        machine = this_machine(remembered=True, progress=tell)
        planner = Planner(recipe, machine, lengths=lengths, workers=workers)
        beyond = None if force else planner.out_of_reach()
        result = beyond or planner.estimate(recipe)
        if result.fits or force:
            figures = result.as_json()
            return {key: figures[key] for key in _KEPT}, tuple(summary_lines(result))
    except NoPlan as error:
        return None, (f"plan     none: {error.what}", _NOT_CHECKED)
    except TargetError:
        raise  # what the run would end with
    except Exception as error:
        if fault_of(error) is not None:
            raise  # training would end as measuring the machine did
        tell(_FAILED.format(_named(error)))
        return None, (f"plan     failed: {_named(error)}", _NOT_CHECKED)
    if result.at_least:
        tell(beyond_line(result))
    try:
        with planning() as progress:
            result = planner(progress)
    except Exception as error:  # that it does not fit is known all the same
        tell(f"warning: no advice, for the plan of a change failed ({_named(error)})")
        raise refusal(result, advised=False) from None
    raise refusal(result)


def _named(error: Exception) -> str:
    return error.what if isinstance(error, MlxtuneError) else f"{type(error).__name__}: {error}"


_NOT_CHECKED = "memory   NOT CHECKED: without a plan it is not known whether this run fits"
_FAILED = (
    "warning: the plan of this run failed ({}), which should not happen\n"
    "  its memory was not checked: it trains all the same, and may run out of memory; please "
    "report what `mlxtune plan RECIPE --debug` shows"
)


def refusal(result: RunPlan, *, advised: bool = True) -> TooLarge:
    """That a run does not fit, and what to do about it, where that was looked for."""
    advice = advice_lines(result) if advised else []
    needed = f"{'at least' if result.at_least else 'about'} {size(result.peak_memory_bytes)}"
    return TooLarge(
        f"this run needs {needed}, and {size(result.budget_bytes)} are there for it",
        remedy="\n  ".join([*advice, f"{'or ' * bool(advice)}train all the same: --force"]),
    )
