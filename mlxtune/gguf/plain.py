"""Blocks of 32 whose scale needs no search: Q8_0, and four smaller ones.

After ggml's `quantize_row_*_ref` (ggml-quants.c of https://github.com/ggml-org/llama.cpp,
MIT). `x` is float32 (blocks, 32); the results are uint8 (blocks, bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ExportError
from mlxtune.gguf import layout
from mlxtune.gguf.arithmetic import NUMPY

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def half(values: Floats) -> npt.NDArray[np.float16]:
    """As float16, the type of all scales.

    Raises:
        ExportError: a value is too large for it.
    """
    halfs = values.astype(np.float16)
    if not np.isfinite(halfs).all():
        raise ExportError("the weights are too large for this type: a scale overflows float16")
    return halfs


def _inverse(d: Floats) -> Floats:
    return np.where(d != 0, 1 / d, np.float32(0))[:, None]


def _truncate(values: Floats, top: int) -> Bytes:
    """Cut to whole numbers; what overflowed to no number is 0, as C's conversion has it."""
    codes = np.where(np.isfinite(values), values, np.float32(0)).astype(np.uint8)
    return np.minimum(codes, np.uint8(top))


def _symmetric(x: Floats, n: int) -> tuple[npt.NDArray[np.float16], Bytes]:
    d = NUMPY.peak(x.T) / np.float32(-n)
    return half(d), _truncate(x * _inverse(d) + np.float32(n + 0.5), 2 * n - 1)


def _with_minimum(x: Floats, top: int) -> tuple[Any, ...]:
    low = NUMPY.first_min(x.T)
    # Adding 0 takes the sign from the zero that 0 - -0 may be.
    d = (x.max(axis=1) - low) / np.float32(top) + np.float32(0)
    codes = _truncate((x - low[:, None]) * _inverse(d) + np.float32(0.5), top)
    return half(d), half(low), codes


def _q8_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=1) / np.float32(127)
    scaled = x * _inverse(d)
    # Half away from zero, as C's roundf. Adding 0.5 first would round twice.
    whole = np.trunc(scaled)
    whole += np.copysign(np.abs(scaled - whole) >= 0.5, scaled)
    whole = np.where(np.isfinite(whole), whole, np.float32(0))
    return layout.pack_q8_0(half(d), whole.astype(np.int8))


PLAIN: dict[Type, Callable[[Floats], Bytes]] = {
    Type.Q8_0: _q8_0,
    Type.Q4_0: lambda x: layout.pack_q4_0(*_symmetric(x, 8)),
    Type.Q5_0: lambda x: layout.pack_q5_0(*_symmetric(x, 16)),
    Type.Q4_1: lambda x: layout.pack_q4_1(*_with_minimum(x, 15)),
    Type.Q5_1: lambda x: layout.pack_q5_1(*_with_minimum(x, 31)),
}
