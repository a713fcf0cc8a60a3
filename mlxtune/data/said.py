"""What is said in an answer, and whether a text holds it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mlxtune.data.records import Turn

_LETTER = "x"


def last_said(turn: Turn) -> str:
    """What an answer ends with: the last of its calls, or its words, or its reasoning."""
    if turn.tool_calls:
        return turn.tool_calls[-1].name
    return turn.content.strip() or turn.reasoning.strip()


def unsaid(turn: Turn, text: str) -> Iterator[str]:
    """What a template leaves out of an answer.

    What is said twice, as in words that name the tool they call, has to be there twice.
    """
    left = turn
    if not holds(text, turn.content):
        yield _words_of(turn)
        left = replace(left, content="")
    if not holds(text, turn.reasoning):
        yield "reasoning"
        left = replace(left, reasoning="")
    for call in turn.tool_calls:
        if not holds(text, call.name):
            yield "tool calls"
        elif not all(holds(text, value) for value in _leaves(call.arguments)):
            yield "arguments of tool calls"
        else:
            continue
        left = replace(left, tool_calls=())
    if lacks(text, left.content, left):
        yield _words_of(turn)
        left = replace(left, content="")
    if lacks(text, left.reasoning, left):
        yield "reasoning"
        left = replace(left, reasoning="")
    if any(lacks(text, call.name, left) for call in left.tool_calls):
        yield "tool calls"
    elif any(lacks(text, v, left) for call in left.tool_calls for v in _leaves(call.arguments)):
        yield "arguments of tool calls"


def _words_of(turn: Turn) -> str:
    return "the words beside a tool call" if turn.tool_calls else "the words of an answer"


def said_in(turn: Turn) -> Iterator[str]:
    """All texts of an answer: words, reasoning and calls."""
    yield from (turn.content, turn.reasoning)
    for call in turn.tool_calls:
        yield call.name
        yield from _leaves(call.arguments, keys=True)


def lacks(text: str, said: str, turn: Turn) -> bool:
    """Whether a text holds what is said less often than a turn says it."""
    said = said.strip()
    times = "\0".join(said_in(turn)).count(said) if said else 0
    forms = {said, *(json.dumps(said, ensure_ascii=ascii_)[1:-1] for ascii_ in (True, False))}
    return times > 1 and sum(text.count(form) for form in forms) < times


def _leaves(value: Any, *, keys: bool = False) -> Iterator[str]:
    """All texts and numbers in a JSON value; with `keys` the names of its fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if keys:
            yield from map(str, value)
        for part in value.values():
            yield from _leaves(part, keys=keys)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, keys=keys)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def holds(text: str, said: str) -> bool:
    """Whether a text holds these words, be it as a JSON string."""
    said = said.strip()
    return said in text or any(
        json.dumps(said, ensure_ascii=ascii_)[1:-1] in text for ascii_ in (True, False)
    )


def blanked(turn: Turn, marks: re.Pattern[str]) -> Turn:
    """An answer with as many letters in the place of each mark that is said in it."""

    def blank(value: Any) -> Any:
        if isinstance(value, str):
            return marks.sub(lambda found: _LETTER * len(found[0]), value)
        if isinstance(value, Mapping):
            return {blank(key): blank(part) for key, part in value.items()}
        return [blank(part) for part in value] if isinstance(value, list | tuple) else value

    calls = tuple(
        replace(call, name=blank(call.name), arguments=blank(call.arguments))
        for call in turn.tool_calls
    )
    return replace(
        turn, content=blank(turn.content), reasoning=blank(turn.reasoning), tool_calls=calls
    )
