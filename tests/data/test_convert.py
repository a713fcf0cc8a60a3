"""Between shapes: what both can hold survives, and what one cannot is refused."""

from __future__ import annotations

import itertools
import json

import pytest

from mlxtune.data.convert import convert_file, to_record
from mlxtune.data.formats import FORMATS, detect, parse_record
from mlxtune.data.records import Conversation, Segment, ToolCall, Turn
from mlxtune.data.sources import Source, read_conversations
from mlxtune.errors import DataError, OutputExists
from support.files import beside, write_jsonl

CIRCLE = ("alpaca", "messages", "sharegpt")


@pytest.fixture(scope="module")
def real(nl2bash) -> list[Conversation]:
    """1,000 real rows: 500 single pairs, and 500 pages of several pairs each with a system
    prompt, as turns of one conversation."""
    pages = beside("tldr.jsonl")
    single = [json.loads(line) for line in nl2bash.read_text().splitlines()[:500]]
    rows = [json.loads(line) for line in pages.read_text().splitlines()[:6000]]
    several = []
    for page, group in itertools.groupby(rows, key=lambda row: row["page"]):
        messages = [{"role": "system", "content": f"Answer about {page}."}]
        for row in group:
            messages.append({"role": "user", "content": row["prompt"]})
            messages.append({"role": "assistant", "content": row["expected_command"]})
        several.append({"messages": messages, "page": page, "length": len(messages)})
    return [parse_record(row) for row in (*single, *several[:500])]


@pytest.mark.parametrize("way", list(itertools.permutations(CIRCLE)), ids="-".join)
def test_real_rows_come_back_from_a_tour_of_shapes(real, way):
    assert len(real) == 1000
    for conversation in real:
        passed = conversation
        for shape in (*way, way[0]):
            record = to_record(passed, shape)
            assert detect(record) == shape
            # As a line of a file, not as Python holds it.
            passed = parse_record(json.loads(json.dumps(record)))
            assert passed.turns == conversation.turns
            assert passed.tags == conversation.tags


def test_shell_pairs_keep_their_category(real):
    for conversation in real[:500]:
        record = to_record(conversation, "shell")
        assert parse_record(record).turns == conversation.turns
        assert record["prompt"] == conversation.turns[0].content


CALLED = Conversation(
    (
        Turn("user", "how full?"),
        Turn("assistant", "", tool_calls=(ToolCall("df", {"h": True}),)),
        Turn("tool", "91 %"),
        Turn("assistant", "91 %.", train=True),
    ),
    tools=({"name": "df"},),
)


@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_tools_and_calls_come_back(shape):
    passed = parse_record(json.loads(json.dumps(to_record(CALLED, shape))))
    assert passed == CALLED


THOUGHT = Conversation((Turn("user", "a"), Turn("assistant", "b", reasoning="c")))
TWO = Conversation((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")))
PAIR = Conversation((Turn("user", "a"), Turn("assistant", "b")))


@pytest.mark.parametrize(
    ("conversation", "shape", "what"),
    [
        (CALLED, "alpaca", "tools"),
        (CALLED, "shell", "tools"),
        (THOUGHT, "alpaca", "reasoning"),
        (THOUGHT, "sharegpt", "reasoning"),
        (TWO, "alpaca", "in turn"),
        (TWO, "shell", "more than one"),
        (Conversation(segments=(Segment("a", True),)), "messages", "plain text"),
        (Conversation(PAIR.turns, rejected=(Turn("assistant", "c"),)), "alpaca", "rejected"),
        (Conversation(PAIR.turns, tags={"input": 3}), "alpaca", "'input' means something else"),
    ],
)
def test_what_a_shape_cannot_hold_is_refused_with_the_row(conversation, shape, what):
    from dataclasses import replace

    with pytest.raises(DataError, match=what) as raised:
        to_record(replace(conversation, where="data.jsonl:7"), shape)
    assert raised.value.where == "data.jsonl:7"


def test_every_shape_has_a_way_back():
    records = {
        "text": {"text": "one"},
        "input_output": {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "prompt_completion": {"prompt": "a", "completion": "b"},
        "shell": {"prompt": "a", "expected_command": "b"},
        "messages": to_record(PAIR, "messages"),
        "sharegpt": to_record(PAIR, "sharegpt"),
        "alpaca": {"instruction": "a", "input": "x", "output": "b"},
    }
    assert records.keys() == FORMATS.keys()
    for shape, record in records.items():
        conversation = parse_record(record)
        assert detect(record) == shape
        assert parse_record(to_record(conversation, shape)) == conversation


def test_a_file_is_converted_whole_or_not_at_all(tmp_path):
    good = {"prompt": "naïve 🎉", "completion": "b", "n": 1}
    path = write_jsonl(tmp_path / "in.jsonl", [good, good])
    out = tmp_path / "out.jsonl"
    assert convert_file(Source(str(path)), out, "messages") == 2
    assert "naïve 🎉" in out.read_text(encoding="utf-8")
    assert [c.turns for c in read_conversations(out)] == [c.turns for c in read_conversations(path)]
    with pytest.raises(OutputExists):
        convert_file(Source(str(path)), out, "sharegpt")
    write_jsonl(path, [good, {"text": "x"}])
    before = out.read_bytes()
    with pytest.raises(DataError) as raised:
        convert_file(Source(str(path)), out, "sharegpt", overwrite=True)
    assert raised.value.where == f"{path}:2"
    assert out.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {
        "in.jsonl",
        "out.jsonl",
    }


def test_a_system_prompt_that_is_said_twice_stays_so_in_sharegpt():
    system = Turn("system", "Be brief.")
    twice = Conversation((system, system, Turn("user", "a"), Turn("assistant", "b")))
    assert parse_record(to_record(twice, "sharegpt")) == twice
