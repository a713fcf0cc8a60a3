"""The loss that keeps no logits: the same numbers as the plain one, in less memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.data.pack import pack
from mlxtune.layers.inject import projections
from mlxtune.losses.cross_entropy import chunked_cross_entropy
from mlxtune.models.enable import enable_packs
from mlxtune.models.heads import split_head
from mlxtune.objectives import base
from mlxtune.train.step import LossFunction, batch_arrays
from support.compare import distance, loss_of_each_alone, random_samples, value_and_gradients
from support.models import tiny, tiny_llama, with_adapters

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


MODELS = {
    "tied": lambda: tiny_llama(tied=True),
    "untied": lambda: tiny_llama(tied=False),
    "capped": lambda: tiny("gemma2", num_key_value_heads=4, final_logit_softcapping=5.0),
}


@pytest.mark.parametrize("trained", [None, "all", "lora", "dora"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_models_loss_is_that_of_each_sample_alone(kind, trained, monkeypatch):
    """Also where the head is trained, itself or by an adapter."""
    monkeypatch.setattr(base, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(base, "LEAST_ROWS", 32)
    model = MODELS[kind]()
    enable_packs(model)
    paths, of_head = projections(model), trained in ("lora", "dora")
    if of_head and kind != "untied":
        return  # an embedding takes no adapter
    with_adapters(model, [p for p in paths if of_head or p != "lm_head"], dora=trained == "dora")
    _, head = split_head(model)
    if trained == "all":
        head.module.unfreeze()
    assert bool(head.trained) == bool(trained)
    samples = random_samples((40, 12, 31, 19, 50, 22, 14, 61), prefix=9, untrained=10)
    model.train()
    loss, arrays = LossFunction(model), batch_arrays(batch := pack(samples))
    assert batch.targets.size > 2 * base.LEAST_ROWS
    value, gradients = value_and_gradients(
        model, lambda: loss(arrays, batch.prefix, batch.packed)[0]
    )
    expected, wanted = value_and_gradients(model, lambda: loss_of_each_alone(model, samples))
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, wanted[name]) < 1e-4, name
        assert mx.abs(wanted[name]).max().item() > 0, name


def test_no_more_than_a_chunk_of_logits_exists_at_once_where_the_head_is_trained():
    words, width, count, rows = 20_000, 16, 1024, 16
    weight, hidden = mx.random.normal((words, width)), mx.random.normal((count, width))
    targets, weights = mx.zeros((count,), mx.int32), mx.ones((count,))
    mx.eval(weight, hidden, targets, weights)

    def loss(x, w):
        project = lambda part, own: part @ own.T  # noqa: E731
        return chunked_cross_entropy(project, x, targets, weights, rows=rows, trained=[w])

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.value_and_grad(loss, argnums=[0, 1])(hidden, weight))
    assert mx.get_peak_memory() - before < 0.3 * (4 * words * count)


def test_a_trained_head_drops_the_same_in_both_directions():
    """What it drops for the loss it drops for the gradient."""
    mx.random.seed(0)
    dropout = nn.Dropout(0.5)
    weight, hidden = mx.random.normal((WORDS, WIDTH)), mx.ones((ROWS, WIDTH))
    targets, weights = mx.zeros((ROWS,), mx.int32), mx.ones((ROWS,))
    kept = []

    def head(x, w):
        kept.append(dropout(x))
        return kept[-1] @ w.T

    def loss(w):
        return chunked_cross_entropy(head, hidden, targets, weights, rows=32, trained=[w])

    gradient = mx.grad(loss)(weight)
    assert len(kept) == -(-ROWS // 32)
    logits = mx.concatenate(kept) @ weight.T
    above = mx.softmax(logits, axis=-1) - (mx.arange(WORDS) == 0)
    assert distance(gradient, above.T @ mx.concatenate(kept)) < 1e-5
