"""Every shape of record: what it becomes, and what is said of one that is not right."""

from __future__ import annotations

import json

import pytest

from mlxtune.data.convert import to_record
from mlxtune.data.formats import FORMATS, detect, parse_record
from mlxtune.data.records import Conversation, Segment, ToolCall, Turn
from mlxtune.errors import DataError

ASK, ANSWER = Turn("user", "list files"), Turn("assistant", "ls")
QUESTION = {"role": "user", "content": "list files"}
REPLY = {"role": "assistant", "content": "ls"}
WORSE = {"role": "assistant", "content": "dir"}
CALL = ToolCall("weather", {"city": "Köln", "days": 3})
CALLED = {"name": "weather", "arguments": {"city": "Köln", "days": 3}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

ALPACA = {"instruction": "list", "input": "files", "output": "ls"}
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALLED)},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ],
    "tools": json.dumps([TOOL]),
}
MESSAGES = {"messages": [QUESTION, REPLY]}
SEGMENTS = {"segments": [{"label": False, "text": "<s>Q:"}, {"label": True, "text": " A</s>"}]}
PREFERENCE = {"prompt": "list files", "chosen": "ls", "rejected": "dir"}
PAIR = {"prompt": "list files", "completion": "ls"}
OF_EACH = {
    "shell": {"prompt": "list files", "expected_command": "ls"},
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "preference": PREFERENCE,
    "prompt_completion": PAIR,
    "input_output": SEGMENTS,
    "text": {"text": "Once upon a time."},
}


def turns(*messages: object, **rest: object) -> tuple[Turn, ...]:
    return parse_record({"messages": list(messages), **rest}).turns


def assistant(**fields: object) -> Turn:
    return turns(QUESTION, {"role": "assistant"} | fields)[1]


def refusal(record: object, **how: object) -> tuple[str, str]:
    """Place and text of what is wrong with a record at `f:7`."""
    with pytest.raises(DataError) as raised:
        parse_record(record, where="f:7", **how)
    return raised.value.where, raised.value.what


def test_there_is_a_record_of_every_format_here():
    assert OF_EACH.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", OF_EACH)
def test_a_format_is_told_by_its_keys_and_may_be_named(format):
    record = OF_EACH[format] | {"id": 7}
    assert detect(record) == format
    told = parse_record(record, where="f:7")
    assert told == parse_record(record, format=format, where="f:7")
    assert (told.where, told.tags) == ("f:7", {"id": 7})


@pytest.mark.parametrize("format", OF_EACH)
def test_a_record_that_is_written_again_is_equal(format):
    conversation = parse_record(OF_EACH[format] | {"id": 7, "date": {"year": 2026}})
    record = json.loads(json.dumps(to_record(conversation, format)))
    assert parse_record(record) == conversation
    assert parse_record(record, format=format) == conversation


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "preference"])
def test_the_format_named_reads_its_own_keys_of_a_record_that_has_those_of_all(format):
    everything = {k: v for record in OF_EACH.values() for k, v in record.items()}
    own = {*FORMATS[format].keys, *FORMATS[format].optional}
    wanted = parse_record({k: v for k, v in everything.items() if k in own}, format=format)
    conversation = parse_record(everything, format=format)
    assert (conversation.turns, conversation.segments) == (wanted.turns, wanted.segments)


# Alpaca


def test_alpaca_with_system_history_and_input():
    record = ALPACA | {"system": "Be brief.", "history": [["hi", "hello"], ["who", "me"]]}
    assert parse_record(record).turns == (
        Turn("system", "Be brief."),
        Turn("user", "hi"),
        Turn("assistant", "hello"),
        Turn("user", "who"),
        Turn("assistant", "me"),
        Turn("user", "list\nfiles"),
        ANSWER,
    )


@pytest.mark.parametrize("nothing", [{}, {"input": "", "system": None, "history": []}])
def test_alpaca_without_anything_beside_its_instruction(nothing):
    record = {"instruction": "list files", "output": "ls"} | nothing
    conversation = parse_record(record)
    assert (conversation.turns, conversation.tags) == ((ASK, ANSWER), {})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"history": "hi"}, "'history' must be a list; it is a string"),
        ({"history": [["a", "b"], ["c"]]}, "item 2 of 'history' must be a question and an answer"),
        ({"history": [["a", None]]}, "item 1 of 'history' must be a question and an answer"),
        ({"history": [["a", " "]]}, "turn 2, the assistant's, is empty"),
        ({"input": 3}, "'input' is a number; it must be a string"),
        ({"system": ["x"]}, "'system' is a list; it must be a string"),
        ({"output": ""}, "turn 2, the assistant's, is empty"),
    ],
)
def test_alpaca_that_is_not_right(change, what):
    assert refusal(ALPACA | change) == ("f:7", what)


# ShareGPT


def test_sharegpt_with_a_system_prompt_a_call_and_its_result():
    conversation = parse_record(SHAREGPT)
    assert conversation.tools == (TOOL,)
    assert conversation.turns == (
        Turn("system", "Be brief."),
        Turn("user", "Weather?"),
        Turn("assistant", "", tool_calls=(CALL,)),
        Turn("tool", "rain"),
        Turn("assistant", "It rains."),
    )


@pytest.mark.parametrize(
    ("sender", "role"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("function", "tool"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("user", "user"),
        ("assistant", "assistant"),
    ],
)
def test_senders_have_our_roles(sender, role):
    record = {"conversations": [{"from": sender, "value": "x"}]}
    assert parse_record(record).turns == (Turn(role, "x"),)


def test_several_calls_stand_in_one_list():
    value = json.dumps([CALLED, {"name": "time", "arguments": "{}"}])
    record = {"conversations": [QUESTION, {"from": "function_call", "value": value}]}
    assert parse_record(record).turns[1].tool_calls == (CALL, ToolCall("time", {}))


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"from": "alien", "value": "x"}, "unknown role 'alien'"),
        ({"value": "x"}, "unknown role None"),
        ({"from": "gpt"}, "'value' is missing; it must be a string"),
        ({"from": "gpt", "value": None}, "'value' is missing; it must be a string"),
        (
            {"from": "function_call", "value": "{weather"},
            "a tool call needs a function with a name",
        ),
        ({"from": "function_call", "value": CALLED}, "'value' is an object; it must be a string"),
        ("hello", "a message is an object; this is a string"),
    ],
)
def test_a_sharegpt_message_that_is_not_right(message, what):
    record = {"conversations": [QUESTION, message]}
    assert refusal(record) == ("f:7 message 2", what)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"conversations": []},
            "'conversations' must be a list with messages in it; this is empty",
        ),
        ({"tools": "weather"}, "'tools' must be a list of function schemas"),
        ({"tools": ["weather"]}, "'tools' must be a list of function schemas"),
        ({"system": 3}, "'system' is a number; it must be a string"),
    ],
)
def test_sharegpt_that_is_not_right(change, what):
    assert refusal(SHAREGPT | change) == ("f:7", what)


# Messages


@pytest.mark.parametrize("arguments", [CALLED["arguments"], json.dumps(CALLED["arguments"])])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_tool_call_and_its_result(arguments, content):
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    said = {"role": "assistant", "tool_calls": [call]} | content
    result = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
    assert turns(QUESTION, said, result)[1:] == (
        Turn("assistant", "", tool_calls=(ToolCall("weather", CALL.arguments, "c1"),)),
        Turn("tool", "rain", tool_call_id="c1", name="weather"),
    )


def test_the_result_of_a_tool_may_be_an_object():
    result = {"role": "tool", "content": {"sky": "grau, naß"}}
    assert turns(QUESTION, result, REPLY)[1].content == '{"sky": "grau, naß"}'


