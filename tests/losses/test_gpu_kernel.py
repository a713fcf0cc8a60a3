"""On a GPU cross-entropy is MLX's kernel, in chunks as before: the same values and gradients."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxtune.device import as_on_gpu
from mlxtune.losses.cross_entropy import chunked_cross_entropy
from mlxtune.losses.measures import CROSS_ENTROPY
from mlxtune.losses.per_token import Chunked, per_token
from support.compare import distance

mx.random.seed(0)
HIDDEN, HEAD = mx.random.normal((37, 16)), mx.random.normal((16, 50))
TARGETS = mx.random.randint(0, 50, (37,))
WEIGHTS = mx.random.uniform(shape=(37,))


def value_and_gradient():
    def loss(hidden):
        return chunked_cross_entropy(lambda x: x @ HEAD, hidden, TARGETS, WEIGHTS, rows=8)

    return mx.value_and_grad(loss)(HIDDEN)


def test_the_kernel_gives_the_same_in_chunks(monkeypatch):
    calls = []
    kernel = mx.fast.cross_entropy
    monkeypatch.setattr(
        mx.fast, "cross_entropy", lambda *given: calls.append(given[0].shape) or kernel(*given)
    )
    value, gradient = value_and_gradient()
    assert not calls
    with as_on_gpu():
        theirs, their_gradient = value_and_gradient()
        chunked = Chunked(lambda x: x @ HEAD, 8)
        [each] = per_token(chunked, HIDDEN, [CROSS_ENTROPY], [TARGETS], gradient=False)
    assert set(calls) == {(8, 50), (5, 50)}, "chunks, and never all logits"
    assert theirs.item() == pytest.approx(value.item(), rel=1e-6)
    assert distance(their_gradient, gradient) < 1e-5
    assert (WEIGHTS * each).sum().item() == pytest.approx(value.item(), rel=1e-6)
