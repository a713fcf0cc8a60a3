"""What is measured: a suite's file, its schema and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mlxtune.data.sources import HUB
from mlxtune.recipe.judge import JudgeSection
from mlxtune.recipe.load import read_toml, validated
from mlxtune.recipe.schema import Columns, DataSource, FormatName, Recipe
from mlxtune.recipe.section import Name, PositiveInt, Section, name_from

Metric = Literal["exact", "normalised", "f1", "edit", "shell"]
DEFAULT_METRICS: tuple[Metric, ...] = ("exact", "normalised", "f1", "edit")


class SuiteData(Section):
    """`[[data]]`: records to answer, as in a recipe's `[eval]`."""

    path: str = Field(min_length=1)
    format: FormatName = "auto"
    columns: Columns = Field(default={})
    split: str | None = None
    subset: str | None = None
    max_samples: PositiveInt | None = None

    def source(self) -> DataSource:
        """As a source of a recipe."""
        return DataSource(**self.model_dump())


class Suite(Section):
    """A suite of measurements.

    `metrics` are computed of every answer; `shell` stands for several. `normalise` says
    how texts are made alike before `normalised` and `f1` compare them: `code` evens out
    white space, `squad` case, punctuation and articles too. Answers are cut off after
    `max_tokens`, by default a little beyond the longest expected one. On the plain text of
    `general_text` the loss is measured: where it rises, something was forgotten. Without
    `[[data]]` the records that a run holds out are answered.
    """

    name: Name
    data: Annotated[tuple[SuiteData, ...], Field(strict=False)] = ()
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = DEFAULT_METRICS
    normalise: Literal["code", "squad"] = "code"
    max_tokens: PositiveInt | None = None
    general_text: str | None = Field(default=None, min_length=1)
    judge: JudgeSection | None = None


DEFAULT_SUITE = Suite(name="heldout")


def suite_of(recipe: Recipe, suite: Suite | None = None) -> Suite:
    """What is measured of a recipe's run.

    Args:
        recipe: its `[judge]` grades answers where the suite has none.
        suite: instead of the one that `eval.suite` names.

    Raises:
        RecipeError: as `load_suite`.
    """
    if suite is None:
        named = recipe.eval.suite
        suite = load_suite(Path(named).expanduser()) if named is not None else DEFAULT_SUITE
    return suite.model_copy(update={"judge": suite.judge or recipe.judge})


def load_suite(path: Path) -> Suite:
    """Read and check a suite; paths in it are beside the file.

    Without a `name` it is called after the file.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    values = read_toml(path, "suite", remedy="docs/evaluate.md shows one")
    values.setdefault("name", name_from(path.stem))
    suite = validated(Suite, values, "suite", where=str(path))

    def beside(name: str) -> str:
        return name if name.startswith(HUB) else str(path.parent / Path(name).expanduser())

    data = tuple(d.model_copy(update={"path": beside(d.path)}) for d in suite.data)
    text = beside(suite.general_text) if suite.general_text is not None else None
    return suite.model_copy(update={"data": data, "general_text": text})
