"""Llama 3's scaling of rotary frequencies, and back from its divisors to its settings.

Waves longer than `original / low` are stretched by a factor, those shorter than
`original / high` are not; between them the inverse divisor is linear in the inverse wave.
https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Factors = npt.NDArray[np.float32]

_USUAL = 8192
_HIGH = 4.0
# Settings that were found again are right to this; those of a file that was written from
# frequencies in float32, as llama.cpp's converter does, to less.
_NEAR, _ROUNDED = 3e-6, 1e-4


def llama3_factors(base: float, dims: int, scaling: dict[str, Any]) -> Factors:
    """Divisors of each frequency, float32 (dims / 2,).

    Args:
        base: of the rotation.
        dims: rotated dimensions of a head.
        scaling: `factor`, and what else is not as usual, by the keys of config.json.
    """
    factor = float(scaling["factor"])
    low = float(scaling.get("low_freq_factor", 1.0))
    high = float(scaling.get("high_freq_factor", _HIGH))
    original = int(scaling.get("original_max_position_embeddings", _USUAL))
    waves = _waves(base, dims)
    with np.errstate(divide="ignore", invalid="ignore"):  # low and high may be one
        smooth = (original / waves - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(waves < original / high, 1.0, between)
    return np.where(waves > original / low, factor, factors).astype(np.float32)


def llama3_scaling(base: float, factors: Factors) -> dict[str, Any] | None:
    """Settings whose divisors these are; None if there are none.

    Several may have the same divisors: the usual ones come first, then lengths that are powers
    of two.

    Args:
        base: of the rotation.
        factors: float32 (dims / 2,).
    """
    dims = 2 * len(factors)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    found = [
        {"rope_type": "llama3", **dict(zip(keys, settings, strict=True))}
        for settings in _candidates(_waves(base, dims), factors)
    ]
    for bound in (_NEAR, _ROUNDED):
        for scaling in found:
            if np.allclose(llama3_factors(base, dims, scaling), factors, rtol=bound, atol=0):
                return scaling
    return None


def _waves(base: float, dims: int) -> npt.NDArray[np.float64]:
    waves: npt.NDArray[np.float64]
    waves = 2 * math.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    return waves


def _candidates(
    waves: npt.NDArray[np.float64], factors: Factors
) -> Iterator[tuple[float, float, float, int]]:
    """Factor, low, high and original length, as they may be."""
    largest = _nice(float(str(factors.max())))
    for end in (1.0, largest):  # what is nearly either is so by rounding
        factors = np.where(np.isclose(factors, end, rtol=1e-5, atol=0), np.float32(end), factors)
    for original in (_USUAL, *(1 << n for n in range(21, 3, -1))):
        yield largest, 1.0, _HIGH, original
    stretched = np.flatnonzero(factors > 1)
    if not len(stretched):
        return
    inverse = 1 / factors.astype(np.float64)
    inside = stretched[factors[stretched] < factors.max()]
    if not len(inside) and stretched[0]:
        # A step: both ends of the ramp lie between two waves.
        before, gap = waves[stretched[0] - 1], waves[stretched[0]] / waves[stretched[0] - 1]
        yield _settings(largest, before * gap**0.6, before * gap**0.4)
    elif len(inside) == 1:
        here = inside[0]
        share = (inverse[here] - 1 / largest) / (1 - 1 / largest)
        original = waves[here] * (share * (_HIGH - 1) + 1)
        yield _settings(largest, original, original / _HIGH)
        # One wave inside leaves one end of the ramp free between it and the wave before.
        before = waves[here - 1] if here else share * waves[here]
        for place in (0.5, 0.25, 0.75, 0.1, 0.9, 0.02, 0.98):
            short = before ** (1 - place) * waves[here] ** place
            if 1 / waves[here] > share / short:
                yield _settings(largest, (1 - share) / (1 / waves[here] - share / short), short)
    if len(inside) > 1:
        slope, offset = _line(waves, inverse, inside)
        if slope > 0 and offset < min(1, 1 / largest):
            yield _settings(largest, slope / (1 / largest - offset), slope / (1 - offset))
    if len(stretched) > 1:
        # No wave is so long that it is stretched by all of the factor.
        slope, offset = _line(waves, inverse, stretched)
        short = slope / (1 - offset) if slope > 0 and offset < 1 else 0.0
        for long in (_HIGH * short, 1.01 * waves[-1]):
            if long > short > 0 and offset + slope / long > 0:
                yield _settings(1 / (offset + slope / long), long, short)


def _line(
    waves: npt.NDArray[np.float64], inverse: npt.NDArray[np.float64], inside: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Slope and offset of inverse divisors over inverse waves."""
    first, last = inside[0], inside[-1]
    slope = (inverse[first] - inverse[last]) / (1 / waves[first] - 1 / waves[last])
    return float(slope), float(inverse[first] - slope / waves[first])


def _settings(factor: float, long: float, short: float) -> tuple[float, float, float, int]:
    """Settings of which `original / low` and `original / high` are these waves."""
    original = max(1, round(long))
    return _nice(factor), _nice(original / long), _nice(original / short), original


def _nice(value: float) -> float:
    """A value without the error of having been found by dividing."""
    return round(value, 3) if abs(round(value, 3) - value) < 1e-5 * value else value
