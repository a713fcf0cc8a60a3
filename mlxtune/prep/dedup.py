"""Duplicates: the same text, or nearly the same, found without comparing every pair.

Texts are near when their sets of shingles, all runs of so many characters, have a Jaccard
similarity of at least the threshold. MinHash (Broder 1997) gives each text a signature in
which two texts agree in as many places, on average, as their similarity; bands of the
signature are keys, and texts that share a key are compared by their shingles themselves
(Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3). So what is called a
duplicate always is one, and few are missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlxtune.prep.extras import load

# Share of pairs exactly at the threshold that the bands may miss; of pairs above it they
# miss far fewer.
_MISSED = 0.01
_SEED = 1


@dataclass(frozen=True)
class Near:
    """What near means.

    Attributes:
        threshold: least Jaccard similarity of two near texts, above 0 and up to 1.
        permutations: length of a signature. More: fewer needless comparisons, more time.
        shingle: characters in a shingle. Longer: a changed word counts for more.
    """

    threshold: float = 0.85
    permutations: int = 128
    shingle: int = 5

    @cached_property
    def band(self) -> int:
        """Signature places in a band: as many as still find nearly all pairs.

        Of two texts with similarity s, one of n // r bands of r places agrees with the
        probability 1 - (1 - s^r)^(n // r).
        """
        for places in range(self.permutations, 1, -1):
            missed = (1 - self.threshold**places) ** (self.permutations // places)
            if missed <= _MISSED:
                return places
        return 1

    @cached_property
    def bands(self) -> int:
        """How many keys a text has."""
        return self.permutations // self.band


class Duplicate(NamedTuple):
    """Row `row` goes because row `kept`, which stays, is as similar as this to it.

    `same` tells texts that are equal from those with the same shingles.
    """

    row: int
    kept: int
    similarity: float
    same: bool = False


def shingles(text: str, size: int) -> frozenset[str]:
    """All runs of `size` characters; a shorter text is its own only one."""
    return frozenset(text[i : i + size] for i in range(max(1, len(text) - size + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of what they share over size of what either has."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def find_duplicates(
    texts: Sequence[str],
    worth: Sequence[int],
    near: Near | None,
    *,
    protected: int = 0,
    among: bool = True,
) -> list[Duplicate]:
    """The rows to remove so that no two are duplicates of each other.

    Rows are taken from the most to the least worth, equals in their order; one goes when
    it is a duplicate of a row that stays. So each removed row has a better one that is
    really like it: chains, in which the ends differ, are not swallowed whole.

    Args:
        texts: what is compared; read several times, so they may be kept on disk.
        worth: of each text, such as the length of its answer.
        near: what counts as a duplicate; None: only the same text.
        protected: the first so many are of another set: they stay, whatever they are.
        among: whether the others are compared with each other; else with those only.

    Returns:
        The removed rows in order.
    """
    order = [*range(protected), *sorted(range(protected, len(texts)), key=lambda i: -worth[i])]
    first: dict[bytes, int] = {}
    removed, distinct = [], []
    for row in order:
        digest, stays = _digest(texts[row]), row < protected
        kept = first.setdefault(digest, row) if among or stays else first.get(digest, row)
        if kept == row:
            distinct.append(row)
        elif not stays:
            removed.append(Duplicate(row, kept, 1.0, same=True))
    if near is not None:
        index = _Index(texts, distinct, near)
        for row in distinct:
            found = None if row < protected else next(index.near(row), None)
            if found is not None:
                removed.append(Duplicate(row, *found))
            elif among or row < protected:
                index.add(row)
        removed = _pointing_at_kept(removed)
    return sorted(removed)


def _pointing_at_kept(removed: list[Duplicate]) -> list[Duplicate]:
    """A copy of a row that turned out to be near a third one goes for the third's sake."""
    gone = {duplicate.row: duplicate for duplicate in removed}
    return [
        Duplicate(d.row, gone[d.kept].kept, gone[d.kept].similarity) if d.kept in gone else d
        for d in removed
    ]


def clusters(texts: Sequence[str], near: Near | None) -> list[int]:
    """For each text the first of those that it is tied to by a chain of duplicates."""
    parent = list(range(len(texts)))
    first: dict[bytes, int] = {}
    for row in range(len(texts)):
        parent[row] = first.setdefault(_digest(texts[row]), row)
    if near is not None:
        distinct = list(first.values())
        index = _Index(texts, distinct, near)
        for row in distinct:
            for other, _ in index.near(row, apart=parent):
                unite(parent, row, other)
            index.add(row)
    return [root(parent, row) for row in range(len(texts))]


def root(parent: list[int], row: int) -> int:
    """The first row of a cluster, in a forest of parents; shortens the way there."""
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


def unite(parent: list[int], one: int, other: int) -> None:
    """Make two clusters one."""
    one, other = root(parent, one), root(parent, other)
    parent[max(one, other)] = min(one, other)


class _Index:
    """The rows added so far, by the bands of their signatures."""

    def __init__(self, texts: Sequence[str], rows: Sequence[int], near: Near) -> None:
        self._threshold = near.threshold
        self._buckets: dict[int, list[int]] = {}
        self._sizes = np.zeros(len(texts), np.uint32)
        self._keys = _band_keys(texts, rows, near, self._sizes)
        # Few, for the shingles of a long text take a hundred times its room.
        self._shingles = lru_cache(maxsize=128)(lambda row: shingles(texts[row], near.shingle))

    def add(self, row: int) -> None:
        """Let later rows find this one."""
        for key in self._keys.get(row, ()):
            self._buckets.setdefault(key, []).append(row)

    def near(self, row: int, apart: list[int] | None = None) -> Iterator[tuple[int, float]]:
        """Added rows near `row`, with their similarity, as they were added.

        With `apart`, a forest of clusters, only rows of other clusters.
        """
        seen: set[int] = set()
        for key in self._keys.get(row, ()):
            for other in self._buckets.get(key, ()):
                if other in seen:
                    continue
                seen.add(other)
                if apart is not None and root(apart, other) == root(apart, row):
                    continue
                # Sets whose sizes differ by more cannot be that similar.
                least, most = sorted((int(self._sizes[row]), int(self._sizes[other])))
                if least < self._threshold * most:
                    continue
                similarity = jaccard(self._shingles(row), self._shingles(other))
                if similarity >= self._threshold:
                    yield other, similarity


def _band_keys(
    texts: Sequence[str], rows: Sequence[int], near: Near, sizes: NDArray[np.uint32]
) -> dict[int, tuple[int, ...]]:
    """Of rows that share a key with another, the keys they share.

    Most rows share none and cost no more than a line of the table: 8 bytes a band.
    """
    minhash = load("rensa", "dedup").RMinHash
    table = np.empty((len(rows), near.bands), np.uint64)
    for line, row in zip(table, rows, strict=True):
        runs = shingles(texts[row], near.shingle)
        sizes[row] = len(runs)
        signature = minhash(num_perm=near.permutations, seed=_SEED)
        signature.update(list(runs))
        line[:] = _band_hashes(np.array(signature.digest(), np.uint64), near)
    shared: dict[int, list[int]] = {}
    for column in table.T:
        _, group, count = np.unique(column, return_inverse=True, return_counts=True)
        for place in np.flatnonzero(count[group] > 1):
            shared.setdefault(rows[int(place)], []).append(int(column[place]))
    return {row: tuple(keys) for row, keys in shared.items()}


def _band_hashes(signature: NDArray[np.uint64], near: Near) -> NDArray[np.uint64]:
    """One number of 64 bits a band, which also tells which band it is."""
    bands = signature[: near.bands * near.band].reshape(near.bands, near.band)
    hashes = np.arange(1, near.bands + 1, dtype=np.uint64)
    for places in bands.T:  # FNV's scheme on whole numbers; products wrap around
        hashes = (hashes ^ places) * np.uint64(0x100000001B3)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
