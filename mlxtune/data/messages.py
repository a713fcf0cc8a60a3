"""Messages of a record, read into turns: roles, contents, tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from mlxtune.data.records import ROLES, ToolCall, Turn
from mlxtune.errors import DataError

Record = Mapping[str, Any]

# Other names of our roles, ShareGPT's among them.
ROLE_NAMES = {role: role for role in ROLES} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def without_nulls(value: Any) -> Any:
    """A field that is null is a field that is not there, in JSON as in a table.

    A table has all fields of all records in every row, in schemas and arguments too, so null
    cannot mean more there. Items of lists stay, and so does what stands in JSON text. What JSON
    has no form for becomes text: dates, times and decimal numbers.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta | UUID) else value


def read_turns(messages: object, key: str, where: str) -> tuple[Turn, ...]:
    """A list of messages; `key` is what the record calls it.

    Raises:
        DataError: it is none, or a message in it is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{key!r} must be a list with messages in it; this is "
            + ("empty" if messages == [] else kind_of(messages)),
            where=where,
        )
    return tuple(
        _turn(message, f"{where} message {number}")
        for number, message in enumerate(messages, start=1)
    )


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"a message is an object; this is {kind_of(message)}", where=where)
    named = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(named) if isinstance(named, str) else None
    if role is None:
        raise DataError(
            f"unknown role {named!r}", where=where, remedy=f"roles are {', '.join(ROLES)}"
        )
    key = "value" if "content" not in message and "from" in message else "content"
    calls = _tool_calls(_decoded(message.get("tool_calls")), where)
    calls = calls or _tool_calls(message.get("function_call"), where)  # OpenAI's older form
    if named == "function_call":  # ShareGPT's: the text is the call
        calls = _tool_calls(_decoded(read_text(message, key, where)), where)
        content = ""
    elif message.get(key) is None and calls:
        content = ""
    else:
        content = _content(message, key, where)
    thoughts = [read_optional_text(message, key, where) for key in REASONING_KEYS]
    return Turn(
        role,
        content,
        train=_trained(message, where),
        reasoning=next(filter(None, thoughts), ""),
        tool_calls=calls,
        tool_call_id=read_optional_text(message, "tool_call_id", where) or None,
        name=read_optional_text(message, "name", where) or None,
    )


def _content(message: Record, key: str, where: str) -> str:
    """Text, also where it comes as a list of parts or, from a tool, as an object."""
    value = message.get(key)
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
                raise DataError(
                    f"a part of {key!r} is no text ({kind}); only text can be trained on",
                    where=where,
                )
            parts.append(part["text"])
        message = {key: "".join(parts)}
    elif isinstance(value, Mapping):
        message = {key: json.dumps(value, ensure_ascii=False)}
    return read_text(message, key, where)


def _trained(message: Record, where: str) -> bool | None:
    """What a message says of itself: `train`, or OpenAI's `weight` of 0 or 1."""
    if message.get("train") is not None:
        if not isinstance(message["train"], bool):
            raise DataError(
                f"'train' must be true or false; it is {kind_of(message['train'])}", where=where
            )
        return bool(message["train"])
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"'weight' of a message must be 0 or 1; it is {weight!r}", where=where)
    return bool(weight)


def _tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value in (None, "", [], {}):
        return ()
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise DataError("a tool call needs a function with a name", where=where)
        given = call.get("arguments", {})
        arguments = {} if given == "" else _decoded(given)
        if isinstance(arguments, str):
            arguments = given  # no JSON, or JSON of text: as it stands
        if not isinstance(arguments, Mapping | str):
            raise DataError(
                f"the arguments of the tool call {call['name']!r} must be an object; they are "
                f"{kind_of(arguments)}",
                where=where,
            )
        called = item.get("id") if isinstance(item, Mapping) else None
        called = called if called and isinstance(called, str) else None
        _require_whole([call["name"], arguments, called], "a tool call", where)
        calls.append(ToolCall(call["name"], arguments, called))
    return tuple(calls)


def read_tools(record: Record, where: str) -> tuple[Mapping[str, Any], ...]:
    """The schemas of the functions that may be called: a list, or JSON text of one.

    OpenAI's older `functions` are those of `tools` without the object around each.
    """
    tools = _decoded(record.get("tools"))
    if tools in (None, "", []):
        tools = _decoded(record.get("functions"))
        if tools in (None, "", []):
            return ()
        if isinstance(tools, list) and all(isinstance(f, Mapping) for f in tools):
            tools = [{"type": "function", "function": f} for f in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("'tools' must be a list of function schemas", where=where)
    _require_whole(tools, "'tools'", where)
    return tuple(tools)


def _decoded(value: object) -> object:
    """The value of JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def read_optional_text(record: Record, key: str, where: str) -> str:
    """The text at `key`, empty where there is none."""
    if record.get(key) is None:
        return ""
    return read_text(record, key, where)


def read_text(record: Record, key: str, where: str) -> str:
    """The text at `key`.

    Raises:
        DataError: it is missing or no text.
    """
    value = record.get(key)
    if not isinstance(value, str):
        what = f"{key!r} is missing" if key not in record else f"{key!r} is {kind_of(value)}"
        raise DataError(f"{what}; it must be a string", where=where)
    _require_whole(value, repr(key), where)
    return value


def _require_whole(value: object, what: str, where: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"{what} holds half a character (a lone surrogate such as \\ud83c)",
            where=where,
            remedy="write the file as UTF-8 from whole strings",
        )


def kind_of(value: object) -> str:
    """What JSON calls a value, for messages."""
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
