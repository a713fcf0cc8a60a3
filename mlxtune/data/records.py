"""The shapes that training records come in, and the one shape they all become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxtune.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message. `train` says whether its tokens carry loss weight."""

    role: str
    content: str
    train: bool = False


@dataclass(frozen=True)
class Conversation:
    """What every record becomes.

    Attributes:
        turns: messages in order; at least one of them is trained.
        where: `file:line` of the record, for messages.
        tags: fields of the record that are not part of the conversation, such as
            `category`; evaluation groups by them.
    """

    turns: tuple[Turn, ...]
    where: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)

    def prompt_turns(self) -> tuple[Turn, ...]:
        """All turns before the last assistant's."""
        return self.turns[: self._last_answer()]

    def answer(self) -> str:
        """What the assistant says last."""
        return self.turns[self._last_answer()].content

    def _last_answer(self) -> int:
        return max(i for i, turn in enumerate(self.turns) if turn.role == "assistant")


Record = Mapping[str, Any]


def parse_record(record: object, *, format: str = "auto", where: str = "") -> Conversation:
    """One record as a conversation; every assistant turn is trained.

    Args:
        record: a decoded JSON value.
        format: a name from `FORMATS`, or `auto` to tell by the record's keys.
        where: `file:line`, for messages.

    Raises:
        DataError: the record is no object, of no known shape, has a wrong type in it,
            or no assistant text to train on.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is a JSON object; this is {_kind(record)}", where=where)
    if format == "auto":
        format = _detect(record, where)
    return FORMATS[format].parse(record, where)


@dataclass(frozen=True)
class Format:
    """A shape of record: the keys it is known by, and how it is read."""

    keys: tuple[str, ...]
    parse: Callable[[Record, str], Conversation]


def _parse_pair(prompt_key: str, answer_key: str) -> Callable[[Record, str], Conversation]:
    def parse(record: Record, where: str) -> Conversation:
        prompt = _text(record, prompt_key, where)
        answer = _text(record, answer_key, where)
        tags = {k: v for k, v in record.items() if k not in (prompt_key, answer_key)}
        turns = (Turn("user", prompt), Turn("assistant", answer, train=True))
        return Conversation(turns, where, tags)

    return parse


def _parse_messages(record: Record, where: str) -> Conversation:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            "'messages' must be a list with messages in it; this is "
            + ("empty" if messages == [] else _kind(messages)),
            where=where,
        )
    turns = []
    for number, message in enumerate(messages, start=1):
        place = f"{where} message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"a message is an object; this is {_kind(message)}", where=place)
        role = message.get("role")
        if role not in ROLES:
            raise DataError(
                f"unknown role {role!r}", where=place, remedy=f"roles are {', '.join(ROLES)}"
            )
        trained = role == "assistant"
        content = _text(message, "content", place, may_be_empty=not trained)
        turns.append(Turn(role, content, train=trained))
    if not any(turn.train for turn in turns):
        raise DataError(
            "no assistant turn: there is nothing to train on",
            where=where,
            remedy="each record needs at least one message with role 'assistant'",
        )
    tags = {k: v for k, v in record.items() if k != "messages"}
    return Conversation(tuple(turns), where, tags)


FORMATS = {
    "shell": Format(("prompt", "expected_command"), _parse_pair("prompt", "expected_command")),
    "prompt-completion": Format(("prompt", "completion"), _parse_pair("prompt", "completion")),
    "messages": Format(("messages",), _parse_messages),
}


def _detect(record: Record, where: str) -> str:
    for name, format in FORMATS.items():
        if all(key in record for key in format.keys):
            return name
    shapes = "; ".join("{" + ", ".join(f.keys) + "}" for f in FORMATS.values())
    raise DataError(
        f"a record with the keys {', '.join(map(str, record)) or '(none)'} has no known shape",
        where=where,
        remedy=f"known shapes: {shapes}",
    )


def _text(record: Record, key: str, where: str, *, may_be_empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        what = f"{key!r} is missing" if key not in record else f"{key!r} is {_kind(value)}"
        raise DataError(f"{what}; it must be a string", where=where)
    if not value.strip() and not may_be_empty:
        raise DataError(f"{key!r} is empty", where=where)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{key!r} holds half a character (a lone surrogate such as \\ud83c)",
            where=where,
            remedy="write the file as UTF-8 from whole strings",
        )
    return value


def _kind(value: object) -> str:
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)
