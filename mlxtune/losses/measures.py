"""What can be measured of a token's distribution: a value, and its slope in the logits.

With p = softmax(z) over the vocabulary, for the logits z of one row:

| measure | value | slope, d value / d z |
|---|---|---|
| cross-entropy of a target y | -log p_y | p - one-hot(y) |
| entropy | H = -sum p log p | -p (log p + H) |
| sum of squares | sum p^2 | none |
| whether y is likeliest | argmax z = y | none |
| forward KL to t | sum t (log t - log p) | p - t |
| reverse KL to t | R = sum p (log p - log t) | p (log p - log t - R) |
| generalized JSD | b KL(t, M) + (1 - b) KL(p, M) | (1 - b) p (log p - log M - KL(p, M)) |

with M = b t + (1 - b) p (Agarwal et al. 2023, arXiv:2306.13649). Of another model's distribution
either all logits are at hand, or its k likeliest tokens; then all others count as one more token,
whose probability is the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from mlxtune.arrays import exp
from mlxtune.device import on_cpu

# Under this a probability is taken for it, so that its logarithm is a number.
_TINY = 1e-30


class Logits:
    """Rows of logits, and what measures share of them.

    Args:
        raw: (n, vocabulary) of any float type; reduced in float32.
        sloped: whether slopes are asked for, which need powers of all logits.
    """

    def __init__(self, raw: mx.array, *, sloped: bool) -> None:
        self._raw = raw
        self._sloped = sloped

    @cached_property
    def full(self) -> mx.array:
        """In float32."""
        return self._raw.astype(mx.float32)

    @cached_property
    def _peak(self) -> mx.array:
        return self.full.max(axis=-1, keepdims=True)

    @cached_property
    def _powers(self) -> mx.array:
        return exp(self.full - self._peak)

    @cached_property
    def _sums(self) -> mx.array:
        return self._powers.sum(axis=-1, keepdims=True)

    @cached_property
    def total(self) -> mx.array:
        """The logarithm of the sum of all powers: (n, 1)."""
        if self._sloped:
            return mx.log(self._sums) + self._peak
        return mx.logsumexp(self.full, axis=-1, keepdims=True)

    @cached_property
    def probabilities(self) -> mx.array:
        """(n, vocabulary)."""
        return self._powers / self._sums

    @cached_property
    def logs(self) -> mx.array:
        """Logarithms of the probabilities: (n, vocabulary)."""
        return self.full - self.total

    def losses(self, targets: mx.array) -> mx.array:
        """-log p of each row's target, (n,)."""
        if not self._sloped and not on_cpu():
            return mx.fast.cross_entropy(self._raw, targets)
        return self.total[:, 0] - mx.take_along_axis(self.full, targets[:, None], axis=-1)[:, 0]


Function = Callable[..., mx.array]


@dataclass(frozen=True)
class Measure:
    """A figure of a row of logits.

    Attributes:
        value: of `Logits` and what is given for the rows, (n,).
        slope: its gradient for the logits, (n, vocabulary), of the same; None where it is
            not differentiated.
    """

    value: Function
    slope: Function | None = None


def _cross_entropy_slope(logits: Logits, targets: mx.array, *_: mx.array) -> mx.array:
    at, target = targets[:, None], logits.probabilities
    picked = mx.take_along_axis(target, at, axis=-1) - 1
    return mx.put_along_axis(target, at, picked, axis=-1)


def _entropy(logits: Logits, *_: mx.array) -> mx.array:
    return logits.total[:, 0] - (logits.probabilities * logits.full).sum(axis=-1)


def _entropy_slope(logits: Logits, *_: mx.array) -> mx.array:
    return -logits.probabilities * (logits.logs + _entropy(logits)[:, None])


CROSS_ENTROPY = Measure(lambda logits, targets, *_: logits.losses(targets), _cross_entropy_slope)
ENTROPY = Measure(_entropy, _entropy_slope)
SUM_OF_SQUARES = Measure(lambda logits, *_: logits.probabilities.square().sum(axis=-1))
LIKELIEST = Measure(
    lambda logits, targets, *_: (logits.full.argmax(axis=-1) == targets).astype(mx.float32)
)


def divergence(kind: str, other: Callable[..., mx.array], *, mixed: float = 0.5) -> Measure:
    """How far a row's distribution is from another model's.

    Args:
        kind: `forward_kl`, `reverse_kl` or `jsd`.
        other: the other's logits (n, vocabulary), of what is given for the rows.
        mixed: the other's share of the mixture of `jsd`, between 0 and 1.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"there is no divergence {kind!r}")

    def logs(logits: Logits, given: tuple[mx.array, ...]) -> tuple[mx.array, mx.array, mx.array]:
        """Of both, and of the mixture."""
        theirs = other(*given).astype(mx.float32)
        theirs = theirs - mx.logsumexp(theirs, axis=-1, keepdims=True)
        if kind != "jsd":
            return logits.logs, theirs, theirs
        both = mx.logaddexp(theirs + math.log(mixed), logits.logs + math.log(1 - mixed))
        return logits.logs, theirs, both

    def value(logits: Logits, *given: mx.array) -> mx.array:
        ours, theirs, both = logs(logits, given)
        if kind == "forward_kl":
            return (exp(theirs) * (theirs - ours)).sum(axis=-1)
        own = (logits.probabilities * (ours - both)).sum(axis=-1)
        if kind == "reverse_kl":
            return own
        return mixed * (exp(theirs) * (theirs - both)).sum(axis=-1) + (1 - mixed) * own

    def slope(logits: Logits, *given: mx.array) -> mx.array:
        ours, theirs, both = logs(logits, given)
        if kind == "forward_kl":
            return logits.probabilities - exp(theirs)
        apart = ours - both
        mean = (logits.probabilities * apart).sum(axis=-1, keepdims=True)
        share = 1.0 if kind == "reverse_kl" else 1 - mixed
        return share * logits.probabilities * (apart - mean)

    return Measure(value, slope)


def divergence_to_likeliest(tokens: int, logs: int) -> Measure:
    """Forward KL to a distribution of which the k likeliest tokens are kept.

    Args:
        tokens: which of what is given holds them, int (n, k).
        logs: which holds their log-probabilities, float32 (n, k).
    """

    def parts(
        logits: Logits, given: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        at, theirs = given[tokens], given[logs].astype(mx.float32)
        ours = mx.take_along_axis(logits.logs, at, axis=-1)
        rest = mx.maximum(1 - exp(theirs).sum(axis=-1), _TINY)
        own_rest = mx.maximum(1 - exp(ours).sum(axis=-1), _TINY)
        return at, theirs, ours, rest, own_rest

    def value(logits: Logits, *given: mx.array) -> mx.array:
        _, theirs, ours, rest, own_rest = parts(logits, given)
        kept = (exp(theirs) * (theirs - ours)).sum(axis=-1)
        return kept + rest * (mx.log(rest) - mx.log(own_rest))

    def slope(logits: Logits, *given: mx.array) -> mx.array:
        at, theirs, ours, rest, own_rest = parts(logits, given)
        others = logits.probabilities * (1 - rest / own_rest)[:, None]
        return mx.put_along_axis(others, at, exp(ours) - exp(theirs), axis=-1)

    return Measure(value, slope)
