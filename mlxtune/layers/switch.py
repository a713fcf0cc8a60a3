"""Experts: projections of which every token meets a few, packed, and with LoRA.

mlx-lm keeps the experts of a block in one tensor and calls them as
`layer(x, indices, sorted_indices)`: `x` (…, 1, in), `indices` the expert of each matrix
of `x`, which may have more of them (x (n, 1, 1, in), indices (n, k)) or be in their order
(x (n * k, 1, in), indices (n * k,)). The output is (*indices.shape, 1, out).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchLinear

from mlxtune.arrays import custom_gradient, intercepted
from mlxtune.layers.adapter import Adapter
from mlxtune.layers.lora import Dropout
from mlxtune.layers.quantized import PackedLayer, frozen_product


class QuantizedSwitchLinear(PackedLayer):
    """Frozen packed experts, (experts, out, in) unpacked; arrays are named as mlx-lm's."""

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.shape[0]

    @property
    def output_dims(self) -> int:
        """Output features of each."""
        return self.shape[1]

    @property
    def input_dims(self) -> int:
        """Input features of each."""
        return self.shape[2]

    def product(
        self, x: mx.array, indices: mx.array, *, ordered: bool, forward: bool, expand: bool
    ) -> mx.array:
        """Each matrix of `x` times its expert, transposed for `forward`, in `x`'s type."""
        if not expand:
            return self.packing.gathered_product(
                x, self.arrays, indices, transpose=forward, ordered=ordered
            ).astype(x.dtype)
        full = self.packing.expand(self._for(x), x.dtype)
        full = full.swapaxes(-1, -2) if forward else full
        return mx.gather_mm(x, full, rhs_indices=indices, sorted_indices=ordered)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        def multiply(rows: mx.array, forward: bool) -> mx.array:
            # Expanding all experts has to pay for the rows that an expert meets.
            each = indices.size * rows.shape[-2] // self.num_experts
            expand = self.expands(each, forward=forward)
            y = self.product(rows, indices, ordered=sorted_indices, forward=forward, expand=expand)
            return y if forward else _sum_to(y, x.shape)

        y = frozen_product(x, multiply) if self.training else multiply(x, True)
        if "bias" in self:
            y = y + self.bias[indices][..., None, :]
        return y


def _sum_to(gradient: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Sum over the axes along which an array of `shape` was repeated."""
    axes = [i for i, (n, m) in enumerate(zip(gradient.shape, shape, strict=True)) if n != m]
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


class LoRASwitchLinear(Adapter):
    """Frozen experts plus a trained low-rank update of each.

        y = W_e x + scale * B_e A_e dropout(x)

    Parameters are stored as mlx-lm stores them: `lora_a` (experts, rank, in), `lora_b`
    (experts, out, rank), in float32; for types and start see `LoRALinear`.

    Args:
        base: the experts to adapt; they are frozen.
        rank: width of each update.
        scale: factor on the updates.
        dropout: probability of dropping an input feature of the update, in training.
    """

    kind = "lora"

    def __init__(
        self,
        base: SwitchLinear | QuantizedSwitchLinear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        experts, out_dims, in_dims = base.num_experts, base.output_dims, base.input_dims
        base.freeze()
        self.linear = base
        self.scale = scale
        self.dropout = Dropout(dropout)
        bound = 1 / math.sqrt(in_dims)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(experts, rank, in_dims))
        self.lora_b = mx.zeros((experts, out_dims, rank))

    @classmethod
    def from_base(
        cls,
        base: SwitchLinear | QuantizedSwitchLinear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> LoRASwitchLinear:
        """Wrap `base`."""
        return cls(base, rank=rank, scale=scale, dropout=dropout)

    @property
    def rank(self) -> int:
        return int(self.lora_a.shape[1])

    def trained(self) -> tuple[str, ...]:
        return "lora_a", "lora_b"

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.lora_a.shape[0]

    def _extra_repr(self) -> str:
        experts, rank, in_dims = self.lora_a.shape
        out_dims = self.lora_b.shape[1]
        return f"{in_dims} -> {out_dims}, experts={experts}, rank={rank}, scale={self.scale:g}"

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.off:
            plain: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
            return plain
        x, a, b = self.in_turn(x)
        y: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        a, b = (factor.astype(x.dtype).swapaxes(-1, -2) for factor in (a, b))
        narrow = self.scale * _gathered(self.dropout(x), a, indices, ordered=sorted_indices)
        return y + _gathered(narrow, b, indices, ordered=sorted_indices).astype(y.dtype)

    def fused_weight(self) -> mx.array:
        """W + scale * B A of each expert: (experts, out, in) in float32."""
        base = self.linear
        weight = base.dequantized() if isinstance(base, PackedLayer) else base.weight
        return weight.astype(mx.float32) + self.scale * (self.lora_b @ self.lora_a)

    def fuse(self) -> SwitchLinear:
        """Plain experts that compute what this layer computes, in float32; never packed."""
        return plain_experts(self.fused_weight(), self.linear.get("bias"))


def _gathered(z: mx.array, each: mx.array, indices: mx.array, *, ordered: bool) -> mx.array:
    """`mx.gather_mm`, whose gradient for the matrices MLX cannot export.

    Where gradients are looked into, one product of all rows stands for it: of as many
    operations, and with a result of the same size.
    """

    def product(z: mx.array, each: mx.array) -> mx.array:
        return mx.gather_mm(z, each, rhs_indices=indices, sorted_indices=ordered)

    def backward(primals: Any, cotangent: mx.array, _product: mx.array) -> Any:
        z, each = primals
        if not intercepted():
            return mx.vjp(product, [z, each], [cotangent])[1]
        [below] = mx.vjp(lambda z: product(z, each), [z], [cotangent])[1]
        rows = mx.broadcast_to(z, (*cotangent.shape[:-1], z.shape[-1])).reshape(-1, z.shape[-1])
        together = rows.T @ cotangent.reshape(-1, cotangent.shape[-1])
        return below, together + mx.zeros(each.shape, each.dtype)

    result: mx.array = custom_gradient(backward)(product)(z, each)
    return result


def plain_experts(weight: mx.array, bias: mx.array | None) -> SwitchLinear:
    """mlx-lm's layer with this weight of (experts, out, in)."""
    layer = SwitchLinear(1, 1, 1, bias=bias is not None)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer
