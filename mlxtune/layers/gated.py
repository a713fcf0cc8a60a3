"""The gated activation of a block's MLP, `act(gate) * up`, kept small in training.

Differentiated step by step it keeps five arrays of the MLP's width for the backward pass.
Ours keeps its two inputs and computes the rest again (Dauphin et al. 2016,
arXiv:1612.08083; Shazeer 2020, arXiv:2002.05202).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import custom_gradient, scalar
from mlxtune.device import on_cpu
from mlxtune.layers.lora import LoRALinear
from mlxtune.layers.quantized import QuantizedLinear

Pair = tuple[mx.array, mx.array]
Gated = Callable[[mx.array, mx.array], mx.array]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`, any shape; differentiable in both."""
    return _swiglu(gate, up)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """`gelu(gate) * up` with GELU's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return _geglu(gate, up)


# Classes of MLPs to those derived from them that have our activation, or to None.
GatedClasses = dict[type, type | None]


def use_gated_activations(model: nn.Module, classes: GatedClasses | None = None) -> int:
    """Give the MLPs of a model these activations, where that is what they compute.

    An MLP is one with `gate_proj`, `up_proj` and `down_proj`; what it computes is seen on
    random rows. The instances get a class of their own, derived from theirs; mlx-lm's
    classes stay as they are.

    Args:
        model: a loaded model.
        classes: what was found for another model of this architecture; these are not tried
            again, and others are added.

    Returns:
        How many MLPs took one.
    """
    derived: GatedClasses = {} if classes is None else classes
    count = 0
    for module in model.modules():
        if not all(isinstance(module.get(name), _ONE_FOR_ALL) for name in _PROJECTIONS):
            continue
        original = type(module)
        if original not in derived:
            activation = _activation_of(module)
            derived[original] = activation and _derived(original, activation)
        if (chosen := derived[original]) is not None:
            module.__class__ = chosen
            count += 1
    return count


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Layers that every token meets, which experts are not.
_ONE_FOR_ALL = (nn.Linear, QuantizedLinear, LoRALinear)


def _activation_of(mlp: nn.Module) -> Gated | None:
    """The activation with which an MLP's output is ours; None if there is none."""
    # Rows as large as a norm's output.
    width = _input_width(mlp.gate_proj)
    rows = mx.random.normal((1, 4, width), key=mx.random.key(0))
    try:
        want = mlp(rows)
    except Exception:  # another signature
        return None
    if not isinstance(want, mx.array):
        return None
    for activation in (swiglu, geglu):
        got = mlp.down_proj(activation(mlp.gate_proj(rows), mlp.up_proj(rows)))
        error = mx.abs(got - want).max() / mx.abs(want).max()
        # The two differ by 1e-2 and more; sixteen-bit types round at 1e-3.
        if scalar(error) <= 4e-3:
            return activation
    return None


def _input_width(projection: nn.Module) -> int:
    projection = projection.get("linear", projection)  # what an adapter is on
    if isinstance(projection, nn.Linear):
        return int(projection.weight.shape[1])
    shape: tuple[int, int] = projection.shape
    return shape[1]


def _derived(original: type, activation: Gated) -> type:
    def call(self: Any, x: mx.array) -> mx.array:
        hidden: mx.array = self.down_proj(activation(self.gate_proj(x), self.up_proj(x)))
        return hidden

    return type(f"Gated{original.__name__}", (original,), {"__call__": call})


def _sigmoid(x: mx.array) -> mx.array:
    return mx.reciprocal(1 + _power(x)) if _in_powers(x) else mx.sigmoid(x)


def _silu(x: mx.array) -> mx.array:
    return x / (1 + _power(x)) if _in_powers(x) else x * mx.sigmoid(x)


def _in_powers(x: mx.array) -> bool:
    return on_cpu() and x.dtype == mx.float32


def _power(x: mx.array) -> mx.array:
    """e to the -x without a pass for the sign."""
    return mx.power(1 / math.e, x)


def _gelu_terms(gate: mx.array) -> Pair:
    """GELU's tanh form is x * sigmoid(2 u): that sigmoid, and d(2 u) / dx."""
    slope = 2 * math.sqrt(2 / math.pi)
    square = gate * gate
    share = _sigmoid(slope * gate * (1 + 0.044715 * square))
    return share, slope * (1 + 3 * 0.044715 * square)


def _make(forward: Gated, backward: Callable[[mx.array, mx.array, mx.array], Pair]) -> Gated:
    # One kernel for each on a GPU; on a CPU compiling takes a C++ compiler and gains nothing.
    fused = mx.compile(forward, shapeless=True), mx.compile(backward, shapeless=True)

    def vjp(primals: Pair, cotangent: mx.array, _output: mx.array) -> Pair:
        return (backward if on_cpu() else fused[1])(*primals, cotangent)

    @custom_gradient(vjp)
    def activation(gate: mx.array, up: mx.array) -> mx.array:
        return forward(gate, up) if on_cpu() else fused[0](gate, up)

    result: Gated = activation
    return result


def _swiglu_backward(gate: mx.array, up: mx.array, cotangent: mx.array) -> Pair:
    share = _sigmoid(gate)
    silu = gate * share
    return cotangent * up * (share + silu * (1 - share)), cotangent * silu


def _geglu_backward(gate: mx.array, up: mx.array, cotangent: mx.array) -> Pair:
    share, slope = _gelu_terms(gate)
    gelu = gate * share
    return cotangent * up * (share + gelu * (1 - share) * slope), cotangent * gelu


_swiglu = _make(lambda gate, up: _silu(gate) * up, _swiglu_backward)
_geglu = _make(lambda gate, up: gate * _gelu_terms(gate)[0] * up, _geglu_backward)
