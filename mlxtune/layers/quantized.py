"""Quantized projections whose frozen weights stay packed, in training too.

MLX's own `QuantizedLinear` differentiates through `mx.quantized_matmul`. Ours knows that
the packed weight is frozen: its backward pass is one product for the input, and where
the weight is expanded to multiply faster, the expanded copy lives for that product only
instead of being kept from the forward to the backward pass of every layer.

Parameter names and packing are MLX's (`weight` uint32, `scales`, `biases`), so any
MLX-quantized checkpoint loads.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

# On a CPU `mx.quantized_matmul` runs one row at a time at a few GFLOP/s, so that
# expanding the weight first wins from a handful of rows on (measured: 8 rows of a
# 1536 x 576 weight, 4 bits: 4.1 ms packed, 2.3 ms expanded). A GPU multiplies packed
# weights faster at every row count that a batch of examples has.
CPU_ROWS_TO_EXPAND = 6


def expand(
    weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """The full weight, `scales * codes + biases`: (out, in) in the type of the scales.

    The same numbers as `mx.dequantize`, bit for bit. On a CPU, codes of 4 and 8 bits are
    taken apart as bytes instead of words, which is twice as fast there.
    """
    if mx.default_device() != mx.cpu or bits not in (4, 8):
        return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
    codes = weight.view(mx.uint8)
    if bits == 4:
        low, high = (codes & 15).astype(scales.dtype), (codes >> 4).astype(scales.dtype)
        codes = mx.stack([low, high], axis=-1)
    groups = codes.astype(scales.dtype).reshape(*scales.shape, group_size)
    full = groups * scales[..., None] + biases[..., None]
    return full.reshape(*weight.shape[:-1], -1)


def expands(rows: int) -> bool:
    """Whether `rows` input rows are multiplied faster by an expanded weight here."""
    return mx.default_device() == mx.cpu and rows >= CPU_ROWS_TO_EXPAND


def frozen_quantized_matmul(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    """`x @ dequantize(weight).T`, differentiable in `x` only.

    Args:
        x: (..., in) of any float type.
        weight: (out, in * bits / 32) uint32, packed as `mx.quantize` packs.
        scales, biases: (out, in / group_size).

    Returns:
        (..., out) in the type of `x`.
    """

    def multiply(rows: mx.array, transpose: bool) -> mx.array:
        if expands(rows.size // rows.shape[-1]):
            full = expand(weight, scales, biases, group_size=group_size, bits=bits)
            full = full.astype(rows.dtype)
            return rows @ (full.T if transpose else full)
        product = mx.quantized_matmul(
            rows,
            weight,
            scales,
            biases,
            transpose=transpose,
            group_size=group_size,
            bits=bits,
        )
        return product.astype(rows.dtype)

    @mx.custom_function
    def project(rows: mx.array) -> mx.array:
        return multiply(rows, True)

    @project.vjp
    def project_vjp(_rows: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        return multiply(cotangent, False)

    product: mx.array = project(x)  # type: ignore[assignment]  # MLX types it as object
    return product


class _ForGood(set[str]):
    """Names of frozen parameters that `unfreeze`, even of a whole model, leaves frozen."""

    def clear(self) -> None:
        pass

    def difference_update(self, *_others: object) -> None:
        pass


class QuantizedLinear(nn.Module):
    """A frozen affine-quantized projection, `y = x @ dequantize(W).T + bias`.

    Args:
        weight: (out, in * bits / 32) uint32.
        scales, biases: (out, in / group_size), the affine terms of each group.
        group_size: 32, 64 or 128 input features.
        bits: 2, 3, 4, 5, 6 or 8.
        bias: (out,) or None.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array,
        *,
        group_size: int,
        bits: int,
        bias: mx.array | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.group_size = group_size
        self.bits = bits
        # mlx-lm asks packed layers for their mode when it counts their parameters.
        self.mode = "affine"
        self.weight = weight
        self.scales = scales
        self.biases = biases
        if bias is not None:
            self.bias = bias
        self.freeze()
        self._no_grad = _ForGood(self._no_grad)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, group_size: int = 64, bits: int = 4
    ) -> QuantizedLinear:
        """Quantize a plain projection."""
        weight, scales, biases = mx.quantize(linear.weight, group_size=group_size, bits=bits)
        return cls(
            weight, scales, biases, group_size=group_size, bits=bits, bias=linear.get("bias")
        )

    @classmethod
    def from_mlx(cls, layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> QuantizedLinear:
        """Take over the arrays of MLX's own layer, uncopied.

        Raises:
            ValueError: the layer is packed in another mode than affine.
        """
        if getattr(layer, "mode", "affine") != "affine":
            raise ValueError(f"a layer packed as {layer.mode} is not affine")
        assert layer.biases is not None  # affine layers have them
        return cls(
            layer.weight,
            layer.scales,
            layer.biases,
            group_size=layer.group_size,
            bits=layer.bits,
            bias=layer.get("bias"),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), as the unpacked weight would have it."""
        return self.weight.shape[0], self.weight.shape[1] * 32 // self.bits

    def _extra_repr(self) -> str:
        out_dims, in_dims = self.shape
        return f"{in_dims} -> {out_dims}, bits={self.bits}, group_size={self.group_size}"

    def dequantized(self) -> mx.array:
        """The (out, in) weight, in the type of the scales."""
        return expand(
            self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )

    def __call__(self, x: mx.array) -> mx.array:
        y = frozen_quantized_matmul(
            x, self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )
        if "bias" in self:
            y = y + self.bias
        return y


class QuantizedEmbedding(QuantizedLinear):
    """A packed embedding table that may also serve as the output head (tied weights)."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Look up ids of any shape: (...) -> (..., dims), in the type of the scales."""
        return expand(
            self.weight[ids],
            self.scales[ids],
            self.biases[ids],
            group_size=self.group_size,
            bits=self.bits,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        """Project (..., dims) onto the vocabulary: (..., vocabulary)."""
        return super().__call__(x)
