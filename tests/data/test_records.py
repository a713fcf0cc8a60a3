"""Records: their shapes, and what is said of one that has none."""

from __future__ import annotations

import json

import pytest

from mlxtune.data.formats import parse_record
from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.records import Turn
from mlxtune.data.sources import read_conversations
from mlxtune.errors import DataError
from support.files import write_jsonl

SHELL = {"prompt": "list files", "expected_command": "ls"}
PAIR = {"prompt": "list files", "completion": "ls"}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "list files"},
        {"role": "assistant", "content": "ls"},
    ]
}
TURNS = (Turn("user", "list files"), Turn("assistant", "ls"))


def message(role: object, content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": role, "content": content}]}


@pytest.fixture
def error(tmp_path):
    """Place (without the folder) and text of what is wrong with a file of these bytes."""

    def read(data: bytes | str, format: str = "auto") -> tuple[str, str]:
        path = tmp_path / "data.jsonl"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(DataError) as raised:
            read_conversations(path, format=format)
        assert raised.value.where.startswith(str(path))
        return raised.value.where.removeprefix(f"{tmp_path}/"), raised.value.what

    return read


@pytest.mark.parametrize(
    ("format", "record"),
    [("shell", SHELL), ("prompt_completion", PAIR), ("messages", MESSAGES)],
)
def test_each_shape_becomes_the_same_conversation_named_or_detected(format, record):
    assert parse_record(record, format=format).turns == TURNS
    assert parse_record(record).turns == TURNS


def test_a_named_format_overrules_detection():
    record = SHELL | {"completion": "dir"}
    assert parse_record(record, format="prompt_completion").answer() == "dir"


def test_turns_keep_their_order_and_leave_training_to_their_roles():
    roles = ["system", "user", "assistant", "user", "assistant", "assistant"]
    record = {"messages": [{"role": r, "content": f"{i}"} for i, r in enumerate(roles)]}
    turns = parse_record(record).turns
    assert [turn.role for turn in turns] == roles
    assert [turn.content for turn in turns] == ["0", "1", "2", "3", "4", "5"]
    assert [turn.train for turn in turns] == [None] * 6


def test_prompt_and_answer_part_at_the_last_assistant_turn():
    contents = ["a", "b", "c", "d", "e"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    pairs = zip(roles, contents, strict=True)
    conversation = parse_record({"messages": [{"role": r, "content": c} for r, c in pairs]})
    assert conversation.answer() == "d"
    assert [turn.content for turn in conversation.prompt_turns()] == ["a", "b", "c"]


@pytest.mark.parametrize("record", [SHELL, PAIR, MESSAGES])
def test_other_fields_are_kept_as_tags(record):
    conversation = parse_record(record | {"category": "files", "n": 3, "nested": {"a": [1]}})
    assert conversation.tags == {"category": "files", "n": 3, "nested": {"a": [1]}}
    assert conversation.turns == TURNS


def test_text_is_taken_as_it_is():
    record = {"prompt": " naïve\n\t🎉 ", "completion": "  ls \n"}
    assert [t.content for t in parse_record(record).turns] == [" naïve\n\t🎉 ", "  ls \n"]


def test_user_and_system_turns_may_be_empty():
    record = {
        "messages": [{"role": "system", "content": ""}, *message("assistant", "x")["messages"]]
    }
    assert parse_record(record).turns[0] == Turn("system", "")


def test_a_file_may_mix_shapes_and_have_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = ["\ufeff", json.dumps(SHELL), "", "  \t", json.dumps(PAIR), json.dumps(MESSAGES), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    conversations = read_conversations(path)
    assert [c.turns for c in conversations] == [TURNS] * 3
    assert [c.where for c in conversations] == [f"{path}:{n}" for n in (2, 5, 6)]


def test_the_last_line_needs_no_line_break_and_windows_line_breaks_will_do(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(f"{json.dumps(PAIR)}\r\n{json.dumps(PAIR)}".encode())
    assert [c.turns for c in read_conversations(path)] == [TURNS] * 2


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c", "completion": "d"}\n', encoding="utf-8")
    assert read_conversations(path)[0].prompt_turns()[0].content == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "a", "completion": ', "{'prompt': 'a', 'completion': 'b'}", "ls -la", "[" * 5000],
    ids=["cut", "python", "text", "deep"],
)
def test_invalid_json_is_told_with_its_line(error, line):
    where, what = error(f"{json.dumps(PAIR)}\n\n{line}\n{json.dumps(PAIR)}\n")
    assert where == "data.jsonl:3"
    assert "this line is not JSON" in what


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "a number"),
        ("text", "a string"),
        ([PAIR], "a list"),
        (True, "a boolean"),
        (None, "null"),
    ],
)
def test_a_line_that_is_no_object_is_told(error, value, kind):
    where, what = error(json.dumps(value))
    assert (where, what) == ("data.jsonl:1", f"a record is a JSON object; this is {kind}")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "a number"),
        ({"a": 1}, "an object"),
        (False, "a boolean"),
    ],
)
def test_a_field_of_the_wrong_type_is_told_with_its_line(error, value, kind):
    records = [PAIR, PAIR, PAIR | {"completion": value}]
    where, what = error("\n".join(map(json.dumps, records)))
    assert (where, what) == ("data.jsonl:3", f"'completion' is {kind}; it must be a string")


