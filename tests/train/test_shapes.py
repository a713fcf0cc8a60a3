"""Few shapes are compiled, whatever the lengths and the batch size, and results stay the same."""

from __future__ import annotations

import numpy as np
import pytest

from mlxtune.data.pack import filled_up, pack, pad
from mlxtune.data.passes import Layout, passes
from mlxtune.data.render import Sample
from mlxtune.models.enable import enable_packs
from mlxtune.train.optim import make_optimizer
from mlxtune.train.shapes import MOST, Shapes
from mlxtune.train.step import TrainStep
from support.compare import random_samples, trainable
from support.models import tiny_llama, with_adapters


def chats(count: int, seed: int) -> list[Sample]:
    """Of a shared beginning, a question and an answer, as long as people's are."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        question, answer = np.clip(generator.lognormal((4.0, 4.8), 0.9), 4, 1500).astype(int)
        text = generator.integers(100, 4000, question + answer)
        tokens = np.concatenate([np.arange(24), text]).astype(np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-answer:] = 1
        made.append(Sample(tokens=tokens, weights=weights, record=number))
    return made


# A thousand steps are 1,000 passes and more; fewer samples at once are cheaper to lay out.
STEPS = {1: 1000, 4: 1000, 16: 120}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", STEPS)
def test_few_shapes_are_compiled_in_many_steps(packing, batch_size):
    shapes, layout = Shapes(), Layout(packing, few_shapes=True, pass_cost=256)
    pool, generator = chats(2000, seed=1), np.random.default_rng(2)
    seen, uncompiled, before, after = set(), 0, 0, 0
    count = 0
    for _ in range(STEPS[batch_size]):
        chosen = [pool[i] for i in generator.integers(0, len(pool), batch_size)]
        for batch in passes(chosen, batch_size, layout):
            fitted, compiled = shapes.fit(batch, "whole")
            assert fitted.weight == pytest.approx(batch.weight)
            count += 1
            uncompiled += not compiled
            before, after = before + batch.tokens.size, after + fitted.tokens.size
            if compiled:
                seen.add((*fitted.tokens.shape, fitted.prefix, len(fitted.targets)))
    assert len(seen) <= len(shapes) <= MOST == 32
    assert uncompiled < 0.04 * count
    assert after < 1.3 * before


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_that_is_filled_up_has_the_same_step(packed):
    samples = random_samples((30, 20, 25, 18), prefix=9, untrained=10)
    batch = pack(samples) if packed else pad(samples)
    rows, width = batch.tokens.shape
    larger = filled_up(batch, rows + 2, width + 24, len(batch.targets) + 32)
    assert larger.tokens.shape == (rows + 2, width + 24)
    results = []
    for given in (batch, larger):
        model = tiny_llama()
        enable_packs(model)
        with_adapters(model)
        model.train()
        step = TrainStep(model, make_optimizer("adamw", model, weight_decay=0.0), max_grad_norm=1.0)
        losses = [step([given], 1e-3).loss.item() for _ in range(3)]
        results.append((losses, trainable(model)))
    (losses, own), (others, filled) = results
    assert others == pytest.approx(losses, rel=1e-5)
    for name, array in own.items():
        assert np.abs(np.array(array) - np.array(filled[name])).max() < 2e-5, name


def test_a_prefix_over_several_rows_keeps_its_width():
    batch = pack(random_samples((330, 310, 325, 318), prefix=300, untrained=301))
    rows, width = batch.tokens.shape
    assert batch.prefix > width
    for larger in ((rows, width + 8, 64), (rows - 1, width, 64)):
        with pytest.raises(ValueError, match="cannot be filled up"):
            filled_up(batch, *larger)


def test_no_more_shapes_than_may_be_are_taken_for_compiled():
    shapes = Shapes(most=2)
    batches = [pad(random_samples((length,))) for length in (500, 20, 120, 700)]
    fits = [shapes.fit(batch, "whole") for batch in batches]
    assert [compiled for _, compiled in fits] == [True, True, True, False]
    assert fits[2][0].tokens.shape == fits[0][0].tokens.shape
    # Another function is compiled for the same shapes anew.
    assert shapes.fit(batches[0], "another") == (batches[0], False)
    assert len(shapes) == 2


def test_metal_is_never_given_eight_queries_or_fewer():
    for build in (pad, pack):
        layout = Layout(build is pack, few_shapes=True)
        assert all(b.tokens.shape[1] >= 16 for b in passes(random_samples((3, 5)), 2, layout))
