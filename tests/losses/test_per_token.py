"""Figures of each token, and their gradients, without keeping logits."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from mlxtune.device import as_on_gpu
from mlxtune.losses import measures
from mlxtune.losses.measures import CROSS_ENTROPY, ENTROPY, LIKELIEST, SUM_OF_SQUARES
from mlxtune.losses.per_token import Chunked, per_token
from support.compare import distance

ROWS, WIDTH, WORDS, TOP = 37, 16, 60, 7
GENERATOR = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return GENERATOR.normal(size=shape).astype(np.float32)


HIDDEN, WEIGHT = array(ROWS, WIDTH), array(WORDS, WIDTH)
OTHER_HIDDEN, OTHER_WEIGHT = array(ROWS, 8), 0.5 * array(WORDS, 8)
TARGETS = GENERATOR.integers(0, WORDS, ROWS).astype(np.int32)
OWNERS = np.sort(GENERATOR.integers(0, 6, ROWS))


def capped(hidden: mx.array, weight: mx.array) -> mx.array:
    return mx.tanh(hidden @ weight.T / 3.0) * 3.0


def preference(losses: mx.array) -> mx.array:
    """Of no weights that are known beforehand: six answers, in three pairs."""
    sums = (mx.array(OWNERS)[None] == mx.arange(6)[:, None]) @ losses[:, None]
    return -nn.log_sigmoid(0.1 * (sums[0::2] - sums[1::2])).sum()


def of_all_logits(hidden: mx.array, weight: mx.array) -> mx.array:
    logits = capped(hidden, weight)
    return preference(nn.losses.cross_entropy(logits, mx.array(TARGETS)))


@pytest.mark.parametrize("rows", [1, 8, 36, 37, 100])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_any_function_of_losses_has_the_gradient_that_it_has_of_all_logits(rows, trained, gpu):
    given = mx.array(HIDDEN), mx.array(WEIGHT)

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        chunked = Chunked(lambda h: capped(h, given[1]), rows)
        if trained:
            chunked = Chunked(capped, rows, [weight])
        return preference(per_token(chunked, hidden, [CROSS_ENTROPY], [mx.array(TARGETS)])[0])

    each = [0, 1] if trained else 0
    want, wanted = mx.value_and_grad(of_all_logits, argnums=each)(*given)
    if gpu:
        with as_on_gpu():
            got, gradients = mx.value_and_grad(ours, argnums=each)(*given)
    else:
        got, gradients = mx.value_and_grad(ours, argnums=each)(*given)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    pairs = zip(*((g if trained else [g]) for g in (gradients, wanted)), strict=True)
    assert all(distance(gradient, w) < 1e-5 for gradient, w in pairs)


def torch_values(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """By torch's own functions, of all logits."""
    logits = torch.tanh(hidden @ weight.T / 3) * 3
    theirs = torch.log_softmax(torch.tensor(OTHER_HIDDEN @ OTHER_WEIGHT.T), -1)
    ours, kl = torch.log_softmax(logits, -1), torch.nn.functional.kl_div

    def divergence(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return kl(of, to, log_target=True, reduction="none").sum(-1)

    def jsd(share: float) -> torch.Tensor:
        both = torch.logsumexp(
            torch.stack([theirs + np.log(share), ours + np.log(1 - share)]), dim=0
        )
        return share * divergence(both, theirs) + (1 - share) * divergence(both, ours)

    top, at = theirs.topk(TOP, dim=-1)
    rest = torch.log1p(-top.exp().sum(-1, keepdim=True))
    own = ours.gather(-1, at)
    own_rest = torch.log1p(-own.exp().sum(-1, keepdim=True))
    return {
        "cross-entropy": torch.nn.functional.cross_entropy(
            logits, torch.tensor(TARGETS).long(), reduction="none"
        ),
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "forward KL": divergence(ours, theirs),
        "reverse KL": divergence(theirs, ours),
        "JSD 0.5": jsd(0.5),
        "JSD 0.1": jsd(0.1),
        "the likeliest tokens": divergence(
            torch.cat([own, own_rest], -1), torch.cat([top, rest], -1)
        ),
    }


def other_logits(_targets: mx.array, hidden: mx.array, *_: mx.array) -> mx.array:
    return hidden @ mx.array(OTHER_WEIGHT).T


KINDS = {
    "cross-entropy": CROSS_ENTROPY,
    "entropy": ENTROPY,
    "forward KL": measures.divergence("forward_kl", other_logits),
    "reverse KL": measures.divergence("reverse_kl", other_logits),
    "JSD 0.5": measures.divergence("jsd", other_logits),
    "JSD 0.1": measures.divergence("jsd", other_logits, mixed=0.1),
    "the likeliest tokens": measures.divergence_to_likeliest(2, 3),
}


def given() -> list[mx.array]:
    logits = torch.log_softmax(torch.tensor(OTHER_HIDDEN @ OTHER_WEIGHT.T), -1)
    logs, at = logits.topk(TOP, dim=-1)
    arrays = TARGETS, OTHER_HIDDEN, at.numpy().astype(np.int32), logs.numpy()
    return [mx.array(a) for a in arrays]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_measure_and_its_gradient_are_torchs(kind, trained):
    weights = mx.array(array(ROWS))
    tensors = [torch.tensor(a, requires_grad=True) for a in (HIDDEN, WEIGHT)]
    want = torch_values(*tensors)[kind]
    (want * torch.tensor(np.array(weights))).sum().backward()

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        chunked = Chunked(lambda h: capped(h, mx.array(WEIGHT)), 8)
        if trained:
            chunked = Chunked(capped, 8, [weight])
        # Beside others, whose gradients are not its own.
        _, found = per_token(chunked, hidden, [CROSS_ENTROPY, KINDS[kind]], given())
        return (weights * found).sum()

    arguments = mx.array(HIDDEN), mx.array(WEIGHT)
    gradients = mx.grad(ours, argnums=[0, 1] if trained else 0)(*arguments)
    chunked = Chunked(lambda h: capped(h, mx.array(WEIGHT)), 8)
    for gradient in (False, True):
        [got] = per_token(chunked, arguments[0], [KINDS[kind]], given(), gradient=gradient)
        assert np.array(got) == pytest.approx(want.detach().numpy(), rel=1e-4, abs=1e-5)
    for got, tensor in zip(gradients if trained else [gradients], tensors, strict=False):
        assert distance(got, mx.array(tensor.grad.numpy())) < 1e-5


def test_what_has_no_gradient_is_measured_all_the_same():
    logits = capped(mx.array(HIDDEN), mx.array(WEIGHT))
    p = mx.softmax(logits, axis=-1)
    chunked = Chunked(lambda h: capped(h, mx.array(WEIGHT)), 8)
    wanted = (p * p).sum(axis=-1), logits.argmax(axis=-1) == mx.array(TARGETS)
    kinds = [CROSS_ENTROPY, SUM_OF_SQUARES, LIKELIEST]

    def loss(hidden: mx.array) -> tuple[mx.array, ...]:
        losses, *others = per_token(chunked, hidden, kinds, [mx.array(TARGETS)])
        return (losses.sum() + sum(other.sum() for other in others), *others)

    (_, *found), gradient = mx.value_and_grad(loss)(mx.array(HIDDEN))
    assert all(distance(g, w) < 1e-5 for g, w in zip(found, wanted, strict=True))
    alone = mx.grad(lambda h: per_token(chunked, h, [CROSS_ENTROPY], [mx.array(TARGETS)])[0].sum())
    assert distance(gradient, alone(mx.array(HIDDEN))) < 1e-6


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_than_a_chunk_of_logits_exists_at_once(trained):
    words, width, count, rows = 20_000, 16, 1024, 16
    weight, hidden = mx.random.normal((words, width)), mx.random.normal((count, width))
    targets = mx.zeros((count,), mx.int32)
    mx.eval(weight, hidden, targets)

    def loss(x: mx.array, w: mx.array) -> mx.array:
        chunked = Chunked(lambda part: part @ weight.T, rows)
        if trained:
            chunked = Chunked(lambda part, own: part @ own.T, rows, [w])
        return mx.sqrt(per_token(chunked, x, [CROSS_ENTROPY], [targets])[0]).sum()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.value_and_grad(loss, argnums=[0, 1] if trained else 0)(hidden, weight))
    assert mx.get_peak_memory() - before < 0.3 * (4 * words * count)