def test_a_record_of_no_known_shape_is_told_what_it_has_and_could_have(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [PAIR, {"prompt": "a", "instruction": "b"}])
    with pytest.raises(DataError, match="prompt, instruction") as raised:
        read_conversations(path)
    assert raised.value.where == f"{path}:2"
    assert "{prompt, completion}" in raised.value.remedy


def test_a_key_missing_from_a_named_format_is_told(error):
    where, what = error(json.dumps(PAIR), "shell")
    assert (where, what) == ("data.jsonl:1", "'expected_command' is missing; it must be a string")


@pytest.mark.parametrize("record", [SHELL, PAIR])
@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_prompt_or_answer_is_told(error, record, empty):
    for key in record:
        where, what = error(json.dumps(record | {key: empty}))
        asked = "nothing is asked: the prompt is empty"
        assert where == "data.jsonl:1"
        assert what == (asked if key == "prompt" else "turn 2, the assistant's, is empty")


def test_an_empty_assistant_turn_is_told_with_its_number(error):
    where, what = error(json.dumps(message("assistant", " ")))
    assert (where, what) == ("data.jsonl:1", "turn 2, the assistant's, is empty")


def test_a_conversation_without_an_assistant_turn_trains_nothing():
    conversation = parse_record(message("user", "hello?"), where="data.jsonl:1")
    with pytest.raises(NothingTrained, match="no assistant turn") as raised:
        Masking().require_target(conversation)
    assert raised.value.where == "data.jsonl:1"
    Masking(("user",)).require_target(conversation)


@pytest.mark.parametrize("role", ["boss", "", None, 3, ["user"], {"role": "user"}])
def test_an_unknown_role_is_told_with_its_message(error, role):
    where, what = error(json.dumps(message(role, "x")))
    assert (where, what) == ("data.jsonl:1 message 2", f"unknown role {role!r}")


@pytest.mark.parametrize("content", [None, 3])
def test_message_content_of_the_wrong_type_is_told(error, content):
    where, what = error(json.dumps(message("assistant", content)))
    assert where == "data.jsonl:1 message 2"
    assert (
        what == f"'content' is {'missing' if content is None else 'a number'}; it must be a string"
    )


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, 3])
def test_messages_that_are_no_list_are_told(error, messages):
    where, what = error(json.dumps({"messages": messages}))
    assert where == "data.jsonl:1"
    assert what.startswith("'messages' must be a list")


def test_an_empty_list_of_messages_is_said_to_be_empty(error):
    where, what = error('{"messages": []}')
    assert where == "data.jsonl:1"
    assert "empty" in what


def test_a_message_that_is_no_object_is_told(error):
    assert error('{"messages": ["hi"]}')[0] == "data.jsonl:1 message 1"


def test_half_a_surrogate_pair_is_no_text(error):
    where, _ = error(json.dumps(PAIR) + '\n{"prompt": "\\ud83c", "completion": "ls"}\n')
    assert where == "data.jsonl:2"


@pytest.mark.parametrize("data", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_told(error, data):
    assert error(data) == ("data.jsonl", "it has no records")


def test_bytes_that_are_not_utf8_are_told_with_their_line(error):
    latin1 = '{"prompt": "café", "completion": "x"}\n'.encode("latin1")
    where, what = error(json.dumps(PAIR).encode() + b"\n" + latin1)
    assert "not UTF-8" in what
    assert where == "data.jsonl:2"


def test_a_missing_file_is_told_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file") as raised:
        read_conversations(tmp_path / "none.jsonl")
    assert raised.value.where == str(tmp_path / "none.jsonl")
    assert str(tmp_path) in raised.value.remedy


def test_a_folder_is_no_file_of_records(tmp_path):
    with pytest.raises(DataError, match="folder") as raised:
        read_conversations(tmp_path)
    assert raised.value.where == str(tmp_path)


def test_a_path_that_goes_through_a_file_is_told(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [PAIR]) / "more.jsonl"
    with pytest.raises(DataError) as raised:
        read_conversations(path)
    assert raised.value.where == str(path)
