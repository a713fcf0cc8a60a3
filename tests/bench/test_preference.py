"""The benchmark of preference training: both trainers get the same, and what is said of them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mlxtune.data.render import Sample
from support.files import ROOT, SHELL_TRAIN
from support.models import save_real_vocabulary


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("preference")


@pytest.fixture
def pairs(bench):
    return importlib.import_module("training.pairs")


@pytest.fixture
def requests(bench):
    return bench.read_pairs(SHELL_TRAIN)


def test_a_shell_pair_has_its_own_command_and_that_of_another_record(pairs, requests):
    made = pairs.shell_pairs(requests, None, 64)
    assert [(row["prompt"], row["chosen"]) for row in made] == requests[:64]
    commands = {command for _, command in requests}
    assert all(row["rejected"] in commands - {row["chosen"]} for row in made)


def test_each_pair_has_a_long_context_of_its_own(pairs, requests):
    words = SimpleNamespace(encode=str.split)
    made = pairs.pairs_in_context(requests, words, 20)
    contexts = [row["prompt"].rpartition("\n")[0].splitlines() for row in made]
    lengths = [sum(len(line.split()) for line in lines) for lines in contexts]
    assert pairs.CONTEXT_TOKENS - 40 < min(lengths) <= max(lengths) <= pairs.CONTEXT_TOKENS
    assert len({lines[0] for lines in contexts}) == len(made)
    assert all(row["chosen"] != row["rejected"] for row in made)


def test_the_peer_is_given_our_tokens_up_to_the_end_of_an_answer(pairs, tmp_path):
    tokens, weights = np.arange(6, dtype=np.int32), np.float32([0, 0, 1, 1, 0, 0])
    chosen = Sample(tokens, weights, 1, references=np.float32([0, 0, -1, -2, 0, 0]))
    sides = [chosen, replace(chosen, tokens=tokens + 10, side=1)]
    [group] = groups = pairs.groups_of(sides)
    pairs.write_peer_rows(tmp_path / "peer.json", groups)
    assert json.loads((tmp_path / "peer.json").read_text()) == [
        {
            "chosen": [0, 1, 2, 3],
            "rejected": [10, 11, 12, 13],
            "chosen_prompt_length": 2,
            "rejected_prompt_length": 2,
        }
    ]
    for sample in group:
        assert sample.weights.tolist() == [0, 0, 1, 1]
        assert sample.references.tolist() == [0, 0, -1, -2]


def turn(seconds=1.0, peak=1, tokens=1, chosen=-40.0, **more):
    figures = {"seconds": seconds, "peak_memory_bytes": peak, "flops": 30.0, "losses": [0.5]}
    return figures | {"chosen": [chosen], "tokens": [tokens], "peer_flops": [90.0]} | more


def measured(bench, of_peer=-40.0):
    warm_ups = {
        "mlx-lm-lora": turn(seconds=30.0, peak=4, chosen=of_peer),
        "mlxtune": turn(peak=1, reference_seconds=[32.0], reference_peak_memory_bytes=[1]),
    }
    turns = {
        "mlx-lm-lora": [turn(s, 8, 500) for s in (6.0, 8.0, 40.0)],
        "mlxtune": [turn(s, 2, 100) for s in (2.0, 2.0, 4.0)],
    }
    return bench.summary(bench.WORKLOADS["a"], warm_ups, turns, [15.0])


def test_figures_are_medians_after_the_warm_up_and_ratios_of_the_same_pairs(bench):
    figures = measured(bench)
    theirs, ours = figures["mlx-lm-lora"], figures["mlxtune"]
    assert (theirs["pairs_per_second"], ours["pairs_per_second"]) == (0.5, 2.0)
    assert figures["speed_ratios"] == [3.0, 4.0, 10.0] and figures["speed_ratio"] == 4.0
    assert figures["memory_ratio"] == 0.25
    # Half a second a pair for the reference of 64, and half for training it.
    assert ours["reference"]["first_epoch_pairs_per_second"] == pytest.approx(1.0)
    assert figures["matmul_fraction"] == 1.0
    speeds, amounts = bench.tables({"a": figures}).split("\n\n")
    assert "| 0.500 | 2.00 | **4.0 ×** (≥ 4) |" in speeds and "**0.25** (≤ 0.35)" in speeds
    assert "| 500 | 100 |" in amounts and "| 3.0 | 32.0 s for 64 pairs |" in amounts
    for table in (speeds, amounts):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_trainers_that_do_not_compute_the_same_are_not_compared(bench):
    with pytest.raises(SystemExit, match="do not compute the same"):
        measured(bench, of_peer=-40.1)


@pytest.mark.slow
def test_our_worker_says_what_the_figures_are_made_of(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))
    save_real_vocabulary(tmp_path / "model")
    workload = replace(bench.WORKLOADS["a"], pairs=8)
    job = bench.write_job(workload, tmp_path / "model", SHELL_TRAIN, tmp_path)
    worker = bench.Worker("mlxtune", job, "training.pairs_worker")
    first, second = worker.warm_up, worker.turn()
    worker.stop()
    assert first["losses"] == [pytest.approx(np.log(2), abs=1e-4)]
    figures = bench.summary(
        workload,
        {"mlx-lm-lora": first, "mlxtune": first},
        {"mlx-lm-lora": [second], "mlxtune": [second]},
        [1.0],
    )
    ours, amounts = figures["mlxtune"], figures["mlx-lm-lora"]
    assert figures["speed_ratio"] == figures["memory_ratio"] == 1
    assert ours["losses"][1] != ours["losses"][0]  # other pairs, after a step
    assert 0 < ours["flops_a_step"] < amounts["flops_a_step"]
    assert ours["reference"]["seconds"] > 0 and ours["reference"]["peak_memory_bytes"] > 0
