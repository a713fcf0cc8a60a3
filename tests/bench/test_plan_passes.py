"""The pass that a plan is made for: the largest of the run's own steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlxtune.bench.facts import ModelFacts
from mlxtune.bench.lengths import Lengths, samples_of
from mlxtune.bench.machine import Machine
from mlxtune.bench.plan import Planner
from mlxtune.data.batches import Part, Plan
from mlxtune.data.passes import Layout
from support import models, program
from support.files import write_jsonl
from support.plans import recipe_of

LAYOUTS = pytest.mark.parametrize(
    "layout", [Layout(), Layout(few_shapes=True, pass_cost=256), Layout(packing=False)], ids=str
)


def ragged(count, longest=600, seed=0):
    lengths = np.random.default_rng(seed).lognormal(4, 0.9, count)
    return samples_of(np.clip(lengths, 4, longest).astype(int).tolist())


def largest_of(plan, steps):
    return max(batch.tokens.size for step in plan.steps(0, steps) for batch in step)


@LAYOUTS
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 3)])
def test_the_largest_pass_of_a_short_run_is_found(layout, batch_size, accumulation):
    parts = (Part(ragged(150)), Part(ragged(40, seed=1), 0.5))
    plan = Plan(parts, batch_size, accumulation, 3, layout)
    steps = plan.total_steps(epochs=2, max_steps=None)
    assert plan.largest_of_run(steps).tokens.size == largest_of(plan, steps)
    assert plan.largest_of_run(2).tokens.size == largest_of(plan, 2)


@LAYOUTS
def test_each_workers_share_is_looked_at(layout):
    parts = (Part(ragged(100)),)
    plans = [Plan(parts, 4, 1, 3, layout, rank, 2) for rank in range(2)]
    steps = plans[0].total_steps(epochs=1, max_steps=None)
    assert steps == 13  # and of the last, a half is empty
    each = [largest_of(plan, steps) for plan in plans]
    assert plans[0].largest_of_run(steps).tokens.size == max(each) and len(set(each)) == 2


@LAYOUTS
def test_of_a_longer_run_those_steps_are_laid_out_that_are_expected_to_be_largest(
    layout, monkeypatch
):
    monkeypatch.setattr("mlxtune.data.batches._LAID_OUT", 24)
    plan = Plan((Part(ragged(1000)),), 8, 1, 0, layout)
    steps = plan.total_steps(epochs=1, max_steps=None)
    found, is_ = plan.largest_of_run(steps).tokens.size, largest_of(plan, steps)
    assert 0.9 * is_ <= found <= is_


def test_hundreds_of_thousands_of_records_are_looked_through():
    """In far less than a test may take."""
    sample = ragged(1)[0]
    plan = Plan((Part([sample] * 300_000),), 8, 2, 0)
    steps = plan.total_steps(epochs=3, max_steps=None)
    assert plan.largest_of_run(steps).tokens.size <= plan.largest().tokens.size
    assert plan.largest_of_run(10**9).tokens.size == plan.largest().tokens.size


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def test_lengths_that_are_not_known_are_put_together_at_their_worst():
    train = {"batch_size": 4, "max_seq_length": 1024}
    recipe = recipe_of(train=train)
    machine = Machine("a test", 10**9, gpu=False, rates=None, measured=False)
    part = Part(samples_of([900, 10, 10, 10] * 4))
    peaks = {}
    for basis in ("tokenized", "estimated"):
        lengths = Lengths((part,), basis, "16 records")
        facts = ModelFacts(CONFIG, None, None, "a test")
        planner = Planner(recipe, machine, facts=facts, lengths=lengths)
        peaks[basis] = planner.estimate(recipe).peak_memory_bytes
    assert peaks["tokenized"] < 0.9 * peaks["estimated"]
    # The longest together are not always the largest pass: they come one by one then.
    ragged_ = Part(ragged(400, longest=1500))
    for basis in ("tokenized", "estimated"):
        lengths = Lengths((ragged_,), basis, "400 records")
        facts = ModelFacts(CONFIG, None, None, "a test")
        one = recipe_of(train=train | {"max_seq_length": 2048, "batch_size": 16})
        peaks[basis] = (
            Planner(one, machine, facts=facts, lengths=lengths).estimate(one).peak_memory_bytes
        )
    assert peaks["estimated"] >= peaks["tokenized"]


@pytest.mark.slow
def test_a_run_of_ragged_records_peaks_where_its_plan_said(tmp_path):
    models.save_real_vocabulary(tmp_path / "model", dims=256)
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"list {n} files", "completion": "ls -la " * int(words)}
        for n, words in enumerate(np.clip(rng.lognormal(2.5, 1.0, 120), 1, 120))
    ]
    write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "r.toml").write_text(
        'name = "r"\n[model]\npath = "model"\n[[data]]\npath = "d.jsonl"\n'
        "[train]\nbatch_size = 8\nepochs = 1\n[log]\nsteps = 1\n"
    )
    program.mlxtune_afresh("lora", "r.toml", cwd=tmp_path).check_returncode()
    planned = json.loads((tmp_path / "runs/r/run.json").read_text())["plan"]["peak_memory_bytes"]
    lines = (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()
    measured = max(json.loads(line).get("peak_memory_bytes", 0) for line in lines)
    assert planned == pytest.approx(measured, rel=0.1)
