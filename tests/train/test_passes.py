"""A step's samples in passes: the same mathematics, less waste; and what comes is made ahead."""

from __future__ import annotations

import threading
from dataclasses import replace

import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.data.ahead import ahead
from mlxtune.data.pack import pack
from mlxtune.data.passes import Layout, passes
from mlxtune.models.attention import blocks
from mlxtune.models.enable import enable_packs
from mlxtune.train.heldout import held_out_loss, sample_losses
from support.compare import random_samples
from support.models import tiny_llama, with_adapters
from support.program import wait_until


def area(batches) -> int:
    return sum(batch.tokens.size for batch in batches)


def records(batches) -> list[int]:
    return sorted(record for batch in batches for record in batch.records)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("few_shapes", [True, False])
def test_every_sample_is_in_one_pass_and_no_pass_is_over_the_batch_size(packing, few_shapes):
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 24):
        samples = random_samples(generator.integers(4, 90, size), prefix=3)
        for batch_size in (1, 4, 100):
            made = passes(samples, batch_size, Layout(packing, few_shapes))
            assert records(made) == list(range(1, size + 1))
            assert all(len(batch.records) <= batch_size for batch in made)
            # A loss on nothing weighs nothing.
            total = sum(float(s.weights[1:].sum()) for s in samples)
            assert sum(batch.weight for batch in made) == pytest.approx(total, rel=1e-6)


def test_unequal_lengths_are_not_put_into_one_grid():
    samples = random_samples([1900, 1400, 1000, 700])
    assert area([pack(samples)]) > 1.1 * 5000
    assert area(passes(samples, 4, Layout())) < 1.02 * 5000


def test_a_long_shared_beginning_is_computed_once_if_that_costs_less():
    samples = random_samples([330, 340, 335, 345, 331, 342, 338, 333], prefix=300, untrained=300)
    assert len(passes(samples, 8, Layout())) == 1


def test_samples_with_the_same_beginning_come_together():
    one = random_samples([330, 340, 335, 345], prefix=300, untrained=300, seed=1)
    other = random_samples([331, 342, 338, 333], prefix=300, untrained=300, seed=2)
    mixed = [sample for pair in zip(one, other, strict=True) for sample in pair]
    made = passes(mixed, 8, Layout())
    assert [batch.prefix for batch in made] == [300, 300]
    # Eight computed alone would be five times as many tokens.
    assert area(made) < 1100 < sum(len(s.tokens) for s in mixed) / 2


def attention_pairs(made) -> int:
    """Pairs of tokens that attention multiplies."""
    parts = [(b, blocks(*b.tokens.shape, b.prefix, heads=9)) for b in made]
    areas = (
        (p.rows.stop - p.rows.start) * (p.queries.stop - p.queries.start) * p.seen
        for _, some in parts
        for p in some
    )
    return sum(areas)


@pytest.mark.parametrize(
    "lengths", [[2000, *[20] * 60], [60, 90, 120] * 20, [900, 700, *[40] * 30]]
)
def test_attention_grows_with_the_squares_of_the_samples_not_of_the_pack(lengths):
    for times in (1, 4):
        samples = random_samples([n + 30 for n in lengths * times], prefix=30, untrained=30)
        needed = times * sum(n * (30 + n / 2) for n in lengths)
        assert attention_pairs(passes(samples, len(samples), Layout())) < 3 * needed


def test_few_shapes_occur_where_few_are_asked_for():
    """Each shape is compiled anew, so that is what a long run pays for."""
    generator = np.random.default_rng(3)
    shapes: dict[bool, set] = {True: set(), False: set()}
    used: dict[bool, int] = {True: 0, False: 0}
    for seed in range(200):
        lengths = np.clip(generator.lognormal(4, 0.6, 8), 20, 500).astype(int) + 30
        samples = random_samples(lengths, prefix=30, untrained=30, seed=seed)
        for few in shapes:
            for batch in passes(samples, 8, Layout(few_shapes=few, pass_cost=256)):
                shapes[few].add((*batch.tokens.shape, batch.prefix, len(batch.targets)))
                used[few] += batch.tokens.size
    assert len(shapes[True]) < 0.4 * len(shapes[False])
    assert len(shapes[True]) < 60
    assert used[True] < 1.25 * used[False]


def packed_model(**changes) -> nn.Module:
    model = tiny_llama()
    enable_packs(model)
    return with_adapters(model, **changes)


def test_held_out_loss_is_the_same_in_passes():
    samples = random_samples(np.random.default_rng(2).integers(10, 60, 21), prefix=9)
    model = packed_model()
    plain = held_out_loss(model, samples, batch_size=1, layout=Layout(packing=False))
    assert held_out_loss(model, samples, batch_size=4, layout=Layout()) == pytest.approx(
        plain, rel=1e-5
    )


@pytest.mark.parametrize("packing", [True, False])
def test_losses_of_samples_are_those_of_each_alone(packing):
    samples = random_samples(np.random.default_rng(2).integers(10, 60, 13), prefix=9)
    samples = [replace(sample, record=1) for sample in samples]
    model = packed_model()
    found = sample_losses(model, samples, batch_size=4, layout=Layout(packing=packing))
    for sample, total in zip(samples, found, strict=True):
        mean = held_out_loss(model, [sample], batch_size=1, layout=Layout(packing=False))
        assert total == pytest.approx(mean * sample.weights[1:].sum(), rel=1e-5)


# ------------------------------------------------------------------------ made ahead


def test_items_come_in_order_and_before_they_are_asked_for():
    made = []

    def items():
        for number in range(10):
            made.append(number)
            yield number

    coming = ahead(items(), depth=3)
    assert next(coming) == 0
    wait_until(lambda: len(made) >= 5)
    # One was taken, three wait, one is in hand.
    assert len(made) == 5
    assert list(coming) == list(range(1, 10))


def test_an_error_comes_where_its_item_would_have():
    def items():
        yield 1
        raise OSError("the disk is gone")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_the_thread_ends_when_nobody_asks_any_more():
    def forever():
        while True:
            yield 0

    coming = ahead(forever())
    next(coming)

    def goes_on():
        return any(thread.name == "ahead" for thread in threading.enumerate())

    assert goes_on()
    coming.close()
    wait_until(lambda: not goes_on())
