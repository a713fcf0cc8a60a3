"""A run of preference pairs: its reference, its figures, and that it goes on as it would have."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlxtune.adapters.saved import SavedAdapter
from mlxtune.adapters.store import adapter_arrays
from mlxtune.data.render import Renderer
from mlxtune.data.rules import Rules
from mlxtune.data.sources import Source
from mlxtune.data.tokens import tokenize
from mlxtune.errors import DataError, RunError
from mlxtune.layers.adapter import without_adapters
from mlxtune.objectives.base import Best
from mlxtune.objectives.sft import SFT
from mlxtune.recipe.load import dump_recipe
from mlxtune.train import loop, session
from mlxtune.train.metrics import Silent
from mlxtune.train.reference import Reference
from mlxtune.train.run import checkpoints
from mlxtune.train.session import fine_tune
from support.compare import distance
from support.files import write_jsonl
from support.models import tiny_llama, with_adapters
from support.program import running, wait_until
from support.runs import adapter, losses, same_arrays


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def preference(recipe, pairs):
    """A recipe of pairs, with some of it changed."""

    def make(**sections):
        sections = {"eval": {"val_size": 4, "steps": 3}} | sections
        return recipe(sections.pop("data", pairs), objective="dpo", **sections)

    return make


class Noted(Silent):
    """Keeps the remarks on a run."""

    def started(self, outline):
        self.notes = outline.notes


def notes_of(settings, path: Path, **options) -> tuple[str, ...]:
    noted = Noted()
    fine_tune(settings, path, noted, **options)
    return noted.notes


def after_step_2(run: Path, to: Path, cache: Path) -> Path:
    """A copy of a finished run as it was after its second step, and without the cache."""
    shutil.copytree(run, to)
    for step in ("step-4", "step-6"):
        shutil.rmtree(to / "checkpoints" / step)
    shutil.rmtree(to / "adapter")
    shutil.rmtree(cache / "tokens")
    return to


COMPUTED = "the log-probabilities of the model before training were computed"
KNOWN = "the log-probabilities of the model before training were taken from the cache"

# ------------------------------------------------------------------------ the run


def test_a_run_learns_to_prefer_and_says_so(preference, pairs, tmp_path):
    settings = preference(train={"max_steps": 12, "learning_rate": 5e-3}, eval={"val_size": 6})
    run = fine_tune(settings, tmp_path / "run", Silent())
    entries = list(run.metrics())
    held_out = [entry for entry in entries if "held_out_loss" in entry]
    reports = [entry for entry in entries if "loss" in entry]
    # Before training policy and reference are one model.
    assert held_out[0]["held_out_loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert reports[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    for entry, prefix in [*((e, "") for e in reports), *((e, "held_out_") for e in held_out)]:
        margin = entry[f"{prefix}rewards/chosen"] - entry[f"{prefix}rewards/rejected"]
        assert entry[f"{prefix}rewards/margins"] == pytest.approx(margin, abs=1e-4)
        assert 0 <= entry[f"{prefix}rewards/accuracies"] <= 1
    assert reports[-1]["loss"] < 0.6 and reports[-1]["rewards/margins"] > 0.2
    # Pairs, four to a step but for the last of an epoch.
    count = len(pairs.read_text().splitlines()) - 6
    epochs, rest = divmod(12, -(-count // 4))
    assert reports[-1]["examples"] == epochs * count + min(4 * rest, count)


@pytest.mark.slow
def test_killed_and_resumed_is_the_uninterrupted_run(preference, tmp_path, cache):
    """SIGKILL in the middle; dropout draws, and the reference comes from the cache."""
    path, file = tmp_path / "killed", tmp_path / "t.toml"
    settings = preference(
        checkpoint={"steps": 1},
        lora={"dropout": 0.1},
        train={"max_steps": 20, "gradient_accumulation_steps": 2, "batch_size": 2},
        dpo={"sft_weight": 0.2},
    )
    file.write_text(dump_recipe(settings))
    with running("lora", str(file), "-o", str(path), cwd=tmp_path) as process:
        wait_until(lambda: len(checkpoints(path / "checkpoints")) > 0, process)
        time.sleep(random.Random(0).uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    run = fine_tune(settings, path, Silent(), resume=True)
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    assert losses(run) == losses(straight)
    assert same_arrays(adapter(run), adapter(straight))


def test_without_its_cache_a_run_goes_on_as_it_would_have(preference, tmp_path, cache):
    """The reference is computed again, before the checkpoint is put back."""
    settings = preference(checkpoint={"steps": 2, "keep": 3}, train={"max_steps": 6})
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    again = after_step_2(straight.path, tmp_path / "again", cache)
    assert COMPUTED in notes_of(settings, again, resume=True)
    assert same_arrays(adapter(session.Run(again)), adapter(straight))
    assert losses(session.Run(again)) == losses(straight)


# ------------------------------------------------------------------------ the reference


def test_the_reference_is_computed_once_for_all_runs_of_the_same(preference, tmp_path, cache):
    settings = preference(train={"max_steps": 1})
    assert COMPUTED in notes_of(settings, tmp_path / "one")
    other = preference(train={"max_steps": 2, "learning_rate": 1e-3}, dpo={"beta": 0.5})
    assert KNOWN in notes_of(other, tmp_path / "two")
    assert len(list(cache.glob("tokens/*/reference-*.f32"))) == 1
    assert not list(cache.glob("tokens/*/*.partial"))


def test_of_another_model_it_is_computed_again(preference, tmp_path, cache, tiny_folder):
    settings = preference(train={"max_steps": 1})
    first = fine_tune(settings, tmp_path / "one", Silent())
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    mx.save_safetensors(str(other / "model.safetensors"), {k: 1.5 * a for k, a in weights.items()})
    changed = preference(train={"max_steps": 1}, model={"path": str(other)})
    assert COMPUTED in notes_of(changed, tmp_path / "two")
    second = session.Run(tmp_path / "two")
    for run in (first, second):  # each next to its own
        assert losses(run)[0] == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_run_that_begins_with_an_adapter_is_held_to_it(preference, tmp_path, cache, dora):
    """Also where that has fewer layers than are trained."""
    lora = {"dora": dora}
    few = lora | {"target_modules": ["q_proj"]}
    first = fine_tune(preference(lora=few), tmp_path / "first", Silent())
    settings = preference(
        lora=lora | {"init_from": str(first.path)}, checkpoint={"steps": 2, "keep": 3}
    )
    second = fine_tune(settings, tmp_path / "second", Silent())
    entries = [entry for entry in second.metrics() if "held_out_loss" in entry]
    assert entries[0]["held_out_loss"] == pytest.approx(np.log(2), rel=1e-4)
    # Its cache gone, a run goes on next to the adapter that it began with.
    again = after_step_2(second.path, tmp_path / "again", cache)
    fine_tune(settings, again, Silent(), resume=True)
    assert losses(session.Run(again)) == losses(second)
    # And without that adapter it says what is missing.
    shutil.rmtree(cache / "tokens")
    for step in ("step-4", "step-6"):
        shutil.rmtree(again / "checkpoints" / step)
    shutil.rmtree(first.path)
    with pytest.raises(RunError):
        fine_tune(settings, again, Silent(), resume=True)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_without_its_adapters_a_model_is_what_it_was(dora):
    tokens = mx.array([[5, 17, 99, 3]])
    plain = tiny_llama()(tokens)
    model = with_adapters(tiny_llama(), dora=dora)
    for name, array in model.trainable_parameters().items():
        assert array is not None, name
    with without_adapters(model):
        assert mx.array_equal(model(tokens), plain)
    assert distance(model(tokens), plain) > 1e-4


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_trained_model_is_its_reference_for_a_while(dora):
    """Also where training began with an adapter of fewer layers."""
    tokens, few = mx.array([[5, 17, 99, 3]]), ["model.layers.0.self_attn.q_proj"]
    begun = with_adapters(tiny_llama(), few, dora=dora)
    kind = "dora" if dora else "lora"
    saved = SavedAdapter(kind, 4, 2.0, adapter_arrays(begun), "base", 2, "here")
    model = with_adapters(tiny_llama(), dora=dora)
    if dora:  # magnitudes that were trained
        moved = {n: 1.1 * a for n, a in adapter_arrays(model).items() if n.endswith(".m")}
        model.load_weights(list(moved.items()), strict=False)
    before = model(tokens)
    with Reference(model, lambda: saved, {}).in_place():
        assert distance(model(tokens), begun(tokens)) < 1e-6
    assert mx.array_equal(model(tokens), before)
    assert distance(before, begun(tokens)) > 1e-4


# ------------------------------------------------------------------------ records


@pytest.fixture
def renderer(tiny_folder):
    from mlxtune.recipe.schema import ModelSection
    from mlxtune.train.model import tokenizer_of

    return Renderer(tokenizer_of(ModelSection(path=str(tiny_folder))))


def store_of(tmp_path, renderer, rows, **rules):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return tokenize(Source(str(path)), renderer, Rules(form="pairs", **rules))


GOOD = {"prompt": "list files", "chosen": "ls -a", "rejected": "rm -rf / --no-preserve-root"}
MESSAGES = {
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "list files"},
    ],
    "chosen": [{"role": "assistant", "content": "ls"}],
    "rejected": [{"role": "assistant", "content": "cat"}],
}


def test_both_sides_begin_with_one_prompt_and_their_answers_alone_are_trained(
    tmp_path, renderer, cache
):
    implicit = {side: [*MESSAGES["prompt"], *MESSAGES[side]] for side in ("chosen", "rejected")}
    store = store_of(tmp_path, renderer, [GOOD, MESSAGES, implicit])
    assert [sample.side for sample in store] == [0, 1] * 3
    assert [sample.record for sample in store] == [1, 1, 2, 2, 3, 3]
    assert store.tally.samples == store.tally.rows == 3
    for first, second in zip(store[::2], store[1::2], strict=True):
        begin = int(np.flatnonzero(first.weights)[0])
        assert begin == np.flatnonzero(second.weights)[0]
        assert np.array_equal(first.tokens[:begin], second.tokens[:begin])
    said = [renderer.decode(s.tokens[s.weights > 0]) for s in store]
    assert [text.startswith(word) for text, word in zip(said[:2], ("ls -a", "rm"), strict=True)]
    assert said[2:4] == said[4:6], "an implicit prompt is what both begin with"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (GOOD | {"rejected": GOOD["chosen"]}, "are the same"),
        (GOOD | {"rejected": " "}, "is empty"),
        (GOOD | {"chosen": ""}, "is empty"),
        ({"prompt": "a", "completion": "b"}, "no preference pair"),
        ({"chosen": "a", "rejected": "b"}, "needs a prompt"),
    ],
)
def test_a_record_that_is_no_pair_is_refused_with_its_place(tmp_path, renderer, cache, row, match):
    with pytest.raises(DataError, match=match) as raised:
        store_of(tmp_path, renderer, [GOOD, row])
    assert raised.value.where.endswith("rows.jsonl:2")


def test_sides_whose_prompts_differ_are_refused(tmp_path, renderer, cache, monkeypatch):
    """As no template here does: both prompts are the one that a server sends."""
    made = Renderer.samples

    def samples(self, conversation, *given, **named):
        found = made(self, conversation, *given, **named)
        if conversation.answer() == GOOD["rejected"]:
            return [
                replace(s, tokens=np.where(np.arange(len(s.tokens)) == 1, 7, s.tokens))
                for s in found
            ]
        return found

    monkeypatch.setattr(Renderer, "samples", samples)
    with pytest.raises(DataError, match="different prompts for the chosen and the rejected"):
        store_of(tmp_path, renderer, [GOOD])


def test_a_side_that_is_several_samples_is_refused(tmp_path, renderer, cache, monkeypatch):
    made = Renderer.samples
    monkeypatch.setattr(Renderer, "samples", lambda *given, **named: made(*given, **named) * 2)
    with pytest.raises(DataError, match="rewrites earlier turns of the chosen side"):
        store_of(tmp_path, renderer, [GOOD])


@pytest.mark.parametrize("truncate", ["error", "drop", "left", "right"])
def test_what_is_too_long_is_cut_or_left_out_as_a_pair(tmp_path, renderer, cache, truncate):
    whole = store_of(tmp_path, renderer, [GOOD])
    short, long = (len(sample.tokens) for sample in whole)
    assert short < long
    limit = long - 4
    row = GOOD | {"prompt": GOOD["prompt"]}
    if truncate == "error":
        with pytest.raises(DataError, match="max_seq_length"):
            store_of(tmp_path, renderer, [row], max_seq_length=limit, truncate=truncate)
        return
    rows = [row, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    store = store_of(tmp_path, renderer, rows, max_seq_length=limit, truncate=truncate)
    if truncate == "drop":
        assert [sample.record for sample in store] == [2, 2]
        return
    first, second = store[:2]
    if truncate == "left":
        assert np.array_equal(first.tokens, whole[0].tokens[4:])
        assert np.array_equal(second.tokens, whole[1].tokens[4:])
    else:
        assert np.array_equal(first.tokens, whole[0].tokens)
        assert np.array_equal(second.tokens, whole[1].tokens[:limit])
    assert first.fingerprint == whole[0].fingerprint


@pytest.mark.parametrize("unusable", ["error", "skip"])
def test_a_pair_of_which_no_prompt_is_left_is_not_trained(tmp_path, renderer, cache, unusable):
    whole = store_of(tmp_path, renderer, [GOOD])
    prompt = int(np.flatnonzero(whole[0].weights)[0])
    limit = len(whole[1].tokens) - prompt  # as much is cut off as the prompt has
    rows = [GOOD, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    rules = {"max_seq_length": limit, "truncate": "left", "unusable": unusable}
    if unusable == "error":
        with pytest.raises(DataError, match="nothing trained is left"):
            store_of(tmp_path, renderer, rows, **rules)
    else:
        store = store_of(tmp_path, renderer, rows, **rules)
        assert [sample.record for sample in store] == [2, 2]


def test_an_objective_of_answers_refuses_pairs_and_says_which_trains_them(recipe, pairs, tmp_path):
    with pytest.raises(DataError, match="preference pair") as raised:
        fine_tune(recipe(pairs), tmp_path / "run", Silent())
    assert 'objective = "dpo"' in raised.value.remedy
    assert not (tmp_path / "run").exists()


def test_held_out_pairs_are_not_trained_on(preference, tmp_path, pairs):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    settings = preference(train={"max_steps": 1}, eval={"val_size": 5})
    run = fine_tune(settings, tmp_path / "run", Silent())
    kept = (run.path / "held-out.jsonl").read_text().splitlines()
    assert len(kept) == 5
    trained = np.fromfile(run.path / "trained-rows.u64", "<u8")
    assert len(trained) == len(rows) - 5


# ------------------------------------------------------------------------ other objectives


@dataclass(frozen=True)
class Drawn(SFT):
    """As one whose batches the policy makes, and of which more is better."""

    draws: ClassVar[bool] = True
    figures: ClassVar[Mapping[str, str]] = {"reward": "answers"}
    best: ClassVar[Best] = Best("reward", higher=True)

    def counts(self, batch):
        return super().counts(batch) | {"answers": len(batch.records)}

    def __call__(self, targets):
        losses, _ = super().__call__(targets)
        return losses, {"reward": losses["tokens"]}


def test_what_the_policy_makes_is_not_made_ahead_and_more_may_be_better(
    recipe, few, tmp_path, monkeypatch
):
    def ahead(_items):
        raise AssertionError("batches are made ahead")

    monkeypatch.setattr(loop, "ahead", ahead)
    settings = recipe(
        few,
        train={"max_steps": 3},
        eval={"path": str(few), "max_overlap": 1.0, "steps": 1, "patience": 2},
    )
    with pytest.raises(AssertionError, match="made ahead"):
        fine_tune(settings, tmp_path / "answers", Silent())
    monkeypatch.setattr(session, "objective_of", lambda _: Drawn())
    run = fine_tune(settings, tmp_path / "drawn", Silent())
    rewards = [e["held_out_reward"] for e in run.metrics() if "held_out_reward" in e]
    # The loss falls, and with it what is called a reward here: none is better than the first.
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 3
    assert not run.best_adapter.exists(), "stopped after two that were no better"
    assert all("reward" in e for e in run.metrics() if "loss" in e)
