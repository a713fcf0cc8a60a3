"""The one shape that all training records become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls.

    `arguments` is a decoded JSON object, or text where the record held no valid JSON.
    """

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        train: whether its tokens carry loss weight; None leaves it to the role.
        reasoning: what the assistant thinks before it answers, for templates that show it.
        tool_calls: functions that the assistant calls.
        tool_call_id: of a tool's turn, the call that it answers.
        name: of a tool's turn, the tool.
    """

    role: str
    content: str
    train: bool | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is said in it."""
        return not (self.content.strip() or self.reasoning.strip() or self.tool_calls)


@dataclass(frozen=True)
class Segment:
    """Text that no template touches, trained or given."""

    text: str
    train: bool


@dataclass(frozen=True)
class Conversation:
    """What every record becomes: turns for the chat template, or segments of plain text.

    Attributes:
        turns: messages in order; empty when there are segments.
        where: `file:line` of the record, for messages.
        tags: fields of the record that are not part of the conversation, such as
            `category`; evaluation and preparation group by them.
        tools: JSON schemas of the functions that may be called.
        segments: text as it stands.
        closed: whether the segments are a whole document, which begins and ends with the
            tokenizer's own marks; otherwise they hold all marks they need.
        rejected: of a preference pair, the turns that lose against the last of `turns`.
        chosen: how many turns these last ones are.
    """

    turns: tuple[Turn, ...] = ()
    where: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    segments: tuple[Segment, ...] = ()
    closed: bool = False
    rejected: tuple[Turn, ...] = ()
    chosen: int = 1

    def require_pair(self) -> None:
        """See that it is a preference pair.

        Raises:
            DataError: it is none.
        """
        if not self.rejected:
            raise DataError(
                "this record is no preference pair, which this objective trains",
                where=self.where,
                remedy="a pair has 'prompt', 'chosen' and 'rejected'; columns = {chosen = ..., "
                'rejected = ...} says what they are called; objective = "sft" trains answers',
            )

    def sides(self) -> tuple[Conversation, Conversation]:
        """Of a preference pair, what is asked with the chosen turns and with the rejected ones.

        These alone are to be trained: what the assistant said before is given.
        """
        asked = tuple(
            replace(turn, train=False) if turn.role == "assistant" else turn
            for turn in self.turns[: -self.chosen]
        )
        answers = self.turns[-self.chosen :], self.rejected
        chosen, rejected = (replace(self, turns=(*asked, *a), rejected=()) for a in answers)
        return chosen, rejected

    def prompt_turns(self) -> tuple[Turn, ...]:
        """All turns before the last assistant's."""
        return self.turns[: self._last_answer()]

    def answer(self) -> str:
        """What the assistant says last; plain text is no answer."""
        last = self._last_answer()
        return self.turns[last].content if last < len(self.turns) else ""

    def text(self) -> str:
        """Everything said in it, a paragraph a turn; the losing side is left out."""
        if self.segments:
            return "".join(segment.text for segment in self.segments)
        return "\n\n".join(turn.content for turn in self.turns)

    def fingerprint(self) -> int:
        """64 bits that tell it from others: the same for records that say the same.

        White space around what is said, a system prompt before it and what is trained of it make
        no difference.
        """
        sides = [
            [
                [t.role, t.content.strip(), t.reasoning.strip()]
                + [[call.name, call.arguments] for call in t.tool_calls]
                for t in side
                if t.role != "system"
            ]
            for side in (self.turns, self.rejected)
        ]
        parts = [sides, self.tools, [s.text.strip() for s in self.segments]]
        text = json.dumps(parts, sort_keys=True, default=str)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def _last_answer(self) -> int:
        answers = [i for i, turn in enumerate(self.turns) if turn.role == "assistant"]
        return answers[-1] if answers else len(self.turns)
