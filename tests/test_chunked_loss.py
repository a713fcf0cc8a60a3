"""The loss that keeps no logits: the same numbers as the plain one, in less memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import tiny_llama
from helpers import (
    distance,
    loss_of_each_alone,
    random_samples,
    tiny,
    value_and_gradients,
    with_adapters,
)

from mlxtune.data.pack import pack
from mlxtune.layers.inject import projections
from mlxtune.losses.cross_entropy import chunked_cross_entropy
from mlxtune.models.heads import split_head
from mlxtune.models.packed import enable_packs
from mlxtune.train import step
from mlxtune.train.step import LossFunction, batch_arrays

ROWS, WIDTH, WORDS = 70, 32, 300


def plain_head(weight):
    return lambda hidden: hidden @ weight.T


def capped_head(weight):
    return lambda hidden: mx.tanh(hidden @ weight.T / 3.0) * 3.0


def packed_head(weight):
    packed = mx.quantize(weight, group_size=32, bits=4)
    return lambda hidden: mx.quantized_matmul(hidden, *packed, group_size=32, bits=4)


HEADS = {"plain": plain_head, "capped": capped_head, "packed": packed_head}


def problem(dtype: mx.Dtype = mx.float32):
    mx.random.seed(0)
    hidden = mx.random.normal((ROWS, WIDTH)).astype(dtype)
    weight = mx.random.normal((WORDS, WIDTH)).astype(dtype)
    targets = mx.random.randint(0, WORDS, (ROWS,))
    weights = mx.random.uniform(shape=(ROWS,)) * (mx.arange(ROWS) % 3 > 0)
    return hidden, weight, targets, weights


def by_mlx(head, targets, weights):
    def loss(hidden):
        logits = head(hidden).astype(mx.float32)
        return nn.losses.cross_entropy(logits, targets, weights, reduction="sum")

    return loss


@pytest.mark.parametrize("rows", [1, 16, 32, 69, 70, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradient_are_mlx_own(kind, rows):
    hidden, weight, targets, weights = problem()
    head = HEADS[kind](weight)

    def ours(x):
        return 3.0 * chunked_cross_entropy(head, x, targets, weights, rows=rows)

    value, gradient = mx.value_and_grad(ours)(hidden)
    expected, wanted = mx.value_and_grad(by_mlx(head, targets, weights))(hidden)
    assert distance(value, 3.0 * expected) < 1e-5
    assert distance(gradient, 3.0 * wanted) < 1e-5
    alone = chunked_cross_entropy(head, hidden, targets, weights, rows=rows, gradient=False)
    assert distance(alone, expected) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half_and_is_reduced_in_float32(dtype):
    hidden, weight, targets, weights = problem(dtype)
    head = plain_head(weight)

    def ours(x):
        return chunked_cross_entropy(head, x, targets, weights, rows=32)

    value, gradient = mx.value_and_grad(ours)(hidden)
    expected, wanted = mx.value_and_grad(by_mlx(head, targets, weights))(hidden)
    assert value.dtype == mx.float32 and gradient.dtype == dtype
    assert distance(value, expected) < 1e-5
    assert distance(gradient, wanted) < 2 ** (-6 if dtype == mx.bfloat16 else -9)


def test_logits_far_from_zero_do_not_overflow():
    hidden, weight, targets, weights = problem()
    head = plain_head(weight * 100)
    value = chunked_cross_entropy(head, hidden, targets, weights, rows=32)
    assert distance(value, by_mlx(head, targets, weights)(hidden)) < 1e-5


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    words, rows = 40_000, 8
    weight = mx.random.normal((words, 16))
    head = plain_head(weight)

    def peak(count: int, chunked: bool) -> int:
        hidden = mx.random.normal((count, 16))
        targets, weights = mx.zeros((count,), mx.int32), mx.ones((count,))
        mx.eval(hidden, weight, targets, weights)
        loss = by_mlx(head, targets, weights)
        if chunked:

            def loss(x):
                return chunked_cross_entropy(head, x, targets, weights, rows=rows)

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory() - before

    logits = 4 * words * 1024
    assert peak(1024, chunked=False) > 1.9 * logits
    assert peak(1024, chunked=True) < 0.2 * logits
    # MLX lays out a few operations ahead, more or fewer as the machine is busy.
    chunk = 4 * words * rows
    assert peak(1024, chunked=True) < peak(512, chunked=True) + 2 * chunk


@pytest.mark.parametrize(
    "made",
    [
        lambda: tiny_llama(tied=True),
        lambda: tiny_llama(tied=False),
        lambda: tiny("gemma2", num_key_value_heads=4, final_logit_softcapping=5.0),
    ],
    ids=["tied", "untied", "capped"],
)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_models_loss_is_that_of_each_sample_alone(made, trained, monkeypatch):
    """In chunks, and for a head that is trained itself without them, exactly."""
    monkeypatch.setattr(step, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(step, "LEAST_ROWS", 32)
    model = made()
    enable_packs(model)
    with_adapters(model, [p for p in projections(model) if p != "lm_head"])
    _, head = split_head(model)
    assert head.frozen
    if trained:
        head.module.unfreeze()
        assert not head.frozen
    samples = random_samples((40, 12, 31, 19, 50, 22, 14, 61), prefix=9, untrained=10)
    model.train()
    loss, arrays = LossFunction(model), batch_arrays(batch := pack(samples))
    assert batch.targets.size > 2 * step.LEAST_ROWS
    value, gradients = value_and_gradients(model, lambda: loss(arrays, batch.prefix, batch.packed))
    expected, wanted = value_and_gradients(model, lambda: loss_of_each_alone(model, samples))
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, wanted[name]) < 1e-4, name