@pytest.mark.parametrize("arguments", ["city=Köln", '"{}"'])
def test_arguments_that_hold_no_object_stay_the_text_they_are(arguments):
    call = {"name": "weather", "arguments": arguments}
    conversation = parse_record({"messages": [QUESTION, {"role": "model", "tool_calls": [call]}]})
    assert conversation.turns[1].tool_calls == (ToolCall("weather", arguments),)
    assert parse_record(to_record(conversation, "messages")) == conversation


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_may_be_json_text(tools):
    assert parse_record(MESSAGES | {"tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_no_tools_may_be_said_in_many_ways(tools):
    conversation = parse_record(MESSAGES | {"tools": tools})
    assert (conversation.tools, conversation.tags) == ((), {})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_beside_the_answer(key):
    assert assistant(content="ls", **{key: "Files, so ls."}).reasoning == "Files, so ls."
    assert assistant(content="", **{key: "Hm."}) == Turn("assistant", "", reasoning="Hm.")


@pytest.mark.parametrize(
    ("said", "train"),
    [
        ({}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"train": None}, None),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": None}, None),
        ({"train": True, "weight": 0}, True),
    ],
)
def test_a_message_may_say_whether_it_is_trained(said, train):
    assert assistant(content="ls", **said).train is train


def test_content_may_come_in_parts_of_text():
    parts = [{"type": "text", "text": "list "}, {"type": "text", "text": "files"}]
    assert turns({"role": "user", "content": parts}, REPLY) == (ASK, ANSWER)


def test_a_developer_is_a_system():
    assert turns({"role": "developer", "content": "x"}, REPLY)[0] == Turn("system", "x")


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"content": [{"type": "text", "text": "see"}, IMAGE]},
            "a part of 'content' is no text (image_url); only text can be trained on",
        ),
        (
            {"content": ["see"]},
            "a part of 'content' is no text (a string); only text can be trained on",
        ),
        ({"content": "x", "train": 1}, "'train' must be true or false; it is a number"),
        ({"content": "x", "weight": 0.5}, "'weight' of a message must be 0 or 1; it is 0.5"),
        ({"content": "x", "weight": True}, "'weight' of a message must be 0 or 1; it is True"),
        ({"content": "x", "weight": "1"}, "'weight' of a message must be 0 or 1; it is '1'"),
        ({"content": "x", "reasoning": 3}, "'reasoning' is a number; it must be a string"),
        ({"content": "x", "name": ["a"]}, "'name' is a list; it must be a string"),
        ({"content": "x", "tool_call_id": 1}, "'tool_call_id' is a number; it must be a string"),
        ({"tool_calls": []}, "'content' is missing; it must be a string"),
        ({"tool_calls": [{"name": 3}]}, "a tool call needs a function with a name"),
        ({"tool_calls": ["weather"]}, "a tool call needs a function with a name"),
        ({"tool_calls": [{"function": "weather"}]}, "a tool call needs a function with a name"),
        (
            {"tool_calls": [{"name": "weather", "arguments": [1]}]},
            "the arguments of the tool call 'weather' must be an object; they are a list",
        ),
        (
            {"tool_calls": [{"name": "weather", "arguments": "3"}]},
            "the arguments of the tool call 'weather' must be an object; they are a number",
        ),
    ],
)
def test_a_message_that_is_not_right(fields, what):
    assert refusal({"messages": [QUESTION, {"role": "assistant"} | fields]}) == (
        "f:7 message 2",
        what,
    )


