"""A recipe's sources together: shares, what is held out, what is told of the rest."""

from __future__ import annotations

import pytest

from mlxtune.data.render import Renderer
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.corpus import check_sources, conversations_of, read_corpus
from mlxtune.train.model import tokenizer_of
from support.files import write_jsonl


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """A recipe of two sources, with 10 and 30 records, and these keys."""
    paths = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [pair(name, i) for i in range(count)]))
        for name, count in (("a", 10), ("b", 30))
    ]

    def make(first=None, second=None, **tables):
        data = [{"path": paths[0]} | (first or {}), {"path": paths[1]} | (second or {})]
        values = {"name": "x", "model": {"path": str(tiny_folder)}, "data": data}
        return parse_recipe(values | tables, where="test")

    return make


def pair(name: str, number: int) -> dict[str, str]:
    return {"prompt": f"{name} {number}", "completion": f"said {number}"}


def corpus_of(settings):
    return read_corpus(settings, Renderer(tokenizer_of(settings.model)))


def test_sources_follow_each_other_and_are_numbered_on(recipe):
    corpus = corpus_of(recipe())
    first, second = corpus.parts
    assert [s.record for s in first.samples] == list(range(1, 11))
    assert [s.record for s in second.samples] == list(range(11, 41))
    assert (first.epochs, second.epochs, corpus.size) == (1.0, 1.0, 40)


def test_epochs_and_weights_say_how_often_a_source_is_seen(recipe):
    parts = corpus_of(recipe({"epochs": 2.5}, {"epochs": 0.5})).parts
    assert [part.per_epoch for part in parts] == [25, 15]
    parts = corpus_of(recipe({"weight": 3.0}, {"weight": 1.0})).parts
    assert [part.per_epoch for part in parts] == [30, 10]  # of 40 records, three to one
    with pytest.raises(RecipeError) as raised:
        recipe({"weight": 3.0})
    assert "all need one" in str(raised.value.problems[0])


@pytest.mark.parametrize(("val_size", "count"), [(0.25, 10), (7, 7)])
def test_what_is_held_out_is_held_out_of_training_and_the_same_for_all(recipe, val_size, count):
    settings = recipe(eval={"val_size": val_size})
    corpus = corpus_of(settings)
    held = {sample.record for sample in corpus.held_out}
    trained = {sample.record for part in corpus.parts for sample in part.samples}
    assert len(held) == count and held | trained == set(range(1, 41)) and not held & trained
    asked = {c.turns[0].content for c in conversations_of(settings, corpus.held_out)}
    expected = {f"a {n - 1}" if n <= 10 else f"b {n - 11}" for n in held}
    assert asked == expected
    other = recipe(eval={"val_size": val_size}, seed=1)
    assert {sample.record for sample in corpus_of(other).held_out} != held


@pytest.mark.parametrize("val_size", [0.001, 40, 41])
def test_a_share_that_cannot_be_held_out_is_told(recipe, val_size):
    with pytest.raises(DataError) as raised:
        corpus_of(recipe(eval={"val_size": val_size}))
    assert raised.value.where == "eval.val_size"


def test_a_source_that_is_held_out_whole_is_told(recipe):
    settings = recipe({"max_samples": 1}, {"max_samples": 2}, eval={"val_size": 2})
    with pytest.raises(DataError, match="all its records were held out"):
        corpus_of(settings)


def test_the_held_out_file_is_masked_as_the_first_source(recipe, tmp_path):
    held = str(write_jsonl(tmp_path / "held.jsonl", [pair("c", 1), pair("c", 2)]))
    settings = recipe({"roles_to_train": ["user"]}, eval={"path": held, "max_samples": 1})
    corpus = corpus_of(settings)
    [sample] = corpus.held_out
    tokenizer = tokenizer_of(settings.model)
    assert tokenizer.decode(sample.tokens[sample.weights > 0].tolist()) == "c 1<|im_end|>"
    assert [c.turns[0].content for c in conversations_of(settings, corpus.held_out)] == ["c 1"]


def test_what_becomes_of_records_is_told(recipe):
    """A token is a byte here: a record has 30 of them, and two more for a number of two digits."""
    settings = recipe({"truncate": "left"}, {"truncate": "drop"}, train={"max_seq_length": 30})
    corpus = corpus_of(settings)
    paths = [source.path for source in settings.data]
    dropped = "20 of 30 records left out: longer than max_seq_length"
    assert list(corpus.notes()) == [f"{paths[1]}: {dropped}"]
    assert [len(part.samples) for part in corpus.parts] == [10, 10]
    settings = recipe({"truncate": "right"}, {"truncate": "left"}, train={"max_seq_length": 29})
    first, second = corpus_of(settings).notes()
    assert first == f"{paths[0]}: 10 records cut off at max_seq_length"
    assert second == f"{paths[1]}: 30 records cut off at max_seq_length"


def test_records_are_checked_without_a_tokenizer(recipe, tmp_path):
    settings = recipe()
    assert [count for _, count in check_sources(settings)] == [10, 30]
    assert [count for _, count in check_sources(settings, rows=5)] == [5, 5]
    path = write_jsonl(
        tmp_path / "b.jsonl", [pair("b", 1), {"messages": [{"role": "user", "content": "x"}]}]
    )
    with pytest.raises(DataError, match="nothing in this record is trained") as raised:
        check_sources(settings)
    assert raised.value.where == f"{path}:2"
    check_sources(recipe(None, {"on_empty": "skip"}))


def test_preference_pairs_are_told_without_a_tokenizer(recipe, tmp_path):
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for on_empty in ("error", "skip"):
        with pytest.raises(DataError, match="preference pair") as raised:
            check_sources(recipe(None, {"on_empty": on_empty}))
        assert raised.value.where == f"{path}:1"


def test_a_file_that_is_named_twice_counts_twice(recipe, tmp_path):
    again = {"path": str(tmp_path / "a.jsonl"), "max_samples": 3}
    settings = recipe(None, again)
    assert [count for _, count in check_sources(settings)] == [10, 3]
    assert [tally.rows for _, tally in corpus_of(settings).tallies] == [10, 3]
