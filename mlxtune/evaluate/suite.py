"""What is measured: a suite's file, its schema and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import httpx
from pydantic import Field, field_validator, model_validator

from mlxtune.data.sources import HUB
from mlxtune.recipe.load import read_toml, validated
from mlxtune.recipe.schema import Columns, DataSource, FormatName, PositiveInt, Section

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


class JudgeSection(Section):
    """`[judge]`: a model that grades answers, behind an OpenAI-compatible endpoint.

    `endpoint` is the base URL, such as `http://localhost:11434/v1`. The key is read from
    the environment variable `api_key_env`. `rubric` says what a good answer is; grades go
    from `lowest` to `highest`. Prices are per million tokens, in whatever currency. A
    request is tried again `retries` times, with growing pauses.
    """

    endpoint: str = Field(pattern=r"^https?://\S+$")
    model: str = Field(min_length=1)
    rubric: str = Field(min_length=1)
    api_key_env: str | None = Field(default=None, min_length=1)
    lowest: int = 1
    highest: int = 5
    max_tokens: PositiveInt = 256
    timeout: float = Field(default=60.0, gt=0)
    retries: int = Field(default=4, ge=0)
    price_input: float = Field(default=0.0, ge=0)
    price_output: float = Field(default=0.0, ge=0)

    @field_validator("endpoint")
    @classmethod
    def _an_address(cls, endpoint: str) -> str:
        try:
            host = httpx.URL(endpoint).host
        except httpx.InvalidURL as error:
            raise ValueError(f"this is no URL: {error}") from None
        if not host:
            raise ValueError("this URL names no host")
        return endpoint

    @model_validator(mode="after")
    def _a_scale(self) -> JudgeSection:
        if self.lowest >= self.highest:
            raise ValueError("lowest is a grade below highest")
        return self


class Suite(Section):
    """A suite of measurements.

    `metrics` are computed of every answer; `shell` stands for several. `normalise` says
    how texts are made alike before `normalised` and `f1` compare them: `code` evens out
    white space, `squad` case, punctuation and articles too. Answers are cut off after
    `max_tokens`, by default a little beyond the longest expected one. On the plain text of
    `general_text` the loss is measured: where it rises, something was forgotten. Without
    `[[data]]` the records that a run holds out are answered.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: Annotated[tuple[SuiteData, ...], Field(strict=False)] = ()
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = DEFAULT_METRICS
    normalise: Literal["code", "squad"] = "code"
    max_tokens: PositiveInt | None = None
    general_text: str | None = Field(default=None, min_length=1)
    judge: JudgeSection | None = None


def load_suite(path: Path) -> Suite:
    """Read and check a suite; paths in it are beside the file.

    Without a `name` it is called after the file.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    values = read_toml(path, "suite", remedy="docs/evaluate.md shows one")
    values.setdefault("name", path.stem)
    suite = validated(Suite, values, "suite", where=str(path))

    def beside(name: str) -> str:
        return name if name.startswith(HUB) else str(path.parent / Path(name).expanduser())

    data = tuple(d.model_copy(update={"path": beside(d.path)}) for d in suite.data)
    text = beside(suite.general_text) if suite.general_text is not None else None
    return suite.model_copy(update={"data": data, "general_text": text})
