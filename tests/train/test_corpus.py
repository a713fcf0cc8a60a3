"""A recipe's sources together: shares, what is held out, what is told of the rest."""

from __future__ import annotations

import pytest

from mlxtune.data.render import Renderer
from mlxtune.errors import DataError, RecipeError
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.check import check_sources
from mlxtune.train.corpus import read_corpus
from mlxtune.train.kept import conversations_of
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


def counts(settings, **how):
    return [source.records for source in check_sources(settings, **how).sources]


def test_records_are_checked_without_a_tokenizer(recipe, tmp_path):
    settings = recipe()
    assert counts(settings) == [10, 30] and counts(settings, rows=5) == [5, 5]
    path = write_jsonl(
        tmp_path / "b.jsonl", [pair("b", 1), {"messages": [{"role": "user", "content": "x"}]}]
    )
    with pytest.raises(DataError, match="nothing in this record is trained") as raised:
        check_sources(settings).require_usable()
    assert raised.value.where == f"{path}:2"
    checked = check_sources(recipe(None, {"unusable": "skip"}))
    checked.require_usable()
    assert checked.sources[1].skipped == {"no token trained": 1}


def test_the_first_ten_of_all_that_is_wrong_are_named_and_the_others_counted(recipe, tmp_path):
    lines = ["no record"] * 12 + ['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}']
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(lines))
    _, source = check_sources(recipe()).sources
    assert (source.records, source.faulty) == (14, 13)
    assert [problem.where for problem in source.problems] == [f"{path}:{n}" for n in range(1, 11)]


UNUSABLE = {
    "damaged": ("{", "this line is not JSON"),
    "unknown": ('{"a": 1}', "a record with the keys a has no known shape"),
    "silent": ('{"prompt": "a", "completion": " "}', "no token trained"),
    "begins with its answer": (
        '{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}, '
        '{"from": "gpt", "value": "c"}]}',
        "the conversation begins with its answer",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_key_leaves_out_whatever_cannot_be_trained_on(recipe, tmp_path, kind):
    line, reason = UNUSABLE[kind]
    path = tmp_path / "b.jsonl"
    path.write_text(f'{line}\n{{"prompt": "a", "completion": "b"}}\n{line}\n')
    with pytest.raises(DataError):
        corpus_of(recipe())
    corpus = corpus_of(recipe(None, {"unusable": "skip"}))
    assert [len(part.samples) for part in corpus.parts] == [10, 1]
    [note] = corpus.notes()
    assert note.startswith(f"{path}: 2 of 3 records left out: {reason}")


def test_preference_pairs_are_told_without_a_tokenizer(recipe, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for unusable in ("error", "skip"):
        with pytest.raises(DataError, match="preference pair"):
            check_sources(recipe(None, {"unusable": unusable})).require_usable()


# Records in both the training and the held-out data


@pytest.mark.parametrize("where", ["the same file", "inside the folder", "other white space"])
def test_records_that_are_trained_on_and_held_out_are_counted_and_refused(recipe, tmp_path, where):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "one.jsonl", [pair("c", n) for n in range(20)])
    held = write_jsonl(folder / "two.jsonl", [pair("d", n) for n in range(4)])
    path = {"the same file": folder / "one.jsonl", "inside the folder": held}.get(where)
    if path is None:
        spaced = [{"prompt": f" d {n}\n", "completion": f"said {n} "} for n in range(4)]
        path = write_jsonl(tmp_path / "spaced.jsonl", spaced)
    count = 20 if where == "the same file" else 4
    settings = recipe({"path": str(folder)}, eval={"path": str(path)})
    for overlap in (corpus_of(settings).overlap(), check_sources(settings).overlap):
        assert (overlap.shared, overlap.held_out) == (count, count)
        with pytest.raises(DataError, match=f"{count} of {count} held-out records") as raised:
            overlap.require_below(settings.eval.max_overlap)
        assert "data prep --against" in raised.value.remedy
        assert "eval.max_overlap = 1 allows" in raised.value.remedy
        overlap.require_below(1.0)


def test_a_few_records_in_both_are_told_and_allowed(recipe, tmp_path):
    held = [pair("c", n) for n in range(20)] + [pair("b", 7)]
    path = write_jsonl(tmp_path / "held.jsonl", held)
    corpus = corpus_of(recipe(eval={"path": str(path)}))
    [note] = corpus.notes()
    assert note == (
        "1 of 21 held-out records are also among those that are trained on, such as "
        f"{path} record 21"
    )
    corpus.overlap().require_below(0.1)


def test_copies_in_the_data_that_a_share_is_held_out_of_are_counted(recipe, tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [pair("b", n % 15) for n in range(30)])
    corpus = corpus_of(recipe(eval={"val_size": 20}))
    said = {n: (("a", n - 1) if n <= 10 else ("b", (n - 11) % 15)) for n in range(1, 41)}
    trained = {said[s.record] for part in corpus.parts for s in part.samples}
    shared = sum(said[s.record] in trained for s in corpus.held_out)
    assert 0 < shared < 20
    assert (corpus.overlap().shared, corpus.overlap().held_out) == (shared, 20)
    with pytest.raises(DataError) as raised:
        corpus.overlap().require_below(0.0, chosen=True)
    assert raised.value.remedy.startswith("`mlxtune data prep` removes copies;")


def test_a_folder_is_its_train_split_and_the_rest_is_told(recipe, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "valid", "test", "extra"):
        write_jsonl(folder / f"{name}.jsonl", [pair(name, n) for n in range(3)])
    corpus = corpus_of(recipe({"path": str(folder)}))
    assert corpus.size == 33
    assert list(corpus.notes()) == [
        f"{folder}: its train files are trained on, not its test and validation splits; [eval] "
        f'path = "{folder}" measures on what is held out there',
        f"{folder}: not trained on: extra.jsonl, named after no split, unlike the files of the "
        "train split",
    ]
    corpus = corpus_of(recipe({"path": str(folder)}, eval={"path": str(folder)}))
    assert (corpus.size, len(corpus.held_out)) == (33, 3) and not corpus.overlap()
    assert [name for name, _ in corpus.tallies][::2] == [
        f"{folder} (train)",
        f"{folder} (validation)",
    ]


def test_a_system_prompt_goes_before_records_that_have_none(recipe, tmp_path):
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]}
    own["messages"].append({"role": "assistant", "content": "b"})
    write_jsonl(tmp_path / "a.jsonl", [pair("a", 1), own])
    held = write_jsonl(tmp_path / "held.jsonl", [pair("c", 1)])
    settings = recipe({"system": "Be brief."}, {"system": "Be brief."}, eval={"path": str(held)})
    corpus = corpus_of(settings)
    tokenizer = tokenizer_of(settings.model)
    first, second = (tokenizer.decode(s.tokens.tolist()) for s in corpus.parts[0].samples)
    assert first.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na 1")
    assert second.startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\na")
    assert "Be brief." in tokenizer.decode(corpus.held_out[0].tokens.tolist())
    assert settings.system_prompt == "Be brief."
    assert recipe({"system": "Be brief."}).system_prompt is None


def test_a_file_that_is_named_twice_counts_twice(recipe, tmp_path):
    again = {"path": str(tmp_path / "a.jsonl"), "max_samples": 3}
    settings = recipe(None, again)
    assert counts(settings) == [10, 3]
    assert [tally.rows for _, tally in corpus_of(settings).tallies] == [10, 3]
