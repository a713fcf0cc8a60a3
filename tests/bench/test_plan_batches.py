"""Every batch has a plan, and it is what MLX takes: short answers behind long prompts too."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.bench.graph import Shape
from mlxtune.bench.memory import _Array, _reshaped, _row_major, peak_memory
from mlxtune.bench.step import StepModel
from mlxtune.data.pack import pack, pad
from mlxtune.data.passes import Layout, passes
from mlxtune.data.render import Sample
from support.plans import LLAMA, recipe_of
from support.properties import examples

# Wide enough for what MLX happens to have in flight to be little of the peak.
CONFIG = LLAMA | {"num_hidden_layers": 2}


def samples_behind(prompt, tails, trained=1):
    """Samples that begin with the same prompt, the last tokens of which are trained."""
    begin = np.random.default_rng(0).integers(0, 90, prompt)
    samples = []
    for number, tail in enumerate(tails):
        own = np.random.default_rng(number + 1).integers(0, 90, tail)
        tokens = np.concatenate([begin, own]).astype(np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-trained:] = 1
        samples.append(Sample(tokens, weights, number + 1))
    return samples


def alike(count, length):
    """The same record so many times: all but its answer is common to all."""
    [sample] = samples_behind(length, [2])
    return [Sample(sample.tokens, sample.weights, n + 1) for n in range(count)]


def planned_and_measured(batch, *, packing=True, twice=False):
    model = StepModel(recipe_of(train={"packing": packing}), CONFIG, None, "float32")
    blocks = range(model.blocks if twice else 0)
    planned = peak_memory(model.graph(batch, blocks))
    gc.collect()
    others = mx.get_active_memory()  # of tests before this one
    model.materialize()
    measured = model.measure(batch, blocks, steps=2).peak - others
    del model
    gc.collect()
    return planned, measured


CASES = {
    "24 letters behind a system prompt": samples_behind(120, [4 + n % 3 for n in range(24)]),
    "8 records that are the same": alike(8, 120),
    "two tokens each": samples_behind(0, [2] * 5),
    "one record of two tokens": samples_behind(0, [2]),
    "one token after the prompt": samples_behind(40, [1] * 6),
    "a prompt as long as a row": samples_behind(16, [16, 16]),
    "one long among short": samples_behind(64, [1, 1, 90]),
}


@pytest.mark.parametrize("case", CASES)
def test_short_answers_behind_a_prompt_have_the_peak_that_is_planned(case):
    planned, measured = planned_and_measured(pack(CASES[case]))
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_prompt_that_fills_rows_is_among_the_cases():
    """Those have no keys of their own: arrays without elements."""
    batch = pack(CASES["8 records that are the same"])
    assert batch.prefix // batch.tokens.shape[1] > 1


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Few records: with and without a prompt before them, short, long, or all the same."""
    count = draw(st.integers(1, 12))
    prompt = draw(st.sampled_from([0, 8, 17, 40, 130]))
    if draw(st.booleans()):
        return alike(count, max(prompt, 1))
    longest = draw(st.sampled_from([2, 5, 60]))
    tails = draw(st.lists(st.integers(2, longest), min_size=count, max_size=count))
    return samples_behind(prompt, tails, trained=draw(st.integers(1, 2)))


@examples(8, few=4)
@given(batches(), st.booleans(), st.booleans())
def test_any_small_batch_has_the_peak_that_is_planned(samples, packing, twice):
    batch = (pack if packing else pad)(samples)
    planned, measured = planned_and_measured(batch, packing=packing, twice=twice)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@examples(40, few=10)
@given(batches(), st.booleans())
def test_any_small_batch_is_planned_as_on_a_gpu_too(samples, packing):
    from mlxtune.device import as_on_gpu

    with as_on_gpu():
        layout = Layout(packing, few_shapes=True, pass_cost=256)
        model = StepModel(recipe_of(train={"packing": packing}), CONFIG, None, "bfloat16")
        for batch in passes(samples, 8, layout):
            assert peak_memory(model.graph(batch)) > model.sizes.floor


# ----------------------------------------------------------- strides, against numpy's own


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """A view of an array, axes of no and of one element among its own, and another shape."""
    dims = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    array = np.zeros(dims, np.int8).transpose(draw(st.permutations(range(len(dims)))))
    if draw(st.booleans()):
        array = np.broadcast_to(array[None], (draw(st.integers(1, 3)), *array.shape))
    wanted, left = [], array.size
    for _ in range(draw(st.integers(0, 3))):
        parts = [n for n in range(1, left + 1) if left % n == 0] or [0, 1, 3]
        wanted.append(draw(st.sampled_from(parts)))
        left = left // wanted[-1] if wanted[-1] else 0
    return array, (*wanted, left)


@examples(400, few=200)
@given(reshapes())
def test_a_reshaped_view_lies_where_numpy_lays_it(given_):
    array, dims = given_
    source = _Array(0, Shape(array.shape, mx.int8), array.strides)
    found = _reshaped(source, dims)
    if not array.size:
        assert found == _row_major(dims)  # nothing lies anywhere, and nothing is copied
        return
    view = array.view()
    try:
        view.shape = dims
    except AttributeError:  # numpy's word for that it has to be copied
        assert found is None
        return
    assert found is not None
    axes = zip(found, view.strides, dims, strict=True)
    assert all(ours == theirs for ours, theirs, count in axes if count > 1)