@pytest.mark.parametrize(
    "call",
    [
        {"name": "\ud83c", "arguments": {}},
        {"name": "f", "arguments": {"a": ["\ud83c"]}},
        {"name": "f", "arguments": '{"\\ud83c": 1}'},
        {"name": "f", "arguments": {}, "id": "\ud83c"},
    ],
    ids=["name", "arguments", "text", "id"],
)
def test_half_a_character_in_a_tool_call_is_told(call):
    where, what = refusal({"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}]})
    assert where == "f:7 message 2"
    assert what.startswith("a tool call holds half a character")


def test_half_a_character_in_a_tool_is_told():
    where, what = refusal(MESSAGES | {"tools": [{"name": "\ud83c"}]})
    assert where == "f:7"
    assert what.startswith("'tools' holds half a character")


OLDER = {
    "functions": [TOOL["function"]],
    "messages": [
        QUESTION,
        {"role": "assistant", "content": None, "function_call": CALLED},
        {"role": "function", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
}
NEWER = {
    "tools": [TOOL],
    "messages": [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALLED}]},
        {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
}


@pytest.mark.parametrize("text", [False, True])
def test_openais_older_function_calls_are_the_newer_tool_calls(text):
    """Both forms of https://platform.openai.com/docs/api-reference/chat/create"""
    older = json.loads(json.dumps(OLDER))
    if text:
        called = older["messages"][1]["function_call"]
        called["arguments"] = json.dumps(called["arguments"])
        older["functions"] = json.dumps(older["functions"])
    assert parse_record(older) == parse_record(NEWER)
    assert "functions" not in parse_record(older).tags


def test_calls_may_be_json_text():
    calls = json.dumps([{"type": "function", "function": CALLED}])
    assert assistant(tool_calls=calls).tool_calls == (CALL,)


def with_nulls(value):
    """What a table makes of a record among others: all fields of all of them."""
    if isinstance(value, dict):
        return {k: with_nulls(v) for k, v in value.items()} | {"zone": None, "enum": None}
    return [with_nulls(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_field_that_is_null_is_not_there_in_calls_and_schemas_too(format):
    record = NEWER if format == "messages" else SHAREGPT
    assert parse_record(with_nulls(record)) == parse_record(record)


def test_null_in_json_text_and_in_lists_stays():
    call = {"name": "f", "arguments": '{"zone": null}'}
    assert assistant(tool_calls=[call]).tool_calls[0].arguments == {"zone": None}
    call = {"name": "f", "arguments": {"zones": [None, 1]}}
    assert assistant(tool_calls=[call]).tool_calls[0].arguments == {"zones": [None, 1]}


@pytest.mark.parametrize("nothing", ["", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object_of_them(nothing):
    call = {"name": "f", "arguments": nothing}
    assert assistant(tool_calls=[call]).tool_calls == (ToolCall("f", {}),)


@pytest.mark.parametrize("format", ["messages", "prompt_completion", "preference", "alpaca"])
def test_a_system_prompt_may_stand_beside_the_turns(format):
    conversation = parse_record(OF_EACH[format] | {"system": "Be brief."})
    plain = parse_record(OF_EACH[format])
    assert conversation.turns == (Turn("system", "Be brief."), *plain.turns)
    assert conversation.tags == {}


def test_a_system_prompt_that_stands_beside_the_turns_too_is_said_once():
    system = {"role": "system", "content": "Be brief."}
    record = {"messages": [system, QUESTION, REPLY]}
    assert parse_record(record | {"system": "Be brief."}) == parse_record(record)


def test_a_system_prompt_for_all_is_for_records_without_one():
    assert parse_record(PAIR, system="Be brief.").turns[0] == Turn("system", "Be brief.")
    own = PAIR | {"system": "Be long."}
    assert parse_record(own, system="Be brief.") == parse_record(own)
    with pytest.raises(DataError, match="plain text, which has no system prompt"):
        parse_record({"text": "x"}, system="Be brief.")


# Prompt and completion


def test_prompt_and_completion_may_be_lists_of_messages():
    earlier = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    record = {"prompt": [*earlier, QUESTION], "completion": [REPLY], "tools": [TOOL]}
    conversation = parse_record(record)
    assert conversation.tools == (TOOL,)
    # What stands in the prompt is given, whatever its role.
    hello = Turn("assistant", "hello", train=False)
    assert conversation.turns == (Turn("user", "hi"), hello, ASK, ANSWER)


def test_text_and_messages_may_be_mixed_in_a_pair():
    assert parse_record({"prompt": [QUESTION], "completion": "ls"}).turns == (ASK, ANSWER)
    assert parse_record({"prompt": "list files", "completion": [REPLY]}).turns == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"prompt": []}, "f:7", "'prompt' must be a list with messages in it; this is empty"),
        ({"prompt": {}}, "f:7", "'prompt' is an object; it must be a string"),
        ({"completion": [QUESTION | {"role": 1}]}, "f:7 message 1", "unknown role 1"),
        ({"completion": "\n"}, "f:7", "turn 2, the assistant's, is empty"),
    ],
)
def test_a_pair_that_is_not_right(change, where, what):
    assert refusal(PAIR | change) == (where, what)


# Text and segments


def test_text_is_a_whole_document():
    text = parse_record({"text": " Once.\n"})
    assert (text.segments, text.closed) == ((Segment(" Once.\n", True),), True)
    assert (text.turns, text.text()) == ((), " Once.\n")


def test_segments_stand_as_they_are():
    conversation = parse_record(SEGMENTS)
    assert conversation.segments == (Segment("<s>Q:", False), Segment(" A</s>", True))
    assert not conversation.closed


@pytest.mark.parametrize(
    ("record", "where", "what"),
    [
        (
            {"text": None},
            "f:7",
            "a record with the keys (none), and null in text, has no known shape",
        ),
        ({"text": " \n"}, "f:7", "the text is empty"),
        ({"segments": []}, "f:7", "'segments' must be a list with something in it"),
        ({"segments": "x"}, "f:7", "'segments' must be a list with something in it"),
        ({"segments": [{"label": True, "text": ""}]}, "f:7", "the text is empty"),
        ({"segments": ["x"]}, "f:7 segment 1", "a segment is an object; this is a string"),
        (
            {"segments": [*SEGMENTS["segments"], {"text": "x"}]},
            "f:7 segment 3",
            "'label' must be true (trained) or false (given)",
        ),
        (
            {"segments": [{"label": 1, "text": "x"}]},
            "f:7 segment 1",
            "'label' must be true (trained) or false (given)",
        ),
        (
            {"segments": [{"label": True}]},
            "f:7 segment 1",
            "'text' is missing; it must be a string",
        ),
    ],
)
def test_plain_text_that_is_not_right(record, where, what):
    assert refusal(record) == (where, what)


# Preference pairs

BOTH = {"chosen": [QUESTION, REPLY], "rejected": [QUESTION, WORSE]}


@pytest.mark.parametrize(
    "record",
    [
        PREFERENCE,
        PREFERENCE | {"prompt": [QUESTION], "chosen": [REPLY]},
        BOTH,
        BOTH | {"prompt": None},
        BOTH | {"prompt": "list files"},  # said beside both sides and at their beginning
        BOTH | {"prompt": [QUESTION]},
    ],
    ids=["text", "mixed", "shared", "null", "both-text", "both-list"],
)
def test_a_preference_pair_has_one_prompt_and_two_ends(record):
    assert parse_record(record) == Conversation((ASK, ANSWER), rejected=(Turn("assistant", "dir"),))


def test_a_shared_beginning_may_be_long_and_the_ends_of_different_length():
    system = {"role": "system", "content": "Be brief."}
    beginning = [system, QUESTION, WORSE, {"role": "user", "content": "again"}]
    record = {
        "chosen": [*beginning, REPLY, QUESTION, REPLY],
        "rejected": [*beginning, WORSE],
        "prompt": "again",
    }
    conversation = parse_record(record)
    assert conversation.turns[:4] == turns(*beginning)
    assert [t.content for t in conversation.turns[4:]] == ["ls", "list files", "ls"]
    assert [t.content for t in conversation.rejected] == ["dir"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rejected": "ls"}, "'chosen' and 'rejected' are the same"),
        ({"rejected": [REPLY]}, "'chosen' and 'rejected' are the same"),
        ({"rejected": " "}, "turn 3, the assistant's, is empty"),
        (
            {"chosen": None},
            "a record with the keys prompt, rejected, and null in chosen, has no known shape",
        ),
        ({"prompt": ""}, "nothing is asked: the prompt is empty"),
    ],
)
def test_a_preference_pair_that_is_not_right(change, what):
    assert refusal(PREFERENCE | change) == ("f:7", what)


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "ls", "rejected": "dir"},
        {"chosen": [REPLY], "rejected": [WORSE]},
        {"chosen": [QUESTION, REPLY], "rejected": [QUESTION | {"content": "x"}, WORSE]},
    ],
)
def test_a_preference_pair_needs_a_prompt(record):
    where, what = refusal(record)
    assert where == "f:7"
    assert what.startswith("a preference pair needs a prompt")


