"""The order of the data: every sample once an epoch, and the same order when resumed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxtune.data.batches import Part, Plan
from mlxtune.data.pack import Batch
from mlxtune.data.passes import Layout
from support.compare import random_samples


def plan(**changes) -> Plan:
    samples = random_samples(np.random.default_rng(1).integers(5, 30, 23))
    settings = {"batch_size": 4, "accumulation": 2, "seed": 7}
    layout = Layout(changes.pop("packing", True))
    return Plan([Part(samples)], layout=layout, **(settings | changes))


def records(steps: list[list[Batch]]) -> list[list[tuple[int, ...]]]:
    return [[batch.records for batch in step] for step in steps]


def order(steps: list[list[Batch]]) -> list[set[int]]:
    return [{r for batch in step for r in batch.records} for step in steps]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (1, 1), (5, 3), (64, 1)])
def test_an_epoch_sees_every_sample_once(batch_size, accumulation, packing):
    schedule = plan(batch_size=batch_size, accumulation=accumulation, packing=packing)
    length = schedule.steps_per_epoch
    for epoch in range(3):
        steps = list(schedule.steps(epoch * length, (epoch + 1) * length))
        seen = [r for step in steps for batch in step for r in batch.records]
        assert sorted(seen) == list(range(1, 24))
        assert all(len(step) <= accumulation for step in steps)
        assert all(len(batch.records) <= batch_size for step in steps for batch in step)
        assert all(batch.packed == packing for step in steps for batch in step)


def test_steps_taken_up_anywhere_are_the_same_steps():
    whole = list(plan().steps(0, 9))
    for start in range(10):
        again = list(plan().steps(start, 9))
        assert records(again) == records(whole[start:])
        for step, other in zip(again, whole[start:], strict=True):
            for batch, same in zip(step, other, strict=True):
                assert np.array_equal(batch.tokens, same.tokens)
                assert np.array_equal(batch.weights, same.weights)


def test_seed_and_epoch_change_the_order_and_packing_does_not():
    length = plan().steps_per_epoch
    first, second = list(plan().steps(0, length)), list(plan().steps(length, 2 * length))
    assert order(first) != order(second)
    assert order(first) != order(list(plan(seed=8).steps(0, length)))
    assert order(first) == order(list(plan(packing=False).steps(0, length)))


def test_total_steps_come_from_epochs_unless_they_are_given():
    assert plan().steps_per_epoch == 3
    assert plan().total_steps(epochs=2.0, max_steps=None) == 6
    assert plan().total_steps(epochs=2.0, max_steps=5) == 5
    assert plan().total_steps(epochs=0.01, max_steps=None) == 1


def mixed(*epochs: float) -> Plan:
    """Three parts of 4, 10 and 6 samples, records numbered on."""
    samples = random_samples([8] * 20)
    parts = [samples[:4], samples[4:14], samples[14:]]
    made = [Part(part, often) for part, often in zip(parts, epochs, strict=True)]
    return Plan(made, 4, 1, 7, Layout(packing=False))


def seen(schedule: Plan, epoch: int) -> list[int]:
    length = schedule.steps_per_epoch
    steps = schedule.steps(epoch * length, (epoch + 1) * length)
    return sorted(record for step in steps for batch in step for record in batch.records)


def test_a_part_is_seen_as_often_as_it_says():
    schedule = mixed(2.0, 1.0, 0.5)
    assert schedule.steps_per_epoch == 6  # 8 + 10 + 3 samples by 4
    for epoch in range(2):
        records = seen(schedule, epoch)
        assert records[:8] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert records[8:18] == list(range(5, 15))
        assert len(records) == 21
    # What one epoch left out, the next one takes.
    assert sorted(seen(schedule, 0)[18:] + seen(schedule, 1)[18:]) == list(range(15, 21))


def test_no_sample_is_seen_two_times_more_often_than_another():
    schedule = mixed(1.3, 0.37, 2.6)
    counts = np.zeros(21, int)
    for epoch in range(7):
        for record in seen(schedule, epoch):
            counts[record] += 1
    for part in (counts[1:5], counts[5:15], counts[15:]):
        assert part.max() - part.min() <= 1


def test_mixed_parts_are_the_same_steps_when_taken_up_anywhere():
    whole = list(mixed(2.0, 1.0, 0.5).steps(0, 15))
    for start in (1, 5, 6, 11):
        assert records(list(mixed(2.0, 1.0, 0.5).steps(start, 15))) == records(whole[start:])


@pytest.mark.parametrize("packing", [True, False])
def test_no_pass_of_any_shuffle_is_larger_than_the_largest(packing):
    """Also where the longest samples begin alike and some of the others do not."""
    long, other = random_samples([140] * 9, prefix=100), random_samples([90] * 2, seed=1)
    samples = [replace(s, record=n) for n, s in enumerate([*long, *other])]

    def sized(seed: int) -> tuple[int, list[int]]:
        schedule = Plan([Part(samples)], 3, 1, seed, Layout(packing))
        steps = schedule.steps(0, 4 * schedule.steps_per_epoch)
        return schedule.largest().tokens.size, [b.tokens.size for step in steps for b in step]

    bounds, seen = zip(*(sized(seed) for seed in range(8)), strict=True)
    sizes = {size for some in seen for size in some}
    assert len(set(bounds)) == 1 and max(sizes) == bounds[0]
    assert not packing or bounds[0] > 3 * 140 - 2 * 100 + 8  # more than the longest take
