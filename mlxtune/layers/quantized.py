"""Quantized projections whose frozen weights stay packed, in training too.

MLX's own `QuantizedLinear` differentiates through `mx.quantized_matmul`. Ours knows that
the packed weight is frozen: its backward pass is one product for the input, and where
the weight is expanded to multiply faster, the expanded copy lives for that product only
instead of being kept from the forward to the backward pass of every layer. Which of the
two each pass does is its `Route`.

In MLX's own modes parameter names and packing are MLX's (`weight` uint32, `scales`,
`biases`), so any MLX-quantized checkpoint loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import custom_gradient
from mlxtune.device import on_cpu
from mlxtune.layers.nf4 import NormalFloat4
from mlxtune.layers.packing import MICROSCALING, Arrays, Packing

# A weight that is larger than this when it is expanded is multiplied in slices of output
# rows, so that an output head never exists whole. Slices of this size multiply as fast
# (measured on a CPU: the loss over a head of 262144 x 640 peaks at 380 MiB, not at 3.1 GiB).
BYTES_AT_ONCE = 16 << 20
# A GPU wants more to do at once; of that size no figure has been measured yet.
_GPU_FACTOR = 4


@dataclass(frozen=True)
class Route:
    """From how many rows on a product expands the weight instead of taking it packed.

    Expanding costs the same for one row as for a thousand; each row after that costs less
    than a row of the packed product, or expanding never pays. So one number says it all.

    Args:
        forward: for `x @ W.T`; None for never.
        backward: for `gradient @ W`; None for never.
    """

    forward: int | None
    backward: int | None

    @classmethod
    def prior(cls) -> Route:
        """What is taken where nobody has measured.

        On a CPU MLX's packed product runs one row at a time at a few GFLOP/s (measured: 8
        rows of 1536 x 576, 4 bits: 4.1 ms packed, 2.3 ms expanded). A GPU has kernels for it.
        """
        return cls(6, 6) if on_cpu() else cls(None, None)

    def expands(self, rows: int, *, forward: bool) -> bool:
        """Whether a product of that many rows expands the weight."""
        least = self.forward if forward else self.backward
        return least is not None and rows >= least


def packing_named(
    quantize: int | str, *, double_quantization: bool = True, group_size: int = 64
) -> Packing:
    """The packing that a recipe's `quantize` means: bits, or the name of a mode.

    Args:
        quantize: 2, 3, 4, 5, 6 or 8 for affine; `mxfp4`, `mxfp8`, `nvfp4` or `nf4`.
        double_quantization: of NF4.
        group_size: of affine; the others have one of their own.
    """
    if isinstance(quantize, int):
        return Packing("affine", quantize, group_size)
    if quantize == "nf4":
        return NormalFloat4(double_quantization=double_quantization)
    return Packing(quantize, *MICROSCALING[quantize])


def expanded_product(x: mx.array, packing: Packing, arrays: Arrays, *, transpose: bool) -> mx.array:
    """`x @ weight.T`, or `x @ weight`, by the expanded weight of (out, in), in `x`'s type."""
    outputs, words = arrays["weight"].shape
    bytes_to_row = words * 32 // packing.bits * x.dtype.size
    step = max(1, (1 if on_cpu() else _GPU_FACTOR) * BYTES_AT_ONCE // bytes_to_row)
    if step >= outputs:
        full = packing.expand(arrays, x.dtype)
        return x @ (full.T if transpose else full)
    arrays = packing.rows(arrays, slice(None))  # what all slices need, once
    done: list[mx.array] = []
    for start in range(0, outputs, step):
        part = packing.rows(arrays, slice(start, start + step))
        if done:  # not before the last slice has been multiplied
            part = dict(zip(part, mx.depends(list(part.values()), [done[-1]]), strict=True))
        full = packing.expand(part, x.dtype)
        if transpose:
            done.append(x @ full.T)
        else:
            some = x[..., start : start + step]
            done = [mx.addmm(done[0], some, full) if done else some @ full]
    return mx.concatenate(done, axis=-1) if transpose else done[0]


def frozen_product(x: mx.array, multiply: Callable[[mx.array, bool], mx.array]) -> mx.array:
    """A product with a frozen weight, differentiable in `x` only.

    Args:
        x: the input.
        multiply: takes the input and true for the forward product; the gradient of its
            output and false for the backward one.
    """

    def backward(_rows: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        return multiply(cotangent, False)

    @custom_gradient(backward)
    def project(rows: mx.array) -> mx.array:
        return multiply(rows, True)

    product: mx.array = project(x)
    return product


class _ForGood(set[str]):
    """Names of frozen parameters that `unfreeze`, even of a whole model, leaves frozen."""

    def clear(self) -> None:
        pass

    def difference_update(self, *_others: object) -> None:
        pass


class PackedLayer(nn.Module):
    """Base of layers with a frozen packed weight.

    Args:
        packing: how the weight is packed.
        arrays: the packed weight, (…, out, in) unpacked.
        bias: (…, out) or None.
        dtype: what the weight expands to where nothing else says so; by default the type
            of its scales, or bfloat16 if they are no floats, as in MLX.
    """

    def __init__(
        self,
        packing: Packing,
        arrays: Arrays,
        *,
        bias: mx.array | None = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.packing = packing
        # mlx-lm asks packed layers for these when it counts their parameters.
        self.mode, self.bits, self.group_size = packing.mode, packing.bits, packing.group_size
        self.route: Route | None = None
        self._dtype = dtype
        for name, array in arrays.items():
            self[name] = array
        if bias is not None:
            self.bias = bias
        self.freeze()
        self._no_grad = _ForGood(self._no_grad)

    @classmethod
    def from_weight(cls, layer: nn.Module, packing: Packing) -> Self:
        """Pack the weight of a plain layer."""
        dtype = layer.weight.dtype
        return cls(packing, packing.pack(layer.weight), bias=layer.get("bias"), dtype=dtype)

    @classmethod
    def from_mlx(cls, layer: nn.Module, dtype: mx.Dtype | None = None) -> Self:
        """Take over the arrays of MLX's or mlx-lm's own layer, uncopied."""
        # mlx-lm's experts may leave bits and group size to what MLX has for the mode.
        bits, group_size = MICROSCALING.get(layer.mode, (4, 64))
        packing = Packing(layer.mode, layer.bits or bits, layer.group_size or group_size)
        arrays = {name: layer[name] for name in packing.names if layer.get(name) is not None}
        return cls(packing, arrays, bias=layer.get("bias"), dtype=dtype)

    @property
    def arrays(self) -> Arrays:
        """The packed weight."""
        return {name: self[name] for name in self.packing.names if name in self}

    @property
    def shape(self) -> tuple[int, ...]:
        """(…, out, in), as the unpacked weight would have it."""
        *outer, words = self.weight.shape
        return *outer, words * 32 // self.bits

    @property
    def dtype(self) -> mx.Dtype:
        """What the weight expands to where nothing else says so."""
        if self.mode == "affine":
            scales: mx.array = self.scales
            return scales.dtype
        return self._dtype or mx.bfloat16

    def _for(self, x: mx.array) -> Arrays:
        """The packed weight for a product with `x` alone.

        Compiled, MLX would find that two products expand the same weight, do it once and keep
        the result from the first to the last.
        """
        arrays = self.arrays
        return dict(zip(arrays, mx.depends(list(arrays.values()), [x]), strict=True))

    def dequantized(self) -> mx.array:
        """The (…, out, in) weight."""
        return self.packing.expand(self.arrays, self.dtype)

    def expands(self, rows: int, *, forward: bool) -> bool:
        """Whether a product with `rows` rows expands the weight."""
        if not self.packing.has_product:
            return True
        return (self.route or Route.prior()).expands(rows, forward=forward)

    def _extra_repr(self) -> str:
        *outer, out_dims, in_dims = self.shape
        experts = f", experts={outer[0]}" if outer else ""
        return f"{in_dims} -> {out_dims}{experts}, {self.packing}"


class QuantizedLinear(PackedLayer):
    """A frozen packed projection, `y = x @ dequantize(W).T + bias`, of (out, in)."""

    def product(self, x: mx.array, *, forward: bool, expand: bool) -> mx.array:
        """`x @ W.T` for `forward`, else `x @ W`, in the type of `x`."""
        if expand:
            return expanded_product(x, self.packing, self._for(x), transpose=forward)
        return self.packing.product(x, self.arrays, transpose=forward).astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        def multiply(x: mx.array, forward: bool) -> mx.array:
            expand = self.expands(x.size // x.shape[-1], forward=forward)
            return self.product(x, forward=forward, expand=expand)

        # Where nothing is trained the gradient of our own only makes the graph dearer to build,
        # which a generated token waits for on a GPU.
        y = frozen_product(x, multiply) if self.training else multiply(x, True)
        if "bias" in self:
            y = y + self.bias
        return y


class QuantizedEmbedding(QuantizedLinear):
    """A packed embedding table that may also serve as the output head (tied weights)."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Look up ids of any shape: (...) -> (..., dims)."""
        return self.packing.expand(self.packing.rows(self.arrays, ids), self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Project (..., dims) onto the vocabulary: (..., vocabulary)."""
        return super().__call__(x)
