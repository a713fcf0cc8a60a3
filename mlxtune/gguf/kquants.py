"""The block types of GGUF whose scales are searched for, byte for byte as ggml makes them.

The formats and algorithms are those of ggml (ggml-quants.c of
https://github.com/ggml-org/llama.cpp, MIT), compiled without fused multiply-add as for
any x86-64. Blocks of 256 weights have groups of 32 or 16, each with a scale of its own,
kept as a small multiple of the block's float16 scale. `scales` has the searches for them.

An importance per column (the mean squared activation, from an importance matrix) weighs
the errors, and ggml then uses other searches and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.gguf import layout
from mlxtune.gguf.arithmetic import NUMPY, Arithmetic, aligned
from mlxtune.gguf.plain import half
from mlxtune.gguf.scales import TINY, Steps, fit, fit_min, fit_positive, fit_refined

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# The steps that ggml takes with an importance matrix, for all types with a minimum.
_WEIGHED = Steps(-0.9, 0.05, 36)


@dataclass(frozen=True)
class Groups:
    """A chunk of blocks, laid out for the searches.

    Attributes:
        x: float32 (weights of a group, groups). The first group of every block, then the
            second of every block, and so on.
        blocks: how many there are.
        importance: of each weight, as `x`; or None.
        variance: float32 (groups,): the mean square that ggml weighs errors with.
        xp: what the searches compute with.
    """

    x: Floats
    blocks: int
    importance: Floats | None
    variance: Floats | None
    xp: Arithmetic

    @property
    def weights(self) -> Floats:
        """Of the errors, where there is an importance."""
        assert self.importance is not None and self.variance is not None
        result = aligned(self.x.shape)
        np.sqrt(self.variance + self.x * self.x, out=result)
        return cast(Floats, np.multiply(self.importance, result, out=result))

    def search(
        self, function: Callable[..., Any], x: Floats, *arguments: Any, **named: Any
    ) -> list[Floats]:
        """The results of a search, whose arrays may be on the GPU, as NumPy's.

        Args:
            function: one of `scales`.
            x: float32 (elements, groups).
            arguments: weights of that shape, and others that are no arrays.
            named: too.
        """
        given = (x, *arguments)
        own = (self.xp.array(a) if isinstance(a, np.ndarray) else a for a in given)
        results = [np.array(result) for result in function(self.xp, *own, **named)]
        if self.xp is NUMPY:
            return results
        weights = next((a for a in arguments if isinstance(a, np.ndarray)), None)
        tiny = np.flatnonzero(_tiny(x, weights))
        if tiny.size:
            # In the same order in memory, by which NumPy decides in which order it sums.
            some = (np.take(a, tiny, axis=1) if isinstance(a, np.ndarray) else a for a in given)
            for result, exact in zip(results, function(NUMPY, *some, **named), strict=True):
                result[..., tiny] = exact
        return results

    def per_block(self, groups: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(groups,) to (groups of a block, blocks)."""
        return groups.reshape(-1, self.blocks)

    def codes(self, codes: Floats) -> Bytes:
        """Codes laid out as `x` to (blocks, weights)."""
        groups = codes.astype(np.uint8).reshape(len(codes), -1, self.blocks)
        return np.ascontiguousarray(groups.transpose(2, 1, 0)).reshape(self.blocks, -1)


# Apple's GPUs take numbers for zero that are smaller than float32's normal ones, 1.2e-38. The
# searches multiply no more than this with each other, w³x², and with x² for w that is x⁸. Of that
# much is left over for cancellation, and single elements may be smaller by this much.
_TINY_PRODUCT, _TINY_ELEMENT = 1e-30, 1e-10


def _tiny(x: Floats, weights: Floats | None) -> npt.NDArray[np.bool_]:
    """Groups in whose search numbers may come up that a GPU flushes to zero.

    Args:
        x: float32 (elements, groups).
        weights: as `x`; squares of `x` where there are none.

    Returns:
        bool (groups,). Groups of zeros are none of them.
    """
    sizes = np.abs(x)
    peak = sizes.max(axis=0)
    least = _least(sizes)
    found = least < _TINY_ELEMENT
    if weights is None:
        weight = peak * peak
    else:
        weight = _least(weights)
        found |= weight < _TINY_ELEMENT
    peak, weight = np.asarray(peak, np.float64), np.asarray(weight, np.float64)
    return np.asarray((peak > 0) & (found | (weight**3 * peak**2 < _TINY_PRODUCT)))


