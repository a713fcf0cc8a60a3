"""The answers of a conversation in tokens, and which of them share a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlxtune.data.chat import Tools
from mlxtune.data.records import Turn
from mlxtune.data.said import unsaid
from mlxtune.data.writing import Note, Writing
from mlxtune.errors import DataError

if TYPE_CHECKING:
    from mlxtune.data.render import Renderer

Weighted = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class AnswerTokens:
    """One answer in tokens.

    Attributes:
        prompt: tokens before it.
        answer: its own, with its end.
        whole: tokens of the text that both are from, with what the template writes after.
    """

    prompt: list[int]
    answer: list[int]
    whole: list[int]

    @property
    def tokens(self) -> list[int]:
        """Up to and with the end of the answer."""
        return self.prompt + self.answer


class AnswerTokenizer:
    """Makes tokens of the answers of one conversation.

    Args:
        renderer: of the model's tokenizer.
        turns: of the conversation, prepared.
        tools: of the conversation.
        writing: what becomes of what the template has no place for.
        note: is given remarks.
        written: texts that have been rendered already, by how many turns they have.
    """

    def __init__(
        self,
        renderer: Renderer,
        turns: Sequence[Turn],
        tools: Tools,
        writing: Writing,
        note: Note,
        written: Mapping[int, str],
    ) -> None:
        self._renderer, self._turns, self._tools = renderer, turns, tools
        self._writing, self._note, self._written = writing, note, written

    def __call__(self, number: int) -> AnswerTokens:
        turn = self._turns[number]
        if number == 0:
            raise DataError(
                "the conversation begins with its answer: nothing was asked",
                remedy="put a message of role 'user' or 'system' first",
            )
        answer = self._renderer.answers.of(
            self._turns,
            number,
            self._tools,
            self._writing,
            self._note,
            whole=self._written.get(number + 1),
            marks=self._renderer.marks,
        )
        left_out = self._renderer.answers.left_out
        missing = chain(
            left_out(self._turns[:number], self._tools, answer.prompt, ask=True),
            unsaid(turn, answer.text),
        )
        refuse_or_note(missing, f"turn {number + 1}", self._writing, self._note)
        return AnswerTokens(*self._renderer.answered(answer, calls=bool(turn.tool_calls)))


def weights_of(tokens: list[int], told: Sequence[AnswerTokens]) -> npt.NDArray[np.float32] | None:
    """Weights of answers in tokens that begin with each of them; None if those do not."""
    weights = np.zeros(len(tokens), np.float32)
    for one in told:
        end = len(one.prompt) + len(one.answer)
        if tokens[:end] != one.tokens:
            return None
        weights[len(one.prompt) : end] = 1
    return weights


def apart(told: Sequence[AnswerTokens]) -> Iterator[Weighted]:
    """Samples of answers: those that continue one another share one."""
    groups: list[list[AnswerTokens]] = []
    for one in told:
        last = groups[-1][-1].tokens if groups else None
        if last is not None and one.tokens[: len(last)] == last:
            groups[-1].append(one)
        else:
            groups.append([one])
    for group in groups:
        end = group[-1]
        # What the template writes after the last answer stays: it carries no weight.
        tokens = end.whole if end.whole[: len(end.tokens)] == end.tokens else end.tokens
        weights = weights_of(tokens, group)
        assert weights is not None
        yield np.asarray(tokens, np.int32), weights


def rewrites() -> DataError:
    """What to raise where the place of a turn is asked for and others move it."""
    return DataError(
        "the chat template rewrites earlier turns once others follow, so where others than the "
        "assistant's begin and end in its text cannot be told",
        remedy="train the assistant's turns alone, or set model.chat_template to a template that "
        "only appends",
    )


def refuse_or_note(missing: Iterable[str], where: str, writing: Writing, note: Note) -> None:
    """What becomes of what a template leaves out.

    Raises:
        DataError: it is refused.
    """
    for what in missing:
        if writing.left_out == "refuse":
            raise DataError(
                f"the chat template leaves out {what} ({where})",
                remedy="set model.chat_template to a template that writes it, leave it out of the "
                'data, or accept that with left_out = "warn"',
            )
        note(f"the chat template leaves out {what}")
