"""Ways to pack a frozen weight: MLX's own modes, and NF4.

A packing turns a weight of (…, out, in) into a few named arrays and back. Where MLX
multiplies by the packed form itself it offers that product too. Layers hold the arrays
and know nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxtune.device import on_cpu

Arrays = dict[str, mx.array]
# What selects rows of a weight: the same rows of all its arrays.
Rows = slice | mx.array

# Bits, and the weights that share a scale. MLX takes no others in these modes.
MICROSCALING = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = _MAGNITUDES + tuple(-value for value in _MAGNITUDES)


@dataclass(frozen=True)
class Packing:
    """How a weight is packed: by `mx.quantize` in one of MLX's modes, unless derived.

    `affine`: a scale and a bias to a group of 32, 64 or 128 weights of 2, 3, 4, 5, 6 or 8
    bits. `mxfp4` and `mxfp8` (OCP Microscaling Formats 1.0): E2M1 and E4M3 values, a
    power of two to 32 of them. `nvfp4`: E2M1 values, an E4M3 scale to 16 of them.

    Args:
        mode: as MLX calls it.
        bits: of one weight.
        group_size: input features that share a scale.
    """

    mode: str
    bits: int
    group_size: int

    # Whether MLX multiplies by the packed weight.
    has_product: ClassVar[bool] = True
    # Of the arrays, in the order in which `mx.quantize` gives them; the first is uint32
    # of (…, out, in * bits / 32).
    names: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}/{self.group_size}"

    def pack(self, weight: mx.array) -> Arrays:
        """Pack (…, out, in), `in` a multiple of the group size."""
        packed = mx.quantize(weight, **self._options)
        return dict(zip(self.names, packed, strict=False))  # only affine has biases

    def expand(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        """The weight of (…, out, in); on a CPU with the numbers of `mx.dequantize`, sooner."""
        sooner = _ON_CPU.get((self.mode, self.bits))
        if sooner is not None and on_cpu():
            return sooner(arrays).astype(dtype)
        full = mx.dequantize(
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            dtype=None if self.mode == "affine" else dtype,
            **self._options,
        )
        return full.astype(dtype)

    def rows(self, arrays: Arrays, rows: Rows) -> Arrays:
        """The same packing of some of the first axis' entries."""
        return {name: array[rows] for name, array in arrays.items()}

    def product(self, x: mx.array, arrays: Arrays, *, transpose: bool) -> mx.array:
        """`x @ weight.T`, or `x @ weight`, by the packed weight of (out, in)."""
        return mx.quantized_matmul(
            x,
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            transpose=transpose,
            **self._options,
        )

    def gathered_product(
        self, x: mx.array, arrays: Arrays, indices: mx.array, *, transpose: bool, ordered: bool
    ) -> mx.array:
        """As `product`, each matrix of `x` by the weight that its index says."""
        return mx.gather_qmm(
            x,
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            rhs_indices=indices,
            transpose=transpose,
            sorted_indices=ordered,
            **self._options,
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def by_codebook(
    weight: mx.array, scales: mx.array, levels: tuple[float, ...], *, high_first: bool = False
) -> mx.array:
    """Levels that codes of four bits stand for, times their group's scale.

    Args:
        weight: uint32 (…, out, in / 8).
        scales: float (…, out, groups).
        levels: what the 16 codes stand for.
        high_first: whether a byte's first code is in its high half.

    Returns:
        (…, out, in) in the type of the scales.
    """
    values = _looked_up(weight, levels, scales.dtype, high_first).reshape(*scales.shape, -1)
    return (values * scales[..., None]).reshape(*weight.shape[:-1], -1)


def _looked_up(
    weight: mx.array, levels: tuple[float, ...], dtype: mx.Dtype, high_first: bool = False
) -> mx.array:
    """The level of each code, (…, out, in).

    Two codes at a time, as one number of twice the width: nothing else of the weight's
    size exists, and on a CPU it takes an eighth of the time of a table of pairs.
    """
    pair = mx.uint64 if dtype.size == 4 else mx.uint32
    table = mx.array(_pairs(levels, high_first)).astype(dtype).view(pair).reshape(-1)
    codes = weight.view(mx.uint8).reshape(-1)
    values = mx.take_along_axis(table, codes, axis=0).view(dtype)
    return values.reshape(*weight.shape[:-1], -1)


@cache
def _pairs(levels: tuple[float, ...], high_first: bool) -> np.ndarray[Any, Any]:
    """What the two codes of each byte stand for: float32 (256, 2).

    Kept in NumPy: an array of MLX made while it traces a function must not outlive that.
    """
    pairs = [(levels[byte & 15], levels[byte >> 4]) for byte in range(256)]
    table = np.array(pairs, np.float32)
    return table[:, ::-1].copy() if high_first else table


def _expand_affine4(arrays: Arrays) -> mx.array:
    values = _looked_up(arrays["weight"], tuple(range(16)), arrays["scales"].dtype)
    return _scaled_and_shifted(values, arrays)


def _expand_affine8(arrays: Arrays) -> mx.array:
    values = arrays["weight"].view(mx.uint8).astype(arrays["scales"].dtype)
    return _scaled_and_shifted(values, arrays)


def _scaled_and_shifted(values: mx.array, arrays: Arrays) -> mx.array:
    scales, biases = arrays["scales"][..., None], arrays["biases"][..., None]
    groups = values.reshape(*arrays["scales"].shape, -1)
    return (groups * scales + biases).reshape(*values.shape)


def _expand_mxfp4(arrays: Arrays) -> mx.array:
    return by_codebook(arrays["weight"], _powers(arrays["scales"]), _E2M1)


def _expand_nvfp4(arrays: Arrays) -> mx.array:
    scales = mx.from_fp8(arrays["scales"], mx.float32)
    return by_codebook(arrays["weight"], scales, _E2M1)


def _expand_mxfp8(arrays: Arrays) -> mx.array:
    table = mx.from_fp8(mx.arange(256, dtype=mx.uint8), mx.float32)
    codes, scales = arrays["weight"].view(mx.uint8), _powers(arrays["scales"])
    values = mx.take_along_axis(table, codes.reshape(-1), axis=0).reshape(*scales.shape, -1)
    return (values * scales[..., None]).reshape(*codes.shape)


def _powers(exponents: mx.array) -> mx.array:
    """E8M0 to float32: 2 ** (exponent - 127), by putting it where float32 has its own."""
    return (exponents.astype(mx.uint32) << 23).view(mx.float32)


# What is faster on a CPU than `mx.dequantize` (measured on 1536 x 576, processor time: 4 bits
# 1.1 ms for 2.6, mxfp4 1.1 for 11), by mode and bits; in the type of the scales or float32.
_ON_CPU: dict[tuple[str, int], Callable[[Arrays], mx.array]] = {
    ("affine", 4): _expand_affine4,
    ("affine", 8): _expand_affine8,
    ("mxfp4", 4): _expand_mxfp4,
    ("mxfp8", 8): _expand_mxfp8,
    ("nvfp4", 4): _expand_nvfp4,
}
