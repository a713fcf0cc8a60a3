"""AdamW whose two moments take a byte each (Dettmers et al. 2021, arXiv:2110.02861).

A tensor is cut into blocks of 256 values. Each keeps its largest magnitude in float32,
and of every value only which of 256 levels between -1 and 1 (0 and 1 for the second
moment) is nearest to its share of that. The levels are the paper's dynamic tree: seven
decades down to 1e-7, with twice as many levels in each as in the one below, so that the
relative error is about 1 % where values are large and small ones do not vanish.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import numpy.typing as npt

BLOCK = 256
# As in bitsandbytes: a small tensor saves nothing worth a rounding.
SMALLEST = 4096
DECADES = 7

# A float's bits from here on choose its bucket: the exponent and 7 bits of the fraction.
# That is fine enough for a bucket to hold at most one boundary between two levels.
_BUCKET_SHIFT = 16
_BUCKETS = 0x3F80 + 1  # to the one that begins with 1.0


def dynamic_levels(*, signed: bool) -> npt.NDArray[np.float32]:
    """The 256 levels in order; 0 and 1 are among them, and -1 is not.

    In each decade they are the midpoints of 2^e (unsigned: 2^(e+1)) equal parts of
    [0.1, 1) times its power of ten, e counting decades from the lowest.
    """
    positive: list[npt.NDArray[np.float64]] = []
    for decade in range(DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        middles = 0.1 + 0.9 * (np.arange(count) + 0.5) / count
        positive.append(middles * 10.0 ** (decade - DECADES + 1))
    above: npt.NDArray[np.float64] = np.concatenate(positive)
    below = -above[::-1] if signed else above[:0]
    levels = [*below, 0.0, *above, 1.0]
    return np.array(levels, np.float32)


class DynamicMap:
    """Block-wise quantization to one of the two sets of levels.

    Args:
        signed: for values of both signs; otherwise for those from 0 up.
    """

    def __init__(self, *, signed: bool) -> None:
        levels = dynamic_levels(signed=signed)
        self._signed = signed
        self._zero = int(np.argmin(np.abs(levels)))
        # Magnitudes count from zero; those of negative values end one before 1.
        upward = levels[self._zero :].astype(np.float64)
        boundaries = (upward[:-1] + upward[1:]) / 2
        floors = (np.arange(_BUCKETS, dtype=np.uint32) << _BUCKET_SHIFT).view(np.float32)
        self._levels = mx.array(levels)
        # The last level has no boundary above it.
        self._boundaries = mx.array(np.append(boundaries, 2.0).astype(np.float32))
        self._nearest = mx.array(np.searchsorted(boundaries, floors).astype(np.uint8))

    def quantize(self, x: mx.array, *, never_to_zero: bool = False) -> tuple[mx.array, mx.array]:
        """Codes, uint8 (blocks, 256), and largest magnitudes, float32 (blocks, 1).

        Args:
            x: of any shape; the last block is filled up with zeros.
            never_to_zero: round a value that is not zero to the first level at least.
        """
        missing = -x.size % BLOCK
        blocks = mx.pad(x.astype(mx.float32).reshape(-1), (0, missing)).reshape(-1, BLOCK)
        size = mx.abs(blocks)
        absmax = size.max(axis=1, keepdims=True)
        # A block of zeros has no scale and needs none.
        size = size / mx.where(absmax == 0, 1.0, absmax)
        # What is not a number has a bucket too: the last.
        bucket = mx.minimum(size.view(mx.uint32) >> _BUCKET_SHIFT, _BUCKETS - 1)
        code = self._nearest[bucket]
        code = code + (size > self._boundaries[code]).astype(mx.uint8)
        if never_to_zero:
            code = mx.maximum(code, (blocks != 0).astype(mx.uint8))
        if self._signed:
            down = self._zero - mx.minimum(code, self._zero)
            code = mx.where(blocks < 0, down, self._zero + code)
        return code.astype(mx.uint8), absmax

    def dequantize(self, codes: mx.array, absmax: mx.array, shape: tuple[int, ...]) -> mx.array:
        """The values, float32 of `shape`."""
        blocks = self._levels[codes] * absmax
        return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


class AdamW8bit(mlx.optimizers.AdamW):
    """AdamW with both moments in 8 bits between steps.

    Each step expands them, takes AdamW's step with their exact new values, and packs
    these again; only what is remembered is rounded. A parameter of fewer than 4096
    weights keeps its moments in full.

    The state of a parameter is `m` and `v`, uint8 (blocks, 256), with `m_absmax` and
    `v_absmax`, float32 (blocks, 1): 2.03 bytes for a weight, where AdamW has 8.
    """

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        full: dict[str, mx.array] = {}
        super().init_single(parameter.astype(mx.float32), full)
        if parameter.size < SMALLEST:
            state.update(full)
        else:
            _keep(state, full)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        if "m_absmax" not in state:
            small: mx.array = super().apply_single(gradient, parameter, state)
            return small.astype(parameter.dtype)
        full = {
            name: kind.dequantize(state[name], state[f"{name}_absmax"], parameter.shape)
            for name, kind in _KINDS.items()
        }
        updated: mx.array = super().apply_single(gradient, parameter, full)
        _keep(state, full)
        return updated.astype(parameter.dtype)


_KINDS = {"m": DynamicMap(signed=True), "v": DynamicMap(signed=False)}


def _keep(state: dict[str, Any], full: dict[str, mx.array]) -> None:
    for name, kind in _KINDS.items():
        # A first moment over a second one that was rounded away would be a step without
        # bound (Li et al. 2023, arXiv:2309.01507); rounded up, the step is shorter.
        codes, absmax = kind.quantize(full[name], never_to_zero=name == "v")
        state[name], state[f"{name}_absmax"] = codes, absmax
