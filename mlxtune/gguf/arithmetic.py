"""The operations that the searches of `scales` are written in, in NumPy and in MLX.

Groups of weights lie with their elements on axis 0: (elements, groups). Everything is
float32 with one rounding per operation. Sums go strictly from the first element to the
last, as a C loop's do; another order gives other bytes in a few blocks of a hundred.

NumPy writes into `out`, which keeps a chunk inside the cache. MLX has no use for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

# An array of the library at work: numpy.ndarray or mlx.core.array.
Array = Any

# Adding 1.5 * 2**23 rounds a float32 to a whole number, half to even, and leaves it in
# the low bits.
_MAGIC = 12582912.0


# Where a wide vector register lies in one line of the cache. NumPy's own arrays begin
# anywhere, and then every load touches two lines: a product takes twice as long.
_LINE = 64


def aligned(shape: tuple[int, ...]) -> Array:
    """An empty float32 array that begins where a line of the cache does."""
    count = 4 * math.prod(shape)
    room = np.empty(count + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + count].view(np.float32).reshape(shape)


class Arithmetic(Protocol):
    """What both libraries offer. `out` may be None."""

    def __hash__(self) -> int: ...

    def array(self, a: Array) -> Array:
        """An array of NumPy's as one of this library's."""

    def add(self, a: Array, b: Array, out: Array = None) -> Array: ...
    def subtract(self, a: Array, b: Array, out: Array = None) -> Array: ...
    def multiply(self, a: Array, b: Array, out: Array = None) -> Array: ...
    def divide(self, a: Array, b: Array, out: Array = None) -> Array: ...
    def rint(self, a: Array, out: Array = None) -> Array: ...
    def clip(self, a: Array, low: float, high: float, out: Array = None) -> Array: ...
    def absolute(self, a: Array, out: Array = None) -> Array: ...
    def where(self, condition: Array, a: Array, b: Array) -> Array: ...
    def minimum(self, a: Array, b: Array, out: Array = None) -> Array: ...

    def nearest(self, a: Array, out: Array = None) -> Array:
        """Whole numbers as C's trick with the low bits gives them, for any `a` at all.

        It equals `rint` up to 2**22 and is what ggml's codes are made of beyond, where
        it wraps, and for infinities.
        """

    def sum_rows(self, a: Array) -> Array:
        """(elements, groups) to (groups,): the sum in the order of the elements."""

    def max_rows(self, a: Array) -> Array: ...

    def first_min(self, a: Array) -> Array:
        """The least of the elements: the first of zeros of both signs."""

    def peak(self, a: Array) -> Array:
        """(elements, groups) to (groups,): the first of the elements largest in size."""

    def scratch(self, like: Array, count: int) -> list[Array]:
        """Buffers of the shape of `like` to pass as `out`."""

    def stack(self, rows: list[Array]) -> Array: ...

    def indices(self, mask: Array) -> Array:
        """Where a mask (groups,) is true."""

    def compute(self, *arrays: Array) -> None:
        """One step of a search is done and these are its results: compute them now."""


class _NumPy:
    add, subtract, multiply, divide = np.add, np.subtract, np.multiply, np.divide
    rint, absolute, minimum = np.rint, np.absolute, np.minimum

    def array(self, a: Array) -> Array:
        return a

    def clip(self, a: Array, low: float, high: float, out: Array = None) -> Array:
        return a.clip(low, high, out=out)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        return np.where(condition, a, b)

    def stack(self, rows: list[Array]) -> Array:
        return np.stack(rows)

    def nearest(self, a: Array, out: Array = None) -> Array:
        bits = np.add(a, np.float32(_MAGIC)).view(np.int32)
        whole = ((bits & 0x7FFFFF) - 0x400000).astype(np.float32)
        if out is None:
            return whole
        np.copyto(out, whole)
        return out

    def sum_rows(self, a: Array) -> Array:
        # With one column NumPy would take the rows for a vector and sum it in pairs.
        return np.add.reduce(a, axis=0) if a.shape[1] > 1 else np.add.accumulate(a)[-1]

    def first_min(self, a: Array) -> Array:
        low = np.minimum.reduce(a, axis=0)
        zero = np.flatnonzero(low == 0)
        if zero.size:
            part = a[:, zero]
            low[zero] = np.take_along_axis(part, part.argmin(axis=0)[None], 0)[0]
        return low

    def max_rows(self, a: Array) -> Array:
        return np.maximum.reduce(a, axis=0)

    def peak(self, a: Array) -> Array:
        high, low = np.maximum.reduce(a, axis=0), np.minimum.reduce(a, axis=0)
        peak = np.where(high > -low, high, low)
        # `argmax` is slow along this axis and only needed where both signs are as large.
        tied = np.flatnonzero(high == -low)
        if tied.size:
            part = a[:, tied]
            peak[tied] = np.take_along_axis(part, np.abs(part).argmax(axis=0)[None], 0)[0]
        # Of zeros alone it is the one without a sign.
        return peak + np.float32(0)

    def scratch(self, like: Array, count: int) -> list[Array]:
        return [aligned(np.shape(like)) for _ in range(count)]

    def indices(self, mask: Array) -> Array:
        return np.flatnonzero(mask)

    def compute(self, *arrays: Array) -> None: ...


def _without_out(function: Callable[..., mx.array]) -> Any:
    def call(*arguments: Any, out: Array = None) -> mx.array:
        return function(*arguments)

    return staticmethod(call)


class _MLX:
    add, subtract = staticmethod(_without_out(mx.add)), staticmethod(_without_out(mx.subtract))
    multiply, divide = (
        staticmethod(_without_out(mx.multiply)),
        staticmethod(_without_out(mx.divide)),
    )
    rint, absolute = staticmethod(_without_out(mx.round)), staticmethod(_without_out(mx.abs))
    clip = staticmethod(_without_out(mx.clip))
    where, minimum = staticmethod(mx.where), staticmethod(mx.minimum)
    array, stack = staticmethod(mx.array), staticmethod(mx.stack)

    def nearest(self, a: Array, out: Array = None) -> Array:
        bits = (a + _MAGIC).view(mx.int32)
        return ((bits & 0x7FFFFF) - 0x400000).astype(mx.float32)

    def sum_rows(self, a: Array) -> Array:
        total = a[0]
        for row in range(1, a.shape[0]):
            total = total + a[row]
        return total

    def first_min(self, a: Array) -> Array:
        return mx.take_along_axis(a, mx.argmin(a, axis=0)[None], axis=0)[0]

    def max_rows(self, a: Array) -> Array:
        return a.max(axis=0)

    def peak(self, a: Array) -> Array:
        return mx.take_along_axis(a, mx.argmax(mx.abs(a), axis=0)[None], axis=0)[0] + 0.0

    def scratch(self, like: Array, count: int) -> list[Array]:
        return [None] * count

    def indices(self, mask: Array) -> Array:
        return mx.array(np.flatnonzero(np.array(mask)))

    def compute(self, *arrays: Array) -> None:
        # Without this the graph of a whole search, with all its buffers, would build up.
        mx.eval(*arrays)


NUMPY = cast(Arithmetic, _NumPy())
MLX = cast(Arithmetic, _MLX())
