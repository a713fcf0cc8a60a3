"""Samples on disk: made once, on any number of cores, read again as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mlxtune.data import tokens
from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.render import Renderer
from mlxtune.data.rules import TOO_LONG, UNTRAINED, Rules
from mlxtune.data.sources import Source
from mlxtune.data.tokens import tokenize
from mlxtune.errors import DataError
from support.files import SHELL_TRAIN, write_jsonl
from support.program import environment


@pytest.fixture(scope="module")
def renderer(smollm2) -> Renderer:
    return Renderer(smollm2.tokenizer)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_torch(monkeypatch) -> None:
    """Other processes do without torch, whose import takes longer than all that they do."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])


def made(cache: Path) -> int:
    return sum(1 for _ in cache.glob("tokens/*"))


def long_and_short(folder: Path) -> Source:
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a " * 200, "completion": "b"},
        {"prompt": "a", "completion": "b " * 200},
    ]
    return Source(str(write_jsonl(folder / "some.jsonl", records)))


def test_samples_are_read_back_as_they_were_made(renderer, cache):
    source = Source(str(SHELL_TRAIN))
    store = tokenize(source, renderer, Rules())
    assert len(store) == store.tally.rows == store.tally.samples == 840
    for number, (sample, conversation) in enumerate(zip(store, source, strict=True), start=1):
        [fresh] = renderer.samples(conversation, number)
        assert np.array_equal(sample.tokens, fresh.tokens)
        assert np.array_equal(sample.weights, fresh.weights)
        assert (sample.tokens.dtype, sample.weights.dtype) == (np.int32, np.float32)
        assert sample.record == number
    assert store.tally.tokens == store.lengths().sum() == sum(len(s.tokens) for s in store)
    assert store.tally.trained == sum(s.supervised for s in store)
    assert store.tally.longest == store.lengths().max()
    assert store[-1].record == 840 and [s.record for s in store[3:5]] == [4, 5]
    with pytest.raises(IndexError):
        store[840]


def test_a_second_time_they_come_from_the_cache(renderer, cache, monkeypatch):
    source = Source(str(SHELL_TRAIN))
    first = tokenize(source, renderer, Rules())
    monkeypatch.setattr(Renderer, "samples", lambda *_: pytest.fail("rendered again"))
    again = tokenize(source, renderer, Rules(), first=1000)
    assert again.tally == first.tally
    assert again[0].record == 1001 and again.records()[-1] == 1840


def test_whatever_they_depend_on_makes_them_anew(renderer, cache, tmp_path, smollm2):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    source = Source(str(path))
    tokenize(source, renderer, Rules())
    count = made(cache)
    for changed in (
        Rules(Masking(train_on_inputs=True)),
        Rules(Masking(("user",))),
        Rules(max_seq_length=64),
        Rules(max_seq_length=64, truncate="left"),
        Rules(unusable="skip"),
    ):
        tokenize(source, renderer, changed)
        count += 1
        assert made(cache) == count
    tokenize(Source(str(path), format="prompt_completion"), renderer, Rules())
    assert made(cache) == count + 1
    write_jsonl(path, [{"prompt": "a", "completion": "c"}])
    tokenize(source, renderer, Rules())
    assert made(cache) == count + 2
    template = smollm2.tokenizer.chat_template
    try:
        smollm2.tokenizer.chat_template = template.replace("helpful", "terse")
        tokenize(source, renderer, Rules())
    finally:
        smollm2.tokenizer.chat_template = template
    assert made(cache) == count + 3


def test_many_processes_make_the_same_samples_as_one(renderer, cache, monkeypatch, without_torch):
    monkeypatch.setattr(tokens, "PARALLEL_ROWS", 100)
    source = Source(str(SHELL_TRAIN))
    one = tokenize(source, renderer, Rules(), workers=1)
    monkeypatch.setenv("MLXTUNE_CACHE", str(cache / "other"))
    two = tokenize(source, renderer, Rules(), workers=2)
    assert one.tally == two.tally and len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.record == b.record and np.array_equal(a.tokens, b.tokens)


