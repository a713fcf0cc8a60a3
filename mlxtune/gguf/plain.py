"""Blocks of 32 whose scale needs no search: Q8_0, and four smaller ones.

After ggml's `quantize_row_*_ref` (ggml-quants.c of https://github.com/ggml-org/llama.cpp,
MIT). `x` is float32 (32, blocks); the results are uint8 (blocks, bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ExportError
from mlxtune.gguf import layout
from mlxtune.gguf.arithmetic import NUMPY, aligned

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def half(values: Floats) -> npt.NDArray[np.float16]:
    """As float16, the type of all scales.

    Raises:
        ExportError: a value is too large for it.
    """
    halfs = values.astype(np.float16)
    if not np.isfinite(halfs).all():
        raise ExportError(
            "the weights are too large for this type: a scale overflows float16",
            remedy="write bf16, or f32",
        )
    return halfs


def _scaled(x: Floats, d: Floats) -> Floats:
    """x / d by the inverse, as ggml does; what is not finite then is minus infinity."""
    inverse = np.where(d != 0, 1 / d, np.float32(0))
    result = np.multiply(x, inverse, out=aligned(x.shape))
    if not np.isfinite(inverse).all():
        result[~np.isfinite(result)] = -np.inf
    return cast(Floats, result)


def _cut(values: Floats, top: int) -> Bytes:
    """Cut to whole numbers. C's conversion makes 0 of what is no number."""
    values = np.maximum(values, 0, out=values)
    codes = values.astype(np.uint8)
    return turned(np.minimum(codes, np.uint8(top), out=codes))


def turned(codes: npt.NDArray[Any]) -> Bytes:
    """(32, blocks) to (blocks, 32)."""
    return np.ascontiguousarray(codes.T)


def _symmetric(x: Floats, n: int) -> tuple[npt.NDArray[np.float16], Bytes]:
    d = NUMPY.peak(x) / np.float32(-n)
    scaled = _scaled(x, d)
    scaled += np.float32(n + 0.5)
    return half(d), _cut(scaled, 2 * n - 1)


def _with_minimum(x: Floats, top: int) -> tuple[Any, ...]:
    low = NUMPY.first_min(x)
    # Adding 0 takes the sign from the zero that 0 - -0 may be.
    d = (NUMPY.max_rows(x) - low) / np.float32(top) + np.float32(0)
    scaled = _scaled(np.subtract(x, low, out=aligned(x.shape)), d)
    scaled += np.float32(0.5)
    return half(d), half(low), _cut(scaled, top)


def _q8_0(x: Floats) -> Bytes:
    d = np.abs(NUMPY.peak(x)) / np.float32(127)
    scaled = _scaled(x, d)
    scaled[np.isneginf(scaled)] = 0
    # Half away from zero, as C's roundf: the largest number below a half, because adding
    # a half itself would round up what is just below one.
    scaled += np.copysign(np.float32(0.49999997), scaled)
    return layout.pack_q8_0(half(d), turned(scaled.astype(np.int8)).view(np.int8))


PLAIN: dict[Type, Callable[[Floats], Bytes]] = {
    Type.Q8_0: _q8_0,
    Type.Q4_0: lambda x: layout.pack_q4_0(*_symmetric(x, 8)),
    Type.Q5_0: lambda x: layout.pack_q5_0(*_symmetric(x, 16)),
    Type.Q4_1: lambda x: layout.pack_q4_1(*_with_minimum(x, 15)),
    Type.Q5_1: lambda x: layout.pack_q5_1(*_with_minimum(x, 31)),
}