def _least(sizes: Floats) -> Floats:
    """The smallest of each column that is not zero; infinite where all are."""
    result: Floats = np.where(sizes == 0, np.float32(np.inf), sizes).min(axis=0)
    return result


# ------------------------------------------------------------------------ types with a minimum


def _search_min(
    g: Groups, top: int, steps: Steps, weights: Floats, absolute: bool = False
) -> tuple[Floats, Floats, Callable[[Any], Floats]]:
    """Scales and minimums of all groups, and a function that gives the codes of some."""
    scale, minimum, code_scale, code_low = g.search(
        fit_min, g.x, weights, top, steps, absolute=absolute
    )

    def codes(some: Any) -> Floats:
        # In the narrowest groups a scale overflows, and ggml's rounding makes codes of that.
        rounded = NUMPY.nearest((g.x[:, some] - code_low[some]) * code_scale[some])
        return np.asarray(np.clip(rounded, 0, top), np.float32)

    return scale, minimum, codes


def _with_minimum(g: Groups, top: int, scale_top: int, steps: Steps) -> tuple[Any, ...]:
    """Blocks of groups with a scale and a minimum: d, m, scales, minimums, codes."""
    absolute = False
    if g.importance is not None:
        weights, steps = g.weights, _WEIGHED
    else:
        weights = np.abs(g.x, out=aligned(g.x.shape))
        absolute = scale_top == 15  # Q2_K
        if not absolute:
            weights += np.sqrt(NUMPY.sum_rows(g.x * g.x) / np.float32(len(g.x)))
    scale, minimum, search_codes = _search_min(g, top, steps, weights, absolute)
    d, scales = _shared(g, scale, weights, scale_top)
    m, minimums = _shared(g, minimum, weights, scale_top)
    x = g.x
    step = (d.astype(np.float32) * scales).reshape(-1)
    low = (m.astype(np.float32) * minimums).reshape(-1)
    codes = x + low
    np.divide(codes, step, out=codes)
    codes = NUMPY.clip(np.rint(codes, out=codes), 0, top, out=codes)
    dead = np.flatnonzero(step == 0)
    if dead.size:
        codes[:, dead] = search_codes(dead)
    return d, m, scales.T.astype(np.uint8), minimums.T.astype(np.uint8), g.codes(codes)


def _shared(
    g: Groups, values: Floats, weights: Floats, top: int
) -> tuple[npt.NDArray[np.float16], Floats]:
    """Write the groups' scales as whole numbers (groups of a block, blocks) times one
    float16 a block."""
    values = g.per_block(values)
    if g.importance is not None:
        of_groups = g.per_block(NUMPY.sum_rows(weights))
        scale, codes = g.search(fit_positive, values, of_groups, top)
        return half(scale), codes
    highest = np.maximum(NUMPY.max_rows(values), 0)
    inverse = np.where(highest > 0, np.float32(top) / highest, np.float32(0))
    codes = NUMPY.nearest(inverse * values).astype(np.int32) & 255
    return half(highest / np.float32(top)), np.minimum(codes, top).astype(np.float32)


def _q2_k(g: Groups) -> Bytes:
    return layout.pack_q2_k(*_with_minimum(g, 3, 15, Steps(-0.5, 0.1, 15)))


def _q4_k(g: Groups) -> Bytes:
    return layout.pack_q4_k(*_with_minimum(g, 15, 63, Steps(-1.0, 0.1, 20)))


def _q5_k(g: Groups) -> Bytes:
    return layout.pack_q5_k(*_with_minimum(g, 31, 63, Steps(-0.5, 0.1, 15)))


# ------------------------------------------------------------------------ types without one


def _requantize(
    g: Groups, d: npt.NDArray[np.float16], scales: Floats, n: int, codes: Floats
) -> Bytes:
    """Round again with the scales as they are kept; where they are 0 `codes` stay."""
    step = (d.astype(np.float32) * scales).reshape(-1)
    again = g.x / step
    again = NUMPY.clip(np.rint(again, out=again), -n, n - 1, out=again)
    again += n
    dead = np.flatnonzero(step == 0)
    again[:, dead] = codes[:, dead]
    return g.codes(again)


