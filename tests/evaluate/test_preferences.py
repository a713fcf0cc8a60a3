"""Evaluation of preference pairs: how often the chosen side is preferred, and all else of it."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.data.rules import Rules
from mlxtune.data.sources import Source
from mlxtune.data.tokens import tokenize
from mlxtune.evaluate.compare import compare_run
from mlxtune.layers.adapter import without_adapters
from mlxtune.train import heldout
from mlxtune.train.kept import rows_to_try
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune, open_run
from support.files import write_jsonl
from support.program import mlxtune


@pytest.fixture(scope="module")
def run(recipe, pairs, tmp_path_factory):
    """A run that learned to prefer, measured on pairs that it was trained on."""
    settings = recipe(
        pairs,
        objective="dpo",
        eval={"path": str(pairs), "max_samples": 8, "max_overlap": 1.0},
        train={"max_steps": 12, "learning_rate": 5e-3},
    )
    return fine_tune(settings, tmp_path_factory.mktemp("preferences") / "run", Silent())


def log_probability(model, sample) -> float:
    logits = model(mx.array(sample.tokens[None]))[0, :-1]
    losses = nn.losses.cross_entropy(logits, mx.array(sample.tokens[1:]))
    return -(losses * mx.array(sample.weights[1:])).sum().item()


def test_accuracy_is_that_of_full_logits(run):
    done = mlxtune("eval", str(run.path), "--max-tokens=2", "--json", cwd=run.path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["targets"]
    _, tuned = open_run(run.path)
    renderer = tuned.renderer()
    store = tokenize(Source(str(run.path / "held-out.jsonl")), renderer, Rules(form="pairs"))

    def margins() -> np.ndarray:
        found = np.array([log_probability(tuned.model, sample) for sample in store])
        return found[::2] - found[1::2]

    after = margins()
    with without_adapters(tuned.model):
        before = margins()
        loss = -sum(log_probability(tuned.model, sample) for sample in store[::2])
    tokens = sum(sample.supervised for sample in store[::2])
    assert figures["base"]["held_out_loss"] == pytest.approx(loss / tokens, rel=1e-4)
    of_base, of_tuned = (figures[name]["metrics"] for name in ("base", "tuned"))
    assert of_base["chosen_likelier"]["mean"] == (before > 0).mean()
    assert of_tuned["chosen_likelier"]["mean"] == (after > 0).mean()
    assert of_base["preference"] is None
    accuracy = of_tuned["preference"]
    assert accuracy["mean"] == (after > before).mean() > 0.5
    assert accuracy["count"] == 8 and accuracy["low"] <= accuracy["mean"] <= accuracy["high"]


def test_it_is_shown_with_its_interval(run):
    done = mlxtune("eval", str(run.path), "--max-tokens=2", cwd=run.path)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if "preference accuracy" in line]
    assert "–" in line and "±" in line


def test_what_is_tried_of_a_run_is_what_it_is_to_say(run):
    _, loaded = open_run(run.path)
    samples = rows_to_try(run, loaded.renderer(), 4)
    assert len(samples) == 4 and {sample.side for sample in samples} == {0}


def test_no_pass_has_more_than_some_of_the_pairs(run, pairs, monkeypatch):
    """Memory would grow with the number of pairs that are held out."""
    laid_out, made = heldout.passes, []

    def passes(*given):
        batches = laid_out(*given)
        made.extend(batches)
        return batches

    monkeypatch.setattr(heldout, "passes", passes)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    file = write_jsonl(run.path.parent / "many.jsonl", rows * 2)
    found = compare_run(run.path, data=file, max_tokens=1)
    assert found.records == len(rows) * 2 > 32
    assert max(len(batch.records) for batch in made) <= 16
