"""The shapes that training records come in, each read into a `Conversation`.

Names and keys are those of the tools that people bring their files from: Alpaca's
instructions, ShareGPT's conversations, OpenAI's messages, TRL's prompt and completion
and preference pairs, Axolotl's input_output segments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.records import ROLES, Conversation, Segment, ToolCall, Turn
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


@dataclass(frozen=True)
class Format:
    """A shape of record: the keys it is known by, all that it uses, and how it is read."""

    keys: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Record, str], Conversation]


def parse_record(
    record: object,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    allow_empty: bool = False,
    where: str = "",
) -> Conversation:
    """One record as a conversation.

    Args:
        record: a decoded JSON value.
        format: a name from `FORMATS`, or `auto` to tell by the record's keys.
        columns: what fields of the format are called in the record; dots go into
            objects.
        allow_empty: let turns without a word pass, for those who look for them.
        where: `file:line`, for messages.

    Raises:
        DataError: the record is no object, of no known shape, has a wrong type in it, or says
            nothing where it should.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is a JSON object; this is {kind_of(record)}", where=where)
    if columns:
        record = _renamed(record, columns, where)
    if format == "auto":
        format = detect(record, where)
    shape = FORMATS[format]
    try:
        conversation = shape.parse(record, where)
    except RecursionError:
        raise DataError("this record is nested too deeply", where=where) from None
    if not allow_empty:
        _require_words(conversation, where)
    used = {*shape.keys, *shape.optional}
    tags = {k: v for k, v in record.items() if k not in used}
    return replace(conversation, where=where, tags=tags)


class NothingSaid(DataError):
    """A record says nothing where it should."""


def _require_words(conversation: Conversation, where: str) -> None:
    for number, turn in enumerate((*conversation.turns, *conversation.rejected), start=1):
        if turn.role == "assistant" and turn.empty:
            raise NothingSaid(f"turn {number}, the assistant's, is empty", where=where)
    given = [turn for turn in conversation.turns if turn.role != "assistant"]
    if given and all(turn.empty for turn in given):
        raise NothingSaid("nothing is asked: the prompt is empty", where=where)
    if conversation.segments and not conversation.text().strip():
        raise NothingSaid("the text is empty", where=where)


def _renamed(record: Record, columns: Mapping[str, str], where: str) -> Record:
    values = {k: v for k, v in record.items() if k not in columns.values()}
    for name, column in columns.items():
        value: Any = record
        for part in [column] if column in record else column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise DataError(
                    f"there is no column {column!r}, which columns.{name} names",
                    where=where,
                    remedy=f"this record has {', '.join(map(str, record)) or 'none'}",
                )
            value = value[part]
        values[name] = value
    return values


def detect(record: Record, where: str = "") -> str:
    """The format that a record's keys tell of.

    Raises:
        DataError: none.
    """
    for name, format in FORMATS.items():
        if all(key in record for key in format.keys):
            return name
    shapes = "; ".join(f"{name} {{{', '.join(format.keys)}}}" for name, format in FORMATS.items())
    raise DataError(
        f"a record with the keys {', '.join(map(str, record)) or '(none)'} has no known shape",
        where=where,
        remedy=f"known shapes: {shapes}. Others can be mapped: "
        'columns = {prompt = "question", completion = "answer"}',
    )


def _parse_shell(record: Record, where: str) -> Conversation:
    answer = _text(record, "expected_command", where)
    return Conversation((Turn("user", _text(record, "prompt", where)), Turn("assistant", answer)))


def _parse_alpaca(record: Record, where: str) -> Conversation:
    turns = []
    if system := _optional_text(record, "system", where):
        turns.append(Turn("system", system))
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list; it is {kind_of(history)}", where=where)
    for number, pair in enumerate(history, start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(x) is str for x in pair)):
            raise DataError(
                f"item {number} of 'history' must be a question and an answer", where=where
            )
        said = {"question": pair[0], "answer": pair[1]}
        turns.append(Turn("user", _text(said, "question", where)))
        turns.append(Turn("assistant", _text(said, "answer", where)))
    question = _text(record, "instruction", where)
    if extra := _optional_text(record, "input", where):
        question += f"\n{extra}"
    turns += [Turn("user", question), Turn("assistant", _text(record, "output", where))]
    return Conversation(tuple(turns))


def _parse_sharegpt(record: Record, where: str) -> Conversation:
    turns = _turns(record.get("conversations"), "conversations", where)
    if system := _optional_text(record, "system", where):
        turns = (Turn("system", system), *turns)
    return Conversation(turns, tools=_tools(record, where))


