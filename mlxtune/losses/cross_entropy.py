"""Next-token cross-entropy, weighted by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlxtune.arrays import custom_gradient, exp
from mlxtune.device import on_cpu
from mlxtune.losses.measures import CROSS_ENTROPY
from mlxtune.losses.per_token import Chunked, added, per_token


def weighted_cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """`sum_i w_i * (logsumexp(logits_i) - logits_i[target_i])`.

    A sum, not a mean: the caller divides by the weight of everything that makes up one
    step, so that a token counts the same in whichever batch it lies.

    Args:
        logits: (m, vocabulary) of any float type; reduced in float32.
        targets: int (m,).
        weights: float32 (m,).

    Returns:
        A float32 scalar.
    """
    return (weights * token_losses(logits, targets)).sum()


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """`logsumexp(logits_i) - logits_i[target_i]`: float32 (m,), of (m, vocabulary) and (m,).

    On a GPU by MLX's kernel, which reads the logits once in their own type and adds up in
    float32; on a CPU it would add up in the logits' type.
    """
    if not on_cpu():
        return mx.fast.cross_entropy(logits, targets)
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - picked


def chunked_cross_entropy(
    head: Callable[..., mx.array],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    rows: int,
    trained: Sequence[mx.array] = (),
    gradient: bool = True,
) -> mx.array:
    """`weighted_cross_entropy(head(hidden, *trained), targets, weights)`, no logits kept.

    All that the backward pass needs is computed with the loss, `rows` rows at a time: the
    gradient for the hidden states and, added up, those for what is trained of the head. So
    logits of one chunk exist at once. The idea is that of Liger Kernel's fused linear
    cross-entropy (Hsu et al. 2024, arXiv:2410.10989).

    Args:
        head: (n, width), and what is trained of it, to (n, vocabulary), row by row. Without
            `trained` it is called with the hidden states alone.
        hidden: (m, width) of any float type.
        targets: int (m,).
        weights: float32 (m,).
        rows: in a chunk.
        trained: arrays of the head to differentiate for; its others are taken as constants.
        gradient: whether the loss will be differentiated. Without it, nothing but the
            loss is computed.

    Returns:
        A float32 scalar.
    """
    if not gradient:
        chunked = Chunked(head, rows, trained)
        [losses] = per_token(chunked, hidden, [CROSS_ENTROPY], [targets], gradient=False)
        return (weights * losses).sum()
    parts = [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]

    def backward(
        _primals: Any, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> Any:
        gradients = [(cotangents[0] * output).astype(output.dtype) for output in outputs[1:]]
        return gradients if trained else gradients[0]

    @custom_gradient(backward)
    def total(hidden: mx.array, *trained: mx.array) -> tuple[mx.array, ...]:
        losses: list[mx.array] = []
        for_hidden: list[mx.array] = []
        for_trained: list[mx.array] = []
        for part in parts:
            chunk = hidden[part]
            if losses:
                # Not before the last chunk is done with its logits.
                [chunk] = mx.depends([chunk], [losses[-1], for_hidden[-1], *for_trained])
            given = chunk, targets[part], weights[part]
            if trained:
                loss, for_chunk, *own = _with_all_gradients(head, trained, *given)
                for_trained = added(for_trained, own)
            else:
                loss, for_chunk = _with_gradient(head, *given)
            losses.append(loss)
            for_hidden.append(for_chunk)
        return mx.stack(losses).sum(), mx.concatenate(for_hidden), *for_trained

    loss: mx.array = total(hidden, *trained)[0]
    return loss


def _with_all_gradients(
    head: Callable[..., mx.array],
    trained: Sequence[mx.array],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, ...]:
    """Loss of some rows, and its gradients for their hidden states and what is trained.

    The head is called once, so that what it draws (dropout) is the same for all of them.
    """

    def loss(hidden: mx.array, *trained: mx.array) -> mx.array:
        return weighted_cross_entropy(head(hidden, *trained), targets, weights)

    each = list(range(1 + len(trained)))
    value, gradients = mx.value_and_grad(loss, argnums=each)(hidden, *trained)
    return value, *gradients


def _with_gradient(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Loss of some rows, and its gradient for their hidden states."""
    if not on_cpu():
        # The kernel's gradient is written over the logits; ours would take three arrays more.
        loss, gradient = mx.value_and_grad(
            lambda hidden: weighted_cross_entropy(head(hidden), targets, weights)
        )(hidden)
        return loss, gradient
    logits = head(hidden)
    full = logits.astype(mx.float32)
    peak = full.max(axis=-1, keepdims=True)
    powers = exp(full - peak)
    sums = powers.sum(axis=-1, keepdims=True)
    target = targets[:, None]
    picked = mx.take_along_axis(full, target, axis=-1)
    loss = (weights * (mx.log(sums) + peak - picked)[:, 0]).sum()
    # d loss / d logits = w (softmax - one-hot)
    scaled = powers * (weights[:, None] / sums)
    at_target = mx.take_along_axis(scaled, target, axis=-1) - weights[:, None]
    scaled = mx.put_along_axis(scaled, target, at_target, axis=-1)
    _, [for_hidden] = mx.vjp(head, [hidden], [scaled.astype(logits.dtype)])
    return loss, for_hidden