# Columns


@pytest.mark.parametrize(
    "record",
    [
        {"question": "list files", "answer": "ls"},
        {"question": "list files", "answer": "ls", "prompt": "not this one"},
    ],
)
def test_columns_may_have_other_names(record):
    conversation = parse_record(record, columns={"prompt": "question", "completion": "answer"})
    assert (conversation.turns, conversation.tags) == ((ASK, ANSWER), {})


def test_columns_may_change_places():
    record = {"prompt": "ls", "completion": "list files"}
    columns = {"prompt": "completion", "completion": "prompt"}
    assert parse_record(record, columns=columns).turns == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({" Prompt ": "a", "Expected Command": "b"}, "shell"),
        ({"Instruction": "a", "OUTPUT": "b", "Input": ""}, "alpaca"),
        ({"Prompt": "a", "Completion": "b", "Topic": "c"}, "prompt_completion"),
    ],
)
def test_names_of_a_spreadsheet_are_recognised(record, format):
    conversation = parse_record(record)
    assert [turn.content for turn in conversation.turns] == ["a", "b"]
    plain = {k.strip().lower().replace(" ", "_"): v for k, v in record.items()}
    assert conversation == parse_record(plain, format=format)


def test_dots_go_into_objects_unless_a_column_is_called_so():
    record = {"task": {"text": {"en": "list files"}}, "task.answer": "ls", "id": 7}
    columns = {"prompt": "task.text.en", "completion": "task.answer"}
    conversation = parse_record(record, columns=columns)
    assert conversation.turns == (ASK, ANSWER)
    assert conversation.tags["id"] == 7


