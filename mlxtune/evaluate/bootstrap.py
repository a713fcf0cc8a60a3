"""How sure a mean of few records is: percentile bootstrap (Efron, 1979).

Records are drawn with replacement, as many as there are, again and again; the interval
holds the middle share of the means. Two models that answered the same records are
compared by the differences record by record, so what makes a record hard for both
cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
# Indices drawn at once: 32 MB of them, however many records there are.
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with the confidence asked for.

    Attributes:
        mean: of the values.
        low: lower end.
        high: upper end.
        count: how many values there are.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Mean and percentile interval; None of no values.

    Args:
        values: one a record.
        level: confidence, between 0 and 1.
        resamples: how often records are drawn.
        seed: the same seed gives the same interval.
    """
    if not values:
        return None
    array = np.asarray(values, np.float64)
    means = _resampled_means(array, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def ratio_interval(
    totals: Sequence[float],
    weights: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Sum of the totals over sum of the weights, and its interval; None of no weight.

    For a loss a token, of which a long record has more than a short one.

    Args:
        totals: one a record.
        weights: one a record.
        level, resamples, seed: as `mean_interval`.
    """
    pairs = np.asarray([totals, weights], np.float64)
    if not pairs[1].sum():
        return None
    # Of the same draws: the seed is the same.
    above, below = (_resampled_means(values, resamples, seed) for values in pairs)
    ratios = above[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high), len(totals))


def paired_difference(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Mean of after - before over the records where both were measured; None of none."""
    pairs = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return mean_interval(pairs, level=level, resamples=resamples, seed=seed)


def _resampled_means(
    values: npt.NDArray[np.float64], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """float64 (resamples,)."""
    random = np.random.default_rng(seed)
    count = len(values)
    rows = max(1, _AT_ONCE // count)
    means = [
        values[random.integers(0, count, (min(rows, resamples - at), count))].mean(axis=1)
        for at in range(0, resamples, rows)
    ]
    return np.concatenate(means)
