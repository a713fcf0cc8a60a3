"""What a corpus looks like: how long its samples are, what is trained, what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.data.render import Sample

# A prefix is common if so large a part of the samples begins with it.
COMMON = 0.5
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens that many samples begin with; packs compute them once.

    Attributes:
        tokens: how many tokens the common beginning has.
        samples: share of the samples that have all of it.
        share: of all tokens, those that stand in such a beginning.
    """

    tokens: int
    samples: float
    share: float


@dataclass(frozen=True)
class Bin:
    """Samples of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


def stretches(sample: Sample) -> Iterator[tuple[bool, npt.NDArray[np.int32]]]:
    """Unbroken stretches of tokens that are trained, or not, in order."""
    trained = sample.weights > 0
    edges = np.flatnonzero(np.diff(trained)) + 1
    for tokens, kind in zip(np.split(sample.tokens, edges), np.split(trained, edges), strict=True):
        if len(kind):
            yield bool(kind[0]), tokens


def histogram(lengths: npt.NDArray[np.int64], bins: int = 10) -> list[Bin]:
    """Counts of lengths in bins of equal width, a round number of tokens each."""
    longest = int(lengths.max())
    width = max(1, -(-longest // bins))
    step = 10 ** (len(str(width)) - 1)
    width = -(-width // step) * step
    counts = np.bincount((lengths - 1) // width, minlength=-(-longest // width))
    return [Bin(1 + i * width, (i + 1) * width, int(n)) for i, n in enumerate(counts)]


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """All samples, or 10,000 of them, evenly spread over a large corpus."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, _LOOKED_AT).astype(int))
    return [samples[int(i)] for i in chosen]


def shared_prefix(samples: Sequence[Sample]) -> SharedPrefix:
    """The longest beginning that at least half of the samples have."""
    following = [sample.tokens for sample in samples]
    count, total = len(following), sum(map(len, following))
    place = shared = 0
    having = count
    while True:
        going_on = [tokens for tokens in following if len(tokens) > place]
        tokens_here = Counter(int(tokens[place]) for tokens in going_on)
        if not tokens_here:
            break
        token, votes = tokens_here.most_common(1)[0]
        if votes < COMMON * count or count < 2:
            break
        following = [tokens for tokens in going_on if tokens[place] == token]
        place, having, shared = place + 1, votes, shared + votes
    return SharedPrefix(place, having / count, shared / total)
