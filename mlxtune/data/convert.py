"""Conversations back to records, in any of the shapes that can hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxtune.data.formats import FORMATS, detect
from mlxtune.data.records import Conversation, ToolCall, Turn
from mlxtune.data.sources import Source
from mlxtune.errors import DataError, OutputExists
from mlxtune.files import atomic_file

Record = dict[str, Any]

_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def convert_file(source: Source, output: Path, format: str, *, overwrite: bool = False) -> int:
    """Write a source's records as JSONL in another shape; returns how many.

    Raises:
        DataError: a record is wrong, or the shape cannot hold it.
        OutputExists: there is a file already.
    """
    if output.exists() and not overwrite:
        raise OutputExists(
            "this exists already; nothing was written",
            where=str(output),
            remedy="choose another name, or pass --overwrite to replace it",
        )
    count = 0
    with atomic_file(output) as handle:
        for conversation in source:
            handle.write(json_line(to_record(conversation, format), conversation.where))
            count += 1
    return count


def json_line(record: Record, where: str = "") -> bytes:
    """A record as a line of JSONL; UTF-8, but for half characters, which stay escaped.

    Raises:
        DataError: a field is of a kind that JSON does not have, such as bytes of a table.
    """
    try:
        text = json.dumps(record, ensure_ascii=False)
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(record)}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"JSON cannot hold a field of it: {error}", where=where) from None


def to_record(conversation: Conversation, format: str) -> Record:
    """A conversation as a record; reading it again gives an equal conversation.

    Tags keep their names. What only our own reading knows is not kept: Alpaca's `input`
    becomes part of the instruction.

    Raises:
        DataError: the shape cannot hold it without loss; says what it cannot hold.
    """
    made = _WRITERS[format](conversation)
    shape = FORMATS[format]
    taken = {*shape.keys, *shape.optional} & conversation.tags.keys()
    if taken:
        raise DataError(
            f"its field {sorted(taken)[0]!r} means something else in {format} records",
            where=conversation.where,
            remedy="rename it first",
        )
    record = made | dict(conversation.tags)
    told = detect(record)
    if told != format:
        raise DataError(
            f"with its other fields it would be read as {told}",
            where=conversation.where,
            remedy=f"rename one of them first: {', '.join(FORMATS[told].keys)}",
        )
    return record


def _to_messages(conversation: Conversation) -> Record:
    _require_turns(conversation, "messages")
    record: Record = {"messages": [_message(turn) for turn in conversation.turns]}
    return record | _tools(conversation)


def _message(turn: Turn) -> Record:
    message: Record = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": _call(call)} | ({"id": call.id} if call.id else {})
            for call in turn.tool_calls
        ]
    for name in ("tool_call_id", "name", "train"):
        if getattr(turn, name) is not None:
            message[name] = getattr(turn, name)
    return message


def _to_sharegpt(conversation: Conversation) -> Record:
    _require_turns(conversation, "sharegpt")
    turns = conversation.turns
    record: Record = {}
    # Its system prompt stands beside the turns; a second one, or one that says of itself
    # whether it is trained, stays among them. One that is said twice is read once there.
    first = turns[0].content
    if first and len(turns) > 1 and turns[0] == Turn("system", first) != turns[1]:
        record["system"], turns = first, turns[1:]
    record["conversations"] = [_sharegpt_turn(turn, conversation) for turn in turns]
    return record | _tools(conversation)


def _sharegpt_turn(turn: Turn, conversation: Conversation) -> Record:
    sender, value = _SHAREGPT_ROLES[turn.role], turn.content
    if turn.tool_calls:
        plain = turn.role == "assistant" and not turn.content
        if not plain or any(call.id for call in turn.tool_calls):
            _refuse("sharegpt", "a tool call with words or an id beside it", conversation)
        calls = [_call(call) for call in turn.tool_calls]
        sender = "function_call"
        value = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
    if turn.reasoning or turn.name is not None or turn.tool_call_id is not None:
        _refuse("sharegpt", "reasoning, or names and ids of tools", conversation)
    made: Record = {"from": sender, "value": value}
    return made if turn.train is None else made | {"train": turn.train}


def _to_alpaca(conversation: Conversation) -> Record:
    turns = list(_plain_turns(conversation, "alpaca"))
    record: Record = {}
    if turns[0].role == "system" and turns[0].content:
        record["system"] = turns.pop(0).content
    roles = [turn.role for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        _refuse("alpaca", "turns other than a question and its answer in turn", conversation)
    pairs = [[a.content, b.content] for a, b in zip(turns[::2], turns[1::2], strict=True)]
    *history, (question, answer) = pairs
    record |= {"instruction": question, "output": answer}
    return record | ({"history": history} if history else {})


def _to_shell(conversation: Conversation) -> Record:
    turns = _plain_turns(conversation, "shell")
    if [turn.role for turn in turns] != ["user", "assistant"]:
        _refuse("shell", "more than one question and its answer", conversation)
    return {"prompt": turns[0].content, "expected_command": turns[1].content}


def _to_prompt_completion(conversation: Conversation) -> Record:
    _require_turns(conversation, "prompt_completion")
    *asked, answered = conversation.turns
    given = all(turn.train is False for turn in asked if turn.role == "assistant")
    if answered.role != "assistant" or not asked or not given:
        _refuse("prompt_completion", "trained answers before the last", conversation)
    plain = (Turn("user", asked[0].content), Turn("assistant", answered.content))
    if conversation.turns == plain and not conversation.tools:
        return {"prompt": asked[0].content, "completion": answered.content}
    record = {"prompt": [_message(t) for t in asked], "completion": [_message(answered)]}
    return record | _tools(conversation)


def _to_text(conversation: Conversation) -> Record:
    if not conversation.closed or len(conversation.segments) != 1:
        _refuse("text", "turns or segments", conversation)
    return {"text": conversation.segments[0].text}


def _to_input_output(conversation: Conversation) -> Record:
    if not conversation.segments or conversation.closed:
        _refuse("input_output", "turns for a chat template, or whole documents", conversation)
    return {"segments": [{"label": s.train, "text": s.text} for s in conversation.segments]}


def _to_preference(conversation: Conversation) -> Record:
    if not conversation.rejected:
        _refuse("preference", "a conversation without a rejected side", conversation)
    asked = len(conversation.turns) - conversation.chosen
    if asked < 1:
        _refuse("preference", "a prompt without a turn in it", conversation)
    sides = {
        "prompt": conversation.turns[:asked],
        "chosen": conversation.turns[asked:],
        "rejected": conversation.rejected,
    }
    return {k: [_message(t) for t in turns] for k, turns in sides.items()} | _tools(conversation)


_WRITERS: dict[str, Callable[[Conversation], Record]] = {
    "shell": _to_shell,
    "messages": _to_messages,
    "sharegpt": _to_sharegpt,
    "alpaca": _to_alpaca,
    "preference": _to_preference,
    "prompt_completion": _to_prompt_completion,
    "input_output": _to_input_output,
    "text": _to_text,
}


def _require_turns(conversation: Conversation, format: str) -> None:
    if not conversation.turns:
        _refuse(format, "plain text", conversation)
    if conversation.rejected:
        _refuse(format, "a rejected side", conversation)


def _plain_turns(conversation: Conversation, format: str) -> tuple[Turn, ...]:
    """The turns of a conversation that has nothing but roles and texts."""
    _require_turns(conversation, format)
    if conversation.tools or any(t != Turn(t.role, t.content) for t in conversation.turns):
        _refuse(format, "tools, reasoning or 'train' on a message", conversation)
    return conversation.turns


def _tools(conversation: Conversation) -> Record:
    return {"tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else {}


def _call(call: ToolCall) -> Record:
    arguments = call.arguments
    return {
        "name": call.name,
        "arguments": arguments if isinstance(arguments, str) else dict(arguments),
    }


def _refuse(format: str, what: str, conversation: Conversation) -> None:
    raise DataError(f"{format} records cannot hold {what}", where=conversation.where)
