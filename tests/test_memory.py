"""How much memory is taken: of which device, for how many answers at once, and what is wired."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxtune.bench.chips import working_set_bytes
from mlxtune.bench.machine import mac
from mlxtune.memory import (
    GB,
    budget_of_mac,
    freed_to_keep,
    memory_budget,
    sequences_within,
    wire_weights,
)
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import load_base
from support.models import tiny_llama

GIB = 2**30


def test_a_budget_is_given_or_taken_from_the_device():
    assert memory_budget(1.5) == 1_500_000_000
    assert GB < memory_budget() < 10**13


@pytest.mark.parametrize(
    ("described", "least_left", "most_left"),
    [
        # As MLX describes Macs and a GPU of NVIDIA's.
        ({"max_recommended_working_set_size": 8 * GIB * 2 // 3, "memory_size": 8 * GIB}, 3.4, 4),
        ({"max_recommended_working_set_size": 16 * GIB * 2 // 3, "memory_size": 16 * GIB}, 6, 8),
        ({"max_recommended_working_set_size": 96 * GIB, "memory_size": 128 * GIB}, 32, 35),
        ({"total_memory": 24 * GB, "free_memory": 20 * GB}, 4.7, 4.9),
    ],
)
def test_the_device_that_computes_keeps_what_its_system_needs(
    monkeypatch, described, least_left, most_left
):
    monkeypatch.setattr(mx, "device_info", lambda: described)
    total = described.get("memory_size") or described["total_memory"]
    assert least_left * GB < total - memory_budget() < most_left * GB


@pytest.mark.parametrize(("chip", "memory"), [("M1", 8), ("M2", 16), ("M4 Max", 64)])
def test_plans_of_a_mac_have_the_budget_that_it_has_itself(chip, memory):
    planned = mac(chip, memory)
    assert planned.budget == budget_of_mac(memory * GIB, working_set_bytes(memory))
    assert planned.memory == memory * GIB


def test_freed_buffers_are_kept_within_the_budget():
    # A step of 3 above 2 that stays, in 20: room for the step, and half of the 15 left over.
    assert freed_to_keep(2, 5, 20) == 7
    assert freed_to_keep(2, 18, 20) == 16, "less than a step takes would be allocated each time"
    assert freed_to_keep(5, 5, 0) == 0


def test_every_verb_that_loads_a_model_has_a_limit(monkeypatch, tiny_folder):
    limits = []
    monkeypatch.setattr(mx, "set_memory_limit", limits.append)
    load_base(ModelSection(path=str(tiny_folder)))
    assert limits == [memory_budget()]


def test_what_is_wired_is_the_weights_and_never_over_the_budget(monkeypatch):
    wired = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    wire_weights(10 * GB)
    assert not wired, "there is nothing to wire on a CPU"
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 9 * GB})
    for live, budget in ((2 * GB, 10 * GB), (8 * GB, 6 * GB), (20 * GB, 30 * GB)):
        monkeypatch.setattr(mx, "get_active_memory", lambda live=live: live)
        wire_weights(budget)
    assert wired == [2 * GB, 6 * GB, 9 * GB]


def test_as_many_sequences_are_generated_at_once_as_fit():
    model = tiny_llama()
    mx.eval(model.parameters())
    length, args = 600, model.args
    width = args.head_dim or args.hidden_size // args.num_attention_heads
    each = 2 * args.num_hidden_layers * args.num_key_value_heads * width * 4 * length
    budget = mx.get_active_memory() + 40 * each
    assert 8 <= sequences_within(model, length, budget) <= 40
    assert sequences_within(model, 2 * length, budget) < sequences_within(model, length, budget)
    assert sequences_within(model, length, 0) == 1
    assert sequences_within(model, length, 10**12, most=32) == 32
