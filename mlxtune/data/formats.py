"""The shapes that training records come in, each read into a `Conversation`.

Names and keys are those of the tools that people bring their files from: Alpaca's
instructions, ShareGPT's conversations, OpenAI's messages, TRL's prompt and completion
and preference pairs, Axolotl's input_output segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.messages import (
    Record,
    kind_of,
    read_optional_text,
    read_text,
    read_tools,
    read_turns,
    without_nulls,
)
from mlxtune.data.records import Conversation, Segment, Turn
from mlxtune.errors import DataError


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
    system: str | None = None,
    allow_empty: bool = False,
    where: str = "",
) -> Conversation:
    """One record as a conversation.

    A field that is null is taken for one that is not there, see `messages.without_nulls`.
    Names of fields that no format has as they stand are tried in lower case, spaces as `_`.

    Args:
        record: a decoded JSON value.
        format: a name from `FORMATS`, or `auto` to tell by the record's keys.
        columns: what fields of the format are called in the record; dots go into
            objects.
        system: a system prompt, for records that have none of their own.
        allow_empty: let turns without a word pass, for those who look for them.
        where: `file:line`, for messages.

    Raises:
        DataError: the record is no object, of no known shape, has a wrong type in it, or says
            nothing where it should.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record is a JSON object; this is {kind_of(record)}", where=where)
    try:
        values: Record = without_nulls(dict(record))
        if columns:
            values = _renamed(values, columns, where)
        if format == "auto":
            format = detect(values, where, nulls=[k for k, v in record.items() if v is None])
            values = _in_known_names(values)
        shape = FORMATS[format]
        conversation = shape.parse(values, where)
        if "system" in shape.optional:
            own = read_optional_text(values, "system", where)
            conversation = _with_system(conversation, own)
        if "tools" in shape.optional:
            conversation = replace(conversation, tools=read_tools(values, where))
    except RecursionError:
        raise DataError("this record is nested too deeply", where=where) from None
    if system is not None:
        if conversation.segments:
            raise DataError(
                "this record is plain text, which has no system prompt",
                where=where,
                remedy="leave system out of its [[data]]",
            )
        if all(turn.role != "system" for turn in conversation.turns):
            conversation = _with_system(conversation, system)
    if not allow_empty:
        _require_words(conversation, where)
    used = {*shape.keys, *shape.optional}
    tags = {k: v for k, v in values.items() if k not in used}
    return replace(conversation, where=where, tags=tags)


def _with_system(conversation: Conversation, system: str) -> Conversation:
    """The conversation under a system prompt; plain text has none."""
    turns = conversation.turns
    if not system or not turns or (turns[0].role, turns[0].content) == ("system", system):
        return conversation
    return replace(conversation, turns=(Turn("system", system), *turns))


def _in_known_names(record: Record) -> Record:
    """The record with the names that formats know, where a spreadsheet has `Expected Command`."""
    if any(all(key in record for key in shape.keys) for shape in FORMATS.values()):
        return record
    plain = {str(key).strip().lower().replace(" ", "_"): value for key, value in record.items()}
    return plain if len(plain) == len(record) else record


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


def detect(record: Record, where: str = "", *, nulls: Sequence[str] = ()) -> str:
    """The format that a record's keys tell of.

    Args:
        record: its fields, none of them null.
        where: `file:line`, for the message.
        nulls: names of fields that were null, for the message.

    Raises:
        DataError: none.
    """
    known = _in_known_names(record)
    for name, format in FORMATS.items():
        if all(key in known for key in format.keys):
            return name
    shapes = "; ".join(f"{name} {{{', '.join(format.keys)}}}" for name, format in FORMATS.items())
    raise DataError(
        f"a record with the keys {', '.join(map(str, record)) or '(none)'}"
        + (f", and null in {', '.join(nulls)}," if nulls else "")
        + " has no known shape",
        where=where,
        remedy=f"known shapes: {shapes}. Others can be mapped: "
        'columns = {prompt = "question", completion = "answer"}',
    )


def _parse_shell(record: Record, where: str) -> Conversation:
    answer = read_text(record, "expected_command", where)
    return Conversation(
        (Turn("user", read_text(record, "prompt", where)), Turn("assistant", answer))
    )


def _parse_alpaca(record: Record, where: str) -> Conversation:
    turns = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list; it is {kind_of(history)}", where=where)
    for number, pair in enumerate(history, start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(x) is str for x in pair)):
            raise DataError(
                f"item {number} of 'history' must be a question and an answer", where=where
            )
        said = {"question": pair[0], "answer": pair[1]}
        turns.append(Turn("user", read_text(said, "question", where)))
        turns.append(Turn("assistant", read_text(said, "answer", where)))
    question = read_text(record, "instruction", where)
    if extra := read_optional_text(record, "input", where):
        question += f"\n{extra}"
    turns += [Turn("user", question), Turn("assistant", read_text(record, "output", where))]
    return Conversation(tuple(turns))


def _parse_sharegpt(record: Record, where: str) -> Conversation:
    return Conversation(read_turns(record.get("conversations"), "conversations", where))


def _parse_messages(record: Record, where: str) -> Conversation:
    return Conversation(read_turns(record.get("messages"), "messages", where))


def _parse_prompt_completion(record: Record, where: str) -> Conversation:
    asked = _side(record, "prompt", "user", where)
    answered = _side(record, "completion", "assistant", where)
    # The completion is what is trained; answers in the prompt are only given.
    given = (
        replace(turn, train=bool(turn.train)) if turn.role == "assistant" else turn
        for turn in asked
    )
    return Conversation((*given, *answered))


def _parse_text(record: Record, where: str) -> Conversation:
    return Conversation(segments=(Segment(read_text(record, "text", where), True),), closed=True)


def _parse_input_output(record: Record, where: str) -> Conversation:
    segments = []
    for number, item in enumerate(_list(record, "segments", where), start=1):
        place = f"{where} segment {number}"
        if not isinstance(item, Mapping):
            raise DataError(f"a segment is an object; this is {kind_of(item)}", where=place)
        if not isinstance(item.get("label"), bool):
            raise DataError("'label' must be true (trained) or false (given)", where=place)
        text = read_text(item, "text", place)
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
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn.role == "assistant" for turn in side):
            raise DataError(f"{name!r} has no answer of the assistant", where=where)
    return Conversation((*asked, *chosen), rejected=rejected, chosen=len(chosen))


# Beside the turns. A `system` of `shell` records is more likely the operating system.
_BESIDE = ("system", "tools", "functions")

# Detection tries them in this order: a key that stands for itself before common ones.
FORMATS = {
    "shell": Format(("prompt", "expected_command"), (), _parse_shell),
    "messages": Format(("messages",), _BESIDE, _parse_messages),
    "sharegpt": Format(("conversations",), _BESIDE, _parse_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "history", *_BESIDE), _parse_alpaca),
    "preference": Format(("chosen", "rejected"), ("prompt", *_BESIDE), _parse_preference),
    "prompt_completion": Format(("prompt", "completion"), _BESIDE, _parse_prompt_completion),
    "input_output": Format(("segments",), (), _parse_input_output),
    "text": Format(("text",), (), _parse_text),
}


def _side(record: Record, key: str, role: str, where: str) -> tuple[Turn, ...]:
    """Text, which a turn of this role says, or a list of messages."""
    if isinstance(record.get(key), list):
        return read_turns(record[key], key, where)
    return (Turn(role, read_text(record, key, where)),)


def _list(record: Record, key: str, where: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} must be a list with something in it", where=where)
    return value
