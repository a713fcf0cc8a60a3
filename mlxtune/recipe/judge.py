"""`[judge]` of a recipe or a suite."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from mlxtune.recipe.section import PositiveInt, Section


class JudgeSection(Section):
    """`[judge]`: a model that grades answers, behind an OpenAI-compatible endpoint.

    `endpoint` is the base URL, such as `http://localhost:11434/v1`. The key is read from
    the environment variable `api_key_env`. `rubric` says what a good answer is; grades go
    from `lowest` to `highest`. Prices are per million tokens, in whatever currency. A
    request is tried again `retries` times, with growing pauses.
    """

    endpoint: str
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
        if not re.fullmatch(r"https?://\S+", endpoint):
            raise ValueError("should be an address that begins with http:// or https://")
        import httpx  # reading a recipe without a judge does not wait for it

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
