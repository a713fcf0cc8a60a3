"""What a run keeps of its rows: an evaluation stays one of the same records."""

from __future__ import annotations

import json

import pytest

from mlxtune.cli.talk import talk
from mlxtune.data.formats import parse_record
from mlxtune.data.sources import read_conversations
from mlxtune.errors import DataError
from mlxtune.evaluate.compare import compare_run
from mlxtune.fuse import fuse_run
from mlxtune.train.kept import HELD_OUT, _line, trained_on
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support.files import SHELL_HELDOUT, SHELL_TRAIN, write_jsonl

CALLED = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "c1"}
RECORDS = [
    {"prompt": "a", "expected_command": "b", "category": "x"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": "b", "tools": [{"name": "f"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": " a "},
            {"role": "assistant", "content": "", "tool_calls": [CALLED], "train": False},
            {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": "b", "reasoning_content": "because"},
        ]
    },
    {"text": "a whole document"},
    {"segments": [{"text": "given", "label": False}, {"text": "said", "label": True}]},
    {"instruction": "a", "output": "b", "id": 3},
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_is_kept_says_what_it_said(record):
    conversation = parse_record(record)
    kept = parse_record(json.loads(_line(conversation)))
    assert kept == conversation
    assert kept.fingerprint() == conversation.fingerprint()


def test_a_field_that_cannot_be_kept_does_not_stand_in_the_way():
    conversation = parse_record(RECORDS[0] | {"picture": b"\xff", "messages_": 1}, format="shell")
    kept = parse_record(json.loads(_line(conversation)))
    assert (kept.turns, kept.tags) == (conversation.turns, {})


@pytest.fixture(scope="module")
def edited(once, recipe):
    """A run with a share held out, whose data file was turned round afterwards."""

    def make(folder):
        lines = SHELL_TRAIN.read_text().splitlines()[::21]
        data = write_jsonl(folder / "data.jsonl", map(json.loads, lines))
        settings = recipe([{"path": str(data), "system": "Be brief."}], eval={"val_size": 6})
        fine_tune(settings, folder / "run", Silent())
        before = compare_run(folder / "run", max_tokens=2)
        (folder / "before").write_text(repr((before.base, before.tuned)))
        write_jsonl(data, map(json.loads, reversed(lines)))

    return once("edited", make)


def test_an_evaluation_is_of_the_rows_that_were_held_out_whatever_became_of_the_file(edited):
    after = compare_run(edited / "run", max_tokens=2)
    assert repr((after.base, after.tuned)) == (edited / "before").read_text()
    assert after.records == 6 and not after.notes
    run = Run(edited / "run")
    rows = read_conversations(edited / "data.jsonl")
    held = {c.fingerprint() for c in read_conversations(run.path / HELD_OUT)}
    assert trained_on(run, [c for c in rows if c.fingerprint() in held]) == 0
    assert trained_on(run, rows) == len(rows) - 6


def test_records_that_a_run_was_trained_on_are_told_wherever_they_come_from(edited, tmp_path):
    rows = [json.loads(line) for line in (edited / "data.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in SHELL_HELDOUT.read_text().splitlines()[:2]]
    held = {c.turns[0].content for c in read_conversations(edited / "run" / HELD_OUT)}
    trained = [row for row in rows if row["prompt"] not in held][:3]
    path = write_jsonl(tmp_path / "mixed.jsonl", trained + other)
    found = compare_run(edited / "run", data=path, max_tokens=2)
    assert found.notes == ("3 of the 5 records were also trained on",)


def test_a_run_outlives_its_data(edited, tmp_path):
    data = edited / "data.jsonl"
    away = data.rename(tmp_path / "away.jsonl")
    try:
        assert compare_run(edited / "run", limit=2, max_tokens=2).records == 2
        assert fuse_run(edited / "run", tmp_path / "fused").tokens_compared > 20
    finally:
        away.rename(data)


def test_a_chat_is_asked_under_the_system_prompt_of_the_run(edited, monkeypatch, capsys):
    seen = []

    def answer(model, tokenizer, prompt, **how):
        seen.append(tokenizer.decode(prompt))
        yield "ok"

    monkeypatch.setattr("mlxtune.cli.talk.stream_answer", answer)
    talk(str(edited / "run"), prompt="list files")
    talk(str(edited / "run"), prompt="list files", system="Be long.")
    assert capsys.readouterr().out == "ok\nok\n"
    first, second = seen
    assert "Be brief." in first and "list files" in first
    assert "Be long." in second and "Be brief." not in second


def test_a_run_that_held_nothing_out_says_so(recipe, few, tmp_path):
    settings = recipe(few, train={"max_steps": 1})
    fine_tune(settings, tmp_path / "run", Silent())
    assert not (tmp_path / "run" / HELD_OUT).exists()
    with pytest.raises(DataError, match="this run holds no records out") as raised:
        compare_run(tmp_path / "run")
    assert "--data" in raised.value.remedy


def test_more_than_a_share_of_trained_rows_in_the_held_out_ones_is_refused(recipe, few, tmp_path):
    settings = recipe(few, eval={"path": str(few)})
    with pytest.raises(DataError, match="held-out records are also among those"):
        fine_tune(settings, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()
    allowed = recipe(few, eval={"path": str(few), "max_overlap": 1.0}, train={"max_steps": 1})
    fine_tune(allowed, tmp_path / "run", Silent())
