"""Norms, rotations, losses and causal attention as on a GPU, in graphs traced on a CPU.

`mx.fast.rms_norm`, `layer_norm`, `rope` and `cross_entropy` are one kernel on a GPU, forward and
backward; on a CPU MLX computes them by some ten operations, which a graph traced there shows.
And a CPU keeps all scores of attention, where Metal keeps none under a causal mask. Graphs that
are traced for a GPU have stand-ins instead: they read, keep and write arrays of the same shapes,
and their values do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlxtune.arrays import custom_gradient
from mlxtune.device import on_cpu
from mlxtune.models.fused_attention import WIDTHS

_ATTENTION = "scaled_dot_product_attention"


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Use the stand-ins while a graph is traced for a GPU on a CPU; nothing changes elsewhere."""
    if on_cpu() or mx.default_device() != mx.cpu:
        yield
        return
    names: dict[str, Any] = {
        "rms_norm": _norm,
        "layer_norm": _norm,
        "rope": _rope,
        "cross_entropy": _cross_entropy,
    }
    before = {name: getattr(mx.fast, name) for name in (*names, _ATTENTION)}
    names[_ATTENTION] = partial(_attention, before[_ATTENTION])
    try:
        for name, stand_in in names.items():
            setattr(mx.fast, name, stand_in)
        yield
    finally:
        for name, own in before.items():
            setattr(mx.fast, name, own)


def _norm(x: mx.array, weight: mx.array | None, *_args: Any, **_options: Any) -> mx.array:
    """As `mx.fast.rms_norm` and `layer_norm`; their biases are left out."""
    normed: mx.array = _normed(x) if weight is None else _scaled(x, weight)
    return normed


def _rope(x: mx.array, *_args: Any, **_options: Any) -> mx.array:
    """As `mx.fast.rope`: in the backward pass the gradient is turned back."""
    turned: mx.array = _turned(x)
    return turned


def _cross_entropy(logits: mx.array, _targets: mx.array, **_options: Any) -> mx.array:
    """As `mx.fast.cross_entropy`."""
    losses: mx.array = _losses(logits)
    return losses


def _attention(
    own: Any, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **more: Any
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention` where Metal keeps no scores, else its own graph."""
    if isinstance(mask, mx.array) or more.get("sinks") is not None or q.shape[-1] not in WIDTHS:
        result: mx.array = own(q, k, v, scale=scale, mask=mask, **more)
        return result
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    mixed: mx.array = _attended(grouped, k, v)[0]
    return mixed.reshape(*q.shape[:-1], v.shape[-1])


@custom_gradient(
    lambda logits, cotangent, _output: cotangent.astype(logits.dtype)[:, None] * logits
)
def _losses(logits: mx.array) -> mx.array:
    return logits.max(axis=-1).astype(mx.float32)


def _attended_backward(primals: Any, cotangents: Any, _outputs: Any) -> Any:
    q, k, v = primals
    above = cotangents[0]
    scores = q @ k.swapaxes(-1, -2)
    both = scores * (above @ v.swapaxes(-1, -2))
    return both @ k, both.swapaxes(-1, -2) @ q, scores.swapaxes(-1, -2) @ above


@custom_gradient(_attended_backward)
def _attended(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """The mixed values, and the logarithm that is kept for each query."""
    scores = q @ k.swapaxes(-1, -2)
    return scores @ v, scores.astype(mx.float32).max(axis=-1)


@custom_gradient(lambda x, cotangent, _output: cotangent * x)
def _normed(x: mx.array) -> mx.array:
    return mx.square(x)


def _scaled_backward(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
    x, weight = primals
    # The kernel gives the weight's gradient for each row, which are then added up.
    each = cotangent * x
    return each, each.reshape(-1, weight.size).sum(axis=0).astype(weight.dtype)


@custom_gradient(_scaled_backward)
def _scaled(x: mx.array, weight: mx.array) -> mx.array:
    return (x * weight).astype(x.dtype)


@custom_gradient(lambda _x, cotangent, _output: -cotangent)
def _turned(x: mx.array) -> mx.array:
    return -x