@pytest.mark.parametrize("column", ["question", "task.question", "id.question", "task."])
def test_a_column_that_is_not_there_is_told_with_those_that_are(column):
    with pytest.raises(DataError) as raised:
        parse_record(
            {"id": 7, "task": {}}, columns={"prompt": column}, where="f:7", format="alpaca"
        )
    assert raised.value.where == "f:7"
    assert raised.value.what == f"there is no column {column!r}, which columns.prompt names"
    assert raised.value.remedy == "this record has id, task"


# Written again


@pytest.mark.parametrize(
    ("record", "format", "what"),
    [
        (MESSAGES | {"conversations": [QUESTION]}, "alpaca", "would be read as sharegpt"),
        (MESSAGES | {"input": "x"}, "alpaca", "'input' means something else in alpaca records"),
        (SHAREGPT, "alpaca", "cannot hold tools"),
        (SHAREGPT, "shell", "cannot hold tools"),
        (PREFERENCE, "messages", "cannot hold a rejected side"),
        (SEGMENTS, "messages", "cannot hold plain text"),
        (SEGMENTS, "text", "cannot hold turns or segments"),
        ({"text": "x"}, "input_output", "cannot hold turns for a chat template, or whole"),
        (PAIR, "preference", "cannot hold a conversation without a rejected side"),
        (ALPACA | {"history": [["a", "b"]]}, "prompt_completion", "cannot hold trained answers"),
        (ALPACA | {"system": "x"}, "shell", "cannot hold more than one question and its answer"),
    ],
)
def test_a_shape_that_cannot_hold_a_conversation_says_so(record, format, what):
    with pytest.raises(DataError, match=what) as raised:
        to_record(parse_record(record, where="f:7"), format)
    assert raised.value.where == "f:7"


CALLER = {"role": "user", "content": "", "tool_calls": [CALLED]}


@pytest.mark.parametrize(
    "messages", [[CALLER, REPLY], [QUESTION, CALLER | {"role": "assistant", "content": "Wait."}]]
)
def test_sharegpt_refuses_a_call_that_it_cannot_tell_from_another(messages):
    with pytest.raises(DataError, match="cannot hold a tool call"):
        to_record(parse_record({"messages": messages}), "sharegpt")


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_a_system_prompt_alone_is_written_and_read_again(name):
    conversation = parse_record({"messages": [{"role": "system", "content": "x"}]})
    assert parse_record(to_record(conversation, name)) == conversation
