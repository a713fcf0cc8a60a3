"""Next-token cross-entropy, weighted by token."""

from __future__ import annotations

import mlx.core as mx


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
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (weights * (mx.logsumexp(logits, axis=-1) - picked)).sum()
