"""What becomes of records that a chat template has no place for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlxtune.data.chat import INLINE_TAGS
from mlxtune.errors import DataError

Note = Callable[[str], None]

NO_REASONING = "no reasoning, which the chat template has a place for: an empty thought is trained"


class NoReasoning(DataError):
    """A record has no reasoning, the template asks for it, and such records are left out."""


@dataclass(frozen=True)
class Writing:
    """How conversations are written where a template and a record do not fit.

    Attributes:
        missing_reasoning: an answer without reasoning, where the model is asked to think: its
            thought is `empty`, the record is left out (`skip`) or refused.
        reasoning: that of an answer, where the template has no place for it: it is put into
            the answer between `tags` (`inline`), or the record is refused. With `drop` it is
            left out in any case.
        tags: before and after reasoning that is written into an answer.
        left_out: what else a template leaves out of a record is refused, or counted (`warn`).
    """

    missing_reasoning: Literal["empty", "skip", "refuse"] = "empty"
    reasoning: Literal["refuse", "inline", "drop"] = "refuse"
    tags: tuple[str, str] = INLINE_TAGS
    left_out: Literal["refuse", "warn"] = "refuse"
