"""The texts of a conversation: changed one by one, or joined to be compared."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlxtune.data.records import Conversation, Segment, ToolCall, Turn

Change = Callable[[str], str]


def map_texts(conversation: Conversation, change: Change) -> Conversation:
    """The conversation with `change` applied to every string in it that is written out.

    That includes reasoning, tool calls and tags. Names of roles, tools and keys stay.
    """
    return replace(
        conversation,
        turns=tuple(_map_turn(turn, change) for turn in conversation.turns),
        segments=tuple(Segment(change(s.text), s.train) for s in conversation.segments),
        tags=_map_value(conversation.tags, change),
        tools=tuple(_map_value(tool, change) for tool in conversation.tools),
        rejected=tuple(_map_turn(turn, change) for turn in conversation.rejected),
    )


def all_texts(conversation: Conversation) -> list[str]:
    """Every string that `map_texts` would hand to its function."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    map_texts(conversation, note)
    return found


def _map_turn(turn: Turn, change: Change) -> Turn:
    return replace(
        turn,
        content=change(turn.content),
        reasoning=change(turn.reasoning),
        tool_calls=tuple(
            ToolCall(call.name, _map_value(call.arguments, change), call.id)
            for call in turn.tool_calls
        ),
    )


def _map_value(value: Any, change: Change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_value(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_value(item, change) for item in value]
    return value


def compared(conversation: Conversation) -> str:
    """What makes two rows duplicates of each other.

    System turns are left out: a prompt that all rows share would make them all alike.
    Case is kept where it is the answer that is compared (`tar -c` is not `tar -C`) and
    folded elsewhere; Unicode is in form NFKC and runs of space are one space.
    """
    if conversation.segments:
        return _plain(conversation.text())
    parts = []
    for turn in (*conversation.turns, *conversation.rejected):
        said = [turn.reasoning, turn.content]
        said += [call.name + json.dumps(call.arguments, sort_keys=True) for call in turn.tool_calls]
        text = _plain(" ".join(said))
        if turn.role == "assistant":
            parts.append(text)
        elif turn.role != "system":
            parts.append(text.casefold())
    return "\n".join(parts)


def asked(conversation: Conversation) -> str:
    """What the user says, or plain text as it stands."""
    if conversation.segments:
        return conversation.text()
    return "\n".join(turn.content for turn in conversation.turns if turn.role == "user")


def excerpt(conversation: Conversation, characters: int = 120) -> str:
    """The beginning of what is said, on one line, for reports."""
    turns = [turn.content for turn in conversation.turns if turn.role != "system"]
    line = _plain(conversation.text() if conversation.segments else " → ".join(turns))
    # What cannot be seen would spoil the terminal it is printed on.
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= characters else line[: characters - 1] + "…"


def _plain(text: str) -> str:
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).split())