@pytest.mark.slow
def test_a_wrong_row_in_another_process_is_told_as_any(
    renderer, cache, monkeypatch, tmp_path, without_torch
):
    monkeypatch.setattr(tokens, "PARALLEL_ROWS", 2)
    good = {"prompt": "a", "completion": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [*[good] * 5, good | {"completion": 3}])
    with pytest.raises(DataError, match="'completion' is a number") as raised:
        tokenize(Source(str(path)), renderer, Rules(), workers=2)
    assert raised.value.where == f"{path}:6"
    assert made(cache) == 0


def test_a_process_that_is_killed_is_told(renderer, cache, monkeypatch, without_torch):
    monkeypatch.setattr(tokens, "PARALLEL_ROWS", 2)
    monkeypatch.setattr(tokens, "_begin", os._exit)  # takes one argument, so each dies at once
    with pytest.raises(DataError, match="has ended unasked"):
        tokenize(Source(str(SHELL_TRAIN)), renderer, Rules(), workers=2)
    assert made(cache) == 0


def test_a_long_record_is_an_error_that_names_its_length(renderer, cache, tmp_path):
    with pytest.raises(DataError, match=r"this record has \d+ tokens.* = 100") as raised:
        tokenize(long_and_short(tmp_path), renderer, Rules(max_seq_length=100))
    assert raised.value.where.endswith("some.jsonl:2")
    assert "truncate" in raised.value.remedy


def test_long_records_may_be_dropped(renderer, cache, tmp_path):
    store = tokenize(long_and_short(tmp_path), renderer, Rules(max_seq_length=100, truncate="drop"))
    assert [sample.record for sample in store] == [1]
    assert store.tally.dropped == {TOO_LONG: 2}
    assert store.tally.rows == 3


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-100, None)), ("right", slice(100))])
def test_long_records_may_be_cut(renderer, cache, tmp_path, side, kept):
    source = long_and_short(tmp_path)
    whole = tokenize(source, renderer, Rules())
    rules = Rules(max_seq_length=100, truncate=side, unusable="skip")
    store = tokenize(source, renderer, rules)
    by_record = {sample.record: sample for sample in store}
    for number, sample in by_record.items():
        assert np.array_equal(sample.tokens, whole[number - 1].tokens[kept])
        assert np.array_equal(sample.weights, whole[number - 1].weights[kept])
    # Of record 2 the answer stands at the end: cut at the right, nothing is left to train.
    assert by_record.keys() == ({1, 2, 3} if side == "left" else {1, 3})
    assert store.tally.truncated == 2
    assert store.tally.dropped == ({} if side == "left" else {UNTRAINED: 1})


def test_a_cut_record_that_trains_nothing_is_an_error(renderer, cache, tmp_path):
    with pytest.raises(NothingTrained, match="nothing trained is left") as raised:
        tokenize(long_and_short(tmp_path), renderer, Rules(max_seq_length=100, truncate="right"))
    assert raised.value.where.endswith(" record 2") or raised.value.where.endswith(":2")


def test_records_that_train_nothing_are_an_error_or_left_out(renderer, cache, tmp_path):
    quiet = {"messages": [{"role": "user", "content": "a"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, quiet])
    with pytest.raises(NothingTrained) as raised:
        tokenize(Source(str(path)), renderer, Rules())
    assert raised.value.where == f"{path}:2"
    store = tokenize(Source(str(path)), renderer, Rules(unusable="skip"))
    assert len(store) == 1 and store.tally.dropped == {UNTRAINED: 1}
    write_jsonl(path, [quiet])
    with pytest.raises(DataError, match="none of its 1 records is left"):
        tokenize(Source(str(path)), renderer, Rules(unusable="skip"))


def test_a_cache_that_takes_no_files_is_told(renderer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "file"))
    from mlxtune.errors import StorageError

    with pytest.raises(StorageError):
        tokenize(Source(str(SHELL_TRAIN)), renderer, Rules())


def test_what_was_not_used_for_a_month_is_forgotten(renderer, cache, tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    tokenize(Source(str(first)), renderer, Rules())
    [old] = cache.glob("tokens/*")
    os.utime(old, (0, 0))
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "c"}])
    tokenize(Source(str(other)), renderer, Rules())
    assert made(cache) == 1 and not old.exists()
    assert json.loads(next(cache.glob("tokens/*/summary.json")).read_text())["tally"]["rows"] == 1