def _search_symmetric(g: Groups, n: int, weights: Floats | None) -> tuple[Floats, Floats]:
    """Scales of all groups and codes (from 0), which are all 0 in groups of zeros."""
    scale, code_scale, empty = g.search(fit, g.x, weights, n)
    codes = NUMPY.clip(NUMPY.nearest(g.x * code_scale), -n, n - 1) + np.float32(n)
    return scale, np.where(empty, np.float32(0), codes)


def _q3_k(g: Groups) -> Bytes:
    if g.importance is not None:
        weights = g.weights
        scale, codes = _search_symmetric(g, 4, weights)
        of_groups, scale = g.per_block(NUMPY.sum_rows(weights)), g.per_block(scale)
        d, code_scale, empty = g.search(fit, scale, of_groups, 32)
        scales = NUMPY.clip(NUMPY.nearest(scale * code_scale), -32, 31)
        scales = np.where(empty, np.float32(-32), scales)
    else:
        scale, codes = g.search(fit_refined, g.x, 4)
        scale = g.per_block(scale)
        inverse = np.float32(-32) / NUMPY.peak(scale)
        empty = ~np.isfinite(inverse)
        d = np.where(empty, np.float32(0), 1 / inverse)
        scales = NUMPY.clip(NUMPY.nearest(scale * inverse), -32, 31)
        scales = np.where(empty, np.float32(-32), scales)
    packed = _requantize(g, half(d), scales, 4, codes)
    return layout.pack_q3_k(half(d), (scales.T + 32).astype(np.uint8), packed)


def _q6_k(g: Groups) -> Bytes:
    scale, codes = _search_symmetric(g, 32, g.importance)
    scale = g.per_block(scale)
    peak = NUMPY.peak(scale)
    empty = ~(np.abs(peak) >= TINY)
    inverse = np.float32(-128) / peak
    d = half(np.where(empty, np.float32(0), 1 / inverse))
    scales = np.minimum(NUMPY.nearest(scale * inverse), 127)
    packed = layout.pack_q6_k(d, scales.T.astype(np.int8), _requantize(g, d, scales, 32, codes))
    packed[empty] = 0
    return packed


# ------------------------------------------------------------------------ blocks of 32, weighed


def _q4_0(g: Groups) -> Bytes:
    scale, codes = _search_symmetric(g, 8, g.weights)
    return layout.pack_q4_0(half(scale), g.codes(codes))


def _q5_0(g: Groups) -> Bytes:
    scale, codes = _search_symmetric(g, 16, g.weights)
    return layout.pack_q5_0(half(scale), g.codes(codes))


def _q4_1(g: Groups) -> Bytes:
    scale, minimum, codes = _search_min(g, 15, _WEIGHED, g.weights)
    return layout.pack_q4_1(half(scale), half(-minimum), g.codes(codes(slice(None))))


def _q5_1(g: Groups) -> Bytes:
    scale, minimum, codes = _search_min(g, 31, _WEIGHED, g.weights)
    return layout.pack_q5_1(half(scale), half(-minimum), g.codes(codes(slice(None))))


# ------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Format:
    """How a type is quantized.

    Attributes:
        function: from groups to packed blocks.
        group: weights in one.
        variance: what ggml multiplies the mean square with in the weights of errors.
    """

    function: Callable[[Groups], Bytes]
    group: int
    variance: float = 1.0


SEARCHED: dict[Type, Format] = {
    Type.Q2_K: Format(_q2_k, 16),
    Type.Q3_K: Format(_q3_k, 16, 2.0),
    Type.Q4_K: Format(_q4_k, 32, 2.0),
    Type.Q5_K: Format(_q5_k, 32, 2.0),
    Type.Q6_K: Format(_q6_k, 16),
}
# Only with an importance; without one their scales need no search.
WEIGHED_PLAIN: dict[Type, Format] = {
    Type.Q4_0: Format(_q4_0, 32),
    Type.Q4_1: Format(_q4_1, 32),
    Type.Q5_0: Format(_q5_0, 32),
    Type.Q5_1: Format(_q5_1, 32),
}


def grouped(blocks: Floats, group: int) -> Floats:
    """(blocks, weights) to (weights of a group, groups), as `Groups` has them."""
    turned = blocks.reshape(len(blocks), -1, group).transpose(2, 1, 0)
    result = aligned(turned.shape)
    np.copyto(result, turned)
    return cast(Floats, result.reshape(group, -1))
