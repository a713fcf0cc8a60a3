"""Searches for the scale (and minimum) that a group of weights is rounded with.

The algorithms are those of ggml's reference quantizers (`make_qkx2_quants`,
`make_qkx3_quants`, `make_qx_quants`, `make_q3_quants` and `make_qp_quants` of
ggml-quants.c, https://github.com/ggml-org/llama.cpp, MIT), for many groups at a time and
operation by operation in the same order, so that the results are the same to the last bit.

`x` and `weights` are (elements, groups) throughout, the results (groups,).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxtune.gguf.arithmetic import Arithmetic, Array

# Groups with nothing larger than this are taken for zeros.
TINY = 1e-15


class MinFit(NamedTuple):
    """x ≈ scale · code - minimum, code in 0…top.

    The codes of the search are clip(round(code_scale · (x - code_minimum)), 0, top): of
    the step that won, whose own start was another minimum than the one it arrived at.
    """

    scale: Array
    minimum: Array
    code_scale: Array
    code_minimum: Array


class Steps(NamedTuple):
    """Which scales a search tries: (first + step · i + top) / range for i in 0…last."""

    first: float
    step: float
    last: int

    def numerators(self, top: int) -> list[float]:
        """In float32, rounded after each operation."""
        one = np.float32
        return [
            float(one(one(self.first) + one(one(self.step) * one(i))) + one(top))
            for i in range(self.last + 1)
        ]


def fit_min(
    xp: Arithmetic,
    x: Array,
    weights: Array,
    top: int,
    steps: Steps,
    *,
    absolute: bool = False,
) -> MinFit:
    """Scale and minimum with the least weighted error that the steps lead to.

    Each step rounds with its own scale, and solves the weighted least squares for the
    scale and minimum that suit these codes best. A minimum that is taken over is what the
    later steps start from.

    Args:
        xp: the library to compute with.
        x: the weights.
        weights: of the errors.
        top: the largest code.
        steps: the scales to try.
        absolute: measure errors by their size instead of their square.
    """
    codes, products, spare = xp.scratch(x, 3)
    sum_w = xp.sum_rows(weights)
    sum_x = xp.sum_rows(xp.multiply(weights, x, out=spare))
    low, high = xp.first_min(x), xp.max_rows(x)
    low = xp.where(low > 0, 0.0, low)
    constant = high == low

    def round_with(scale: Array, low: Array) -> Array:
        result = xp.subtract(x, low, out=codes)
        result = xp.multiply(result, scale, out=codes)
        return xp.clip(xp.rint(result, out=codes), 0, top, out=codes)

    def error_of(codes: Array, scale: Array, low: Array) -> Array:
        result = xp.multiply(codes, scale, out=spare)
        result = xp.add(result, low, out=spare)
        result = xp.subtract(result, x, out=spare)
        if absolute:
            result = xp.absolute(result, out=spare)
        else:
            result = xp.multiply(result, result, out=spare)
        return xp.sum_rows(xp.multiply(weights, result, out=spare))

    code_scale, code_low = top / (high - low), low
    scale = 1 / code_scale
    best = error_of(round_with(code_scale, low), scale, low)
    for numerator in steps.numerators(top):
        trial = numerator / (high - low)
        rounded = round_with(trial, low)
        product = xp.multiply(weights, rounded, out=products)
        sum_l = xp.sum_rows(product)
        sum_l2 = xp.sum_rows(xp.multiply(product, rounded, out=spare))
        sum_xl = xp.sum_rows(xp.multiply(product, x, out=products))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_low > 0
        new_scale = xp.where(positive, sum_xl / sum_l2, new_scale)
        new_low = xp.where(positive, 0.0, new_low)
        error = error_of(rounded, new_scale, new_low)
        better = (determinant > 0) & (error < best)
        code_scale = xp.where(better, trial, code_scale)
        code_low = xp.where(better, low, code_low)
        best = xp.where(better, error, best)
        scale = xp.where(better, new_scale, scale)
        low = xp.where(better, new_low, low)
        xp.compute(code_scale, code_low, best, scale, low)
    # A group of one value has the codes 0: with this, (x - low) * 0.
    scale, code_scale = xp.where(constant, 0.0, scale), xp.where(constant, 0.0, code_scale)
    return MinFit(scale, -low, code_scale, code_low)


class Fit(NamedTuple):
    """x ≈ scale · code, code in -n…n-1; the codes are round(code_scale · x), clipped.

    `empty` marks groups of zeros, whose codes are -n.
    """

    scale: Array
    code_scale: Array
    empty: Array


def fit(xp: Arithmetic, x: Array, weights: Array | None, n: int) -> Fit:
    """Scale with the least weighted squared error among 19 near n / max |x|.

    Args:
        xp: the library to compute with.
        x: the weights.
        weights: of the errors; x² where there are none.
        n: codes go from -n to n - 1.
    """
    codes, products = xp.scratch(x, 2)
    if weights is None:
        weights = xp.multiply(x, x)
    weighted = xp.multiply(weights, x)
    peak = xp.peak(x)
    empty = xp.absolute(peak) < TINY

    def sums(code_scale: Array) -> tuple[Array, Array]:
        rounded = xp.multiply(x, code_scale, out=codes)
        rounded = xp.clip(xp.rint(rounded, out=codes), -n, n - 1, out=codes)
        sum_lx = xp.sum_rows(xp.multiply(weighted, rounded, out=products))
        product = xp.multiply(weights, rounded, out=products)
        return sum_lx, xp.sum_rows(xp.multiply(product, rounded, out=products))

    code_scale = -n / peak
    sum_lx, sum_l2 = sums(code_scale)
    scale = xp.where(sum_l2 != 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for i in range(-9, 10):
        if i == 0:
            continue
        trial = float(-(np.float32(n) + np.float32(0.1) * np.float32(i))) / peak
        sum_lx, sum_l2 = sums(trial)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        new_scale = sum_lx / sum_l2
        code_scale = xp.where(better, trial, code_scale)
        scale = xp.where(better, new_scale, scale)
        best = xp.where(better, new_scale * sum_lx, best)
        xp.compute(code_scale, scale, best)
    return Fit(xp.where(empty, 0.0, scale), code_scale, empty)


def refine(
    xp: Arithmetic, x: Array, weights: Array, codes: Array, n: int, *, unsigned: bool
) -> tuple[Array, Array]:
    """Move one code at a time to where it suits the scale that all others give.

    Five rounds over the elements, or fewer when none moves any more.

    Args:
        xp: the library to compute with.
        x: what is rounded.
        weights: of the squared errors.
        codes: to start from.
        n: codes go from -n to n - 1; for unsigned ones n is the largest.
        unsigned: codes wrap at 8 bits instead of being clipped at the low end.

    Returns:
        The scale, 0 where it is not defined, and the codes.
    """
    weighted = xp.multiply(weights, x)
    sum_lx = xp.sum_rows(xp.multiply(weighted, codes))
    sum_l2 = xp.sum_rows(xp.multiply(xp.multiply(weights, codes), codes))
    codes = _byte(xp, codes) if unsigned else codes

    def clip(code: Array) -> Array:
        return xp.minimum(code, float(n)) if unsigned else xp.clip(code, -n, n - 1)

    # Groups in which nothing moved will not move later either.
    moving = xp.indices(sum_lx == sum_lx)
    for _ in range(5):
        part = [a[:, moving] for a in (x, weights, weighted, codes)]
        lx, l2 = sum_lx[moving], sum_l2[moving]
        moved = lx != lx
        found = []
        for value, w, wx, old in zip(*part, strict=True):
            new_lx, new_l2 = lx - wx * old, l2 - w * old * old
            new = clip(xp.nearest(value * new_l2 / new_lx))
            better = (new_lx > 0) & (new != old)
            if unsigned:
                better = better & (new_l2 > 0)
            new_lx, new_l2 = new_lx + wx * new, new_l2 + w * new * new
            better = better & (new_l2 > 0) & (new_lx * new_lx * l2 > lx * lx * new_l2)
            found.append(xp.where(better, _byte(xp, new) if unsigned else new, old))
            lx, l2 = xp.where(better, new_lx, lx), xp.where(better, new_l2, l2)
            moved = moved | better
            xp.compute(found[-1], lx, l2, moved)
        codes[:, moving], sum_lx[moving], sum_l2[moving] = xp.stack(found), lx, l2
        moving = moving[xp.indices(moved)]
        if not len(moving):
            break
    return xp.where(sum_l2 > 0, sum_lx / sum_l2, 0.0), codes


def _byte(xp: Arithmetic, codes: Array) -> Array:
    """Codes as they are after ggml has kept them in a byte."""
    return xp.where(codes < 0, codes + 256, codes)


def fit_refined(xp: Arithmetic, x: Array, n: int) -> tuple[Array, Array]:
    """Scale and codes (0…2n-1) with weights x², one code at a time. Zeros have the codes 0."""
    peak = xp.peak(x)
    empty = xp.absolute(peak) < TINY
    codes = xp.clip(xp.nearest(xp.multiply(x, -n / peak)), -n, n - 1)
    scale, codes = refine(xp, x, xp.multiply(x, x), codes, n, unsigned=False)
    return xp.where(empty, 0.0, scale), xp.where(empty, 0.0, codes + n)


def fit_positive(xp: Arithmetic, x: Array, weights: Array, top: int) -> tuple[Array, Array]:
    """Scale and codes (0…top) of values that are not negative, such as scales.

    The best of nine scales near top / max x, then one code at a time.
    """
    highest = xp.max_rows(x)
    empty = highest < TINY
    code_scale = top / highest
    rounded = _byte(xp, xp.nearest(xp.multiply(x, code_scale)))

    def error_of(rounded: Array, scale: Array) -> Array:
        difference = xp.subtract(x, xp.multiply(rounded, scale))
        return xp.sum_rows(xp.multiply(xp.multiply(weights, difference), difference))

    best = error_of(rounded, 1 / code_scale)
    for i in range(-4, 5):
        if i == 0:
            continue
        trial = float(np.float32(0.1) * np.float32(i) + np.float32(top)) / highest
        rounded = xp.minimum(xp.nearest(xp.multiply(x, trial)), float(top))
        error = error_of(rounded, 1 / trial)
        better = error < best
        best, code_scale = xp.where(better, error, best), xp.where(better, trial, code_scale)
    codes = xp.minimum(xp.nearest(xp.multiply(x, code_scale)), float(top))
    scale, codes = refine(xp, x, weights, codes, top, unsigned=True)
    return xp.where(empty, 0.0, scale), xp.where(empty, 0.0, codes)