def _parse_messages(record: Record, where: str) -> Conversation:
    return Conversation(
        _turns(record.get("messages"), "messages", where), tools=_tools(record, where)
    )


def _parse_prompt_completion(record: Record, where: str) -> Conversation:
    asked = _side(record, "prompt", "user", where)
    answered = _side(record, "completion", "assistant", where)
    # The completion is what is trained; answers in the prompt are only given.
    given = (
        replace(turn, train=bool(turn.train)) if turn.role == "assistant" else turn
        for turn in asked
    )
    return Conversation((*given, *answered), tools=_tools(record, where))


def _parse_text(record: Record, where: str) -> Conversation:
    return Conversation(segments=(Segment(_text(record, "text", where), True),), closed=True)


def _parse_input_output(record: Record, where: str) -> Conversation:
    segments = []
    for number, item in enumerate(_list(record, "segments", where), start=1):
        place = f"{where} segment {number}"
        if not isinstance(item, Mapping):
            raise DataError(f"a segment is an object; this is {kind_of(item)}", where=place)
        if not isinstance(item.get("label"), bool):
            raise DataError("'label' must be true (trained) or false (given)", where=place)
        text = _text(item, "text", place)
        segments.append(Segment(text, item["label"]))
    return Conversation(segments=tuple(segments))


def _parse_preference(record: Record, where: str) -> Conversation:
    chosen = _side(record, "chosen", "assistant", where)
    rejected = _side(record, "rejected", "assistant", where)
    asked = () if record.get("prompt") is None else _side(record, "prompt", "user", where)
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if shared is None:
        shared = min(len(chosen), len(rejected)) - 1
    if asked in ((), chosen[:shared][: len(asked)], chosen[:shared][-len(asked) :]):
        # Both sides are whole conversations, prompt and all: what they share was asked.
        asked, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not asked:
        raise DataError(
            "a preference pair needs a prompt: the key 'prompt', or the same beginning of "
            "'chosen' and 'rejected'",
            where=where,
        )
    if chosen == rejected:
        raise DataError("'chosen' and 'rejected' are the same", where=where)
    return Conversation((*asked, *chosen), tools=_tools(record, where), rejected=rejected)


# Detection tries them in this order: a key that stands for itself before common ones.
FORMATS = {
    "shell": Format(("prompt", "expected_command"), (), _parse_shell),
    "messages": Format(("messages",), ("tools",), _parse_messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), _parse_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _parse_alpaca),
    "preference": Format(("chosen", "rejected"), ("prompt", "tools"), _parse_preference),
    "prompt_completion": Format(("prompt", "completion"), ("tools",), _parse_prompt_completion),
    "input_output": Format(("segments",), (), _parse_input_output),
    "text": Format(("text",), (), _parse_text),
}


def _side(record: Record, key: str, role: str, where: str) -> tuple[Turn, ...]:
    """Text, which a turn of this role says, or a list of messages."""
    if isinstance(record.get(key), list):
        return _turns(record[key], key, where)
    return (Turn(role, _text(record, key, where)),)


def _turns(messages: object, key: str, where: str) -> tuple[Turn, ...]:
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
    key = "value" if "content" not in message and "value" in message else "content"
    calls = _tool_calls(message.get("tool_calls"), where)
    if named == "function_call":  # ShareGPT's: the text is the call
        calls = _tool_calls(_decoded(_text(message, key, where)), where)
        content = ""
    elif message.get(key) is None and calls:
        content = ""
    else:
        content = _content(message, key, where)
    reasoning = next((r for k in REASONING_KEYS if (r := _optional_text(message, k, where))), "")
    return Turn(
        role,
        content,
        train=_trained(message, where),
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_text(message, "tool_call_id", where) or None,
        name=_optional_text(message, "name", where) or None,
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
    return _text(message, key, where)


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
    if value is None or value == []:
        return ()
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise DataError("a tool call needs a function with a name", where=where)
        given = call.get("arguments", {})
        arguments = _decoded(given)
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


def _tools(record: Record, where: str) -> tuple[Mapping[str, Any], ...]:
    tools = _decoded(record.get("tools"))
    if tools in (None, "", []):
        return ()
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


def _list(record: Record, key: str, where: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} must be a list with something in it", where=where)
    return value


def _optional_text(record: Record, key: str, where: str) -> str:
    if record.get(key) is None:
        return ""
    return _text(record, key, where)


def _text(record: Record, key: str, where: str) -> str:
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
