"""What `mlxtune validate` says of a recipe, its records and its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mlxtune.errors import DataError, MlxtuneError, RecipeError
from mlxtune.evaluate.suite import suite_of
from mlxtune.recipe.load import load_recipe
from mlxtune.train.check import CheckedSource, check_sources
from mlxtune.train.corpus import unread_files
from mlxtune.train.model import check_model


def validated(path: Path, overrides: tuple[str, ...]) -> Iterator[str]:
    """Lines on what was checked; everything that is wrong comes together at the end.

    Args:
        path: of the recipe.
        overrides: of `--set`.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    recipe = load_recipe(path, overrides)
    suite_of(recipe)
    problems: list[MlxtuneError] = []
    try:
        check_model(recipe.model)
    except MlxtuneError as error:
        where = "model.path" if error.where == recipe.model.path else str(error.where)
        problems.append(type(error)(error.what, where=where, remedy=error.remedy or ""))
    check = check_sources(recipe)
    for source in check.sources:
        yield from _lines(source)
        problems += source.problems
        if (more := source.faulty - len(source.problems)) > 0:
            problems.append(
                DataError(f"{more} more records cannot be trained on", where=source.name)
            )
    with suppress(DataError):  # a path that is not there is among the problems
        yield from unread_files(recipe)
    if check.overlap:
        yield str(check.overlap)
    try:
        check.overlap.require_below(recipe.eval.max_overlap)
    except DataError as error:
        problems.append(error)
    if problems:
        raise RecipeError("this recipe cannot be trained", where=str(path), problems=(*problems,))
    yield f"{path} is valid"


def _lines(source: CheckedSource) -> Iterator[str]:
    held_out = "held-out " if source.held_out else ""
    usable = source.records - source.faulty - source.skipped.total()
    some = "" if usable == source.records else f", {max(usable, 0)} of them usable"
    yield f"{source.name}: {source.records} {held_out}records{some}"
    for reason, count in source.skipped.most_common():
        yield f"  {count} left out: {reason}"
