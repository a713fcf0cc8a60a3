"""LoRA (Hu et al. 2021, arXiv:2106.09685) over a plain or a quantized projection.

    y = W x + scale * B A dropout(x)

with scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732). A starts uniform and B at zero, so a new layer computes exactly what
its base computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlxtune.layers.adapter import Adapter
from mlxtune.layers.quantized import QuantizedLinear


class Dropout(nn.Module):
    """Zero each element with probability `p` in training, and scale the rest to match.

    Unlike MLX's own it can be given the key to draw with, so that a block whose
    activations are recomputed drops the same elements again.
    """

    def __init__(self, p: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.p = p
        self._key: mx.array | None = None

    @property
    def active(self) -> bool:
        """Whether a call draws random numbers."""
        return self.p > 0 and self.training

    def draw_with(self, key: mx.array | None) -> None:
        """Use `key` (uint32 (2,)) from now on; None for MLX's random state."""
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        if not self.active:
            return x
        kept = mx.random.bernoulli(1 - self.p, x.shape, key=self._key)
        return mx.where(kept, x / (1 - self.p), mx.zeros_like(x))


def fixed_dropout(module: nn.Module, count: int) -> Callable[[int], AbstractContextManager[None]]:
    """Make what a module drops depend on a number, so that it can be computed a second time.

    Args:
        module: its dropouts that are active draw keys now.
        count: of the numbers, from 0.

    Returns:
        A context in which the module drops what belongs to a number.
    """
    dropouts = [m for m in module.modules() if isinstance(m, Dropout) and m.active]
    keys = [mx.random.randint(0, 2**31 - 1, (count, 2), dtype=mx.uint32) for _ in dropouts]

    @contextmanager
    def drawing(number: int) -> Iterator[None]:
        for dropout, key in zip(dropouts, keys, strict=True):
            dropout.draw_with(mx.stop_gradient(key[number]))
        try:
            yield
        finally:
            for dropout in dropouts:
                dropout.draw_with(None)

    return drawing


class LoRALinear(Adapter):
    """A frozen projection plus a trained low-rank update.

    Parameters are stored as mlx-lm stores them: `lora_a` (in, rank), `lora_b`
    (rank, out). Both are kept in float32 whatever the base is, since steps of 1e-4
    vanish in bfloat16, and multiply in the type of their input. The output has the
    base's type, so that one adapter does not drag the rest of the network into float32.

    Args:
        base: the projection to adapt; it is frozen.
        rank: width of the update.
        scale: factor on the update.
        dropout: probability of dropping an input feature of the update, in training.
    """

    kind = "lora"

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        out_dims, in_dims = base.shape if isinstance(base, QuantizedLinear) else base.weight.shape
        base.freeze()
        self.linear = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(in_dims, rank))
        self.lora_b = mx.zeros((rank, out_dims))

    @classmethod
    def from_base(
        cls, base: nn.Linear | QuantizedLinear, *, rank: int, scale: float, dropout: float = 0.0
    ) -> Self:
        """Wrap `base`."""
        return cls(base, rank=rank, scale=scale, dropout=dropout)

    @property
    def rank(self) -> int:
        """Width of the update."""
        return int(self.lora_a.shape[1])

    def trained(self) -> tuple[str, ...]:
        """`lora_a` and `lora_b`."""
        return ("lora_a", "lora_b")

    def _extra_repr(self) -> str:
        in_dims, rank = self.lora_a.shape
        return f"{in_dims} -> {self.lora_b.shape[1]}, rank={rank}, scale={self.scale:g}"

    def __call__(self, x: mx.array) -> mx.array:
        if self.off:
            plain: mx.array = self.linear(x)
            return plain
        x, a, b = self.in_turn(x)
        y: mx.array = self.linear(x)
        narrow = self.scale * (self.dropout(x) @ a.astype(x.dtype))
        # One product that adds into y: no pass over an update of y's size. As its `alpha` the
        # scale would take two in the backward pass.
        return mx.addmm(y, narrow.astype(y.dtype), b.astype(y.dtype))

    def fused_weight(self) -> mx.array:
        """W + scale * (A B)^T, (out, in) in float32."""
        weight = self._base_weight().astype(mx.float32)
        return weight + self.scale * (self.lora_a @ self.lora_b).T

    def fuse(self) -> nn.Linear:
        """A plain projection that computes what this layer computes, in float32.

        Never requantized: rounding back to few bits would round most of a small update
        away.
        """
        weight = self.fused_weight()
        has_bias = "bias" in self.linear
        fused = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias)
        fused.weight = weight
        if has_bias:
            fused.bias = self.linear.bias
        return fused

    def _base_weight(self) -> mx.array:
        """The base's (out, in) weight, expanded if it is packed."""
        base = self.linear
        return base.dequantized() if isinstance(base, QuantizedLinear) else base.weight
