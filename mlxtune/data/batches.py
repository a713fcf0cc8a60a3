"""The order in which groups of samples are seen: shuffled, repeatable, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlxtune.data.groups import Group, samples_of, tokens_of
from mlxtune.data.pack import Batch, common_prefix
from mlxtune.data.passes import Layout, passes
from mlxtune.data.render import Sample
from mlxtune.data.store import Groups

Order = npt.NDArray[np.int32]

# To find a run's largest pass so many samples are looked through, a second's work, and so many
# steps laid out, another's.
_LOOKED_THROUGH, _LAID_OUT = 1 << 21, 128


@dataclass(frozen=True)
class Part:
    """Samples of one source, and how often each is seen in an epoch of the run."""

    samples: Sequence[Sample]
    epochs: float = 1.0

    @cached_property
    def groups(self) -> Groups:
        """The samples by group."""
        return Groups(self.samples)

    @property
    def per_epoch(self) -> int:
        """Groups that an epoch takes from it."""
        return max(1, round(self.epochs * len(self.groups)))


@dataclass(frozen=True)
class Plan:
    """How many steps there are, and what each step sees.

    The order of an epoch depends on the seed and its number alone, so step N sees the
    same records whether or not the run was interrupted before it.

    Attributes:
        parts: everything that is trained on.
        batch_size: groups to a forward pass, at most; a sample by itself is one.
        accumulation: times that many groups are a step.
        seed: of the shuffle.
        layout: how a step's samples are laid out.
        rank, ranks: of several workers, which one this is: the order is the same for all,
            and each sees its share of every step.
    """

    parts: Sequence[Part]
    batch_size: int
    accumulation: int
    seed: int
    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    ranks: int = 1

    @property
    def groups_per_step(self) -> int:
        """Groups that all workers together see in a step."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        """Steps to an epoch; the last may be smaller."""
        total = sum(part.per_epoch for part in self.parts)
        return -(-total // self.groups_per_step)

    def total_steps(self, *, epochs: float, max_steps: int | None) -> int:
        """Steps of a run: `max_steps` if given, else of that many epochs."""
        if max_steps is not None:
            return max_steps
        return max(1, round(epochs * self.steps_per_epoch))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This worker's batches of each step from `start` to `stop`, counted from 0.

        There are none where a small last step has fewer groups than there are workers.
        """
        return self._laid_out(range(start, stop))

    def _laid_out(self, numbers: Iterable[int]) -> Iterator[list[Batch]]:
        order: Order = np.empty((0, 2), np.int32)
        current = -1
        for step in numbers:
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order, current = self._order(epoch), epoch
            seen = order[within * self.groups_per_step :][: self.groups_per_step]
            own = seen[self.rank :: self.ranks]
            chosen = [s for part, at in own for s in self.parts[part].groups[int(at)]]
            yield passes(chosen, self.batch_size, self.layout)

    def largest_of_run(self, steps: int) -> Batch:
        """The largest pass that any worker has in the first so many steps.

        Where they are many, those are laid out in which it is expected. Of a run that sees
        more groups than one would look through it is `largest`.
        """
        if steps * self.groups_per_step > _LOOKED_THROUGH:
            return self.largest()
        expected = self._expected(steps)
        chosen = np.argsort(-expected, axis=None, kind="stable")[:_LAID_OUT]
        found = [
            batch
            for rank in range(self.ranks)
            for step in replace(self, rank=rank)._laid_out(
                sorted(int(at) // self.ranks for at in chosen if at % self.ranks == rank)
            )
            for batch in step
        ]
        return max(found, key=_tokens_of)

    def _expected(self, steps: int) -> npt.NDArray[np.float64]:
        """(steps, ranks): about how many tokens the largest pass of each has."""
        lengths = [part.groups.lengths() for part in self.parts]
        starts = np.cumsum([0, *map(len, lengths)])
        each, size = np.concatenate(lengths), self.groups_per_step
        rows = []
        for epoch in range(-(-steps // self.steps_per_epoch)):
            order = self._order(epoch)
            seen = np.zeros(self.steps_per_epoch * size, np.int64)
            seen[: len(order)] = each[starts[order[:, 0]] + order[:, 1]]
            rows.append(seen.reshape(-1, size))
        together = np.concatenate(rows)[:steps]
        shares = [together[:, rank :: self.ranks] for rank in range(self.ranks)]
        return np.stack([largest_expected(s, self.batch_size, self.layout) for s in shares], axis=1)

    def largest(self) -> Batch:
        """The largest pass of a step of the longest groups that there are.

        A step of shorter ones may have a larger one, where the longest are divided into
        several passes. If the longest begin alike, one that begins otherwise may take the place
        of one of them, so that less is computed once for all.
        """
        count = self.batch_size * self.accumulation
        lengths = [part.groups.lengths() for part in self.parts]
        places = [(p, at) for p, own in enumerate(lengths) for at in _longest(own, count)]
        places.sort(key=lambda place: -lengths[place[0]][place[1]])
        chosen = [self.parts[part].groups[at] for part, at in places[:count]]
        found = self._largest_of(chosen)
        if found.prefix and (other := self._parting(chosen)) is not None:
            parted = self._largest_of([*chosen[:-1], other])
            found = max(found, parted, key=_tokens_of)
        return found

    def _largest_of(self, groups: list[Group]) -> Batch:
        found = passes(samples_of(groups), self.batch_size, self.layout)
        return max(found, key=_tokens_of)

    def _parting(self, chosen: list[Group]) -> Group | None:
        """Of all groups the one that, in the place of the last of these, makes most tokens."""
        samples = samples_of(chosen)
        shared, others = common_prefix(samples), len(samples) - len(chosen[-1])
        begin, last = samples[0].tokens[:shared], tokens_of(chosen[-1])
        best, found = 0, None
        for group in (group for part in self.parts for group in part.groups):
            first = group[0].tokens
            alike = begin[: len(first)] == first[:shared]
            common = len(alike) if alike.all() else int(np.argmin(alike))
            gain = tokens_of(group) - last + others * (shared - common)
            if gain > best:
                best, found = gain, group
        return found

    def _order(self, epoch: int) -> Order:
        """(part, group of it) of an epoch, in the order in which they are seen."""
        picks = [
            np.stack([np.full(part.per_epoch, number, np.int32), self._picks(part, number, epoch)])
            for number, part in enumerate(self.parts)
        ]
        together = np.concatenate(picks, axis=1).T
        return together[np.random.default_rng([self.seed, epoch]).permutation(len(together))]

    def _picks(self, part: Part, number: int, epoch: int) -> npt.NDArray[np.int32]:
        """What an epoch takes from one part: the next stretch of its shuffled rounds.

        So at no time was a group seen two times more than another.
        """
        size, count = len(part.groups), part.per_epoch
        if count == size:
            return np.arange(size, dtype=np.int32)
        start, stop = epoch * count, (epoch + 1) * count
        rounds = [
            np.random.default_rng([self.seed, number, turn]).permutation(size).astype(np.int32)
            for turn in range(start // size, -(-stop // size))
        ]
        return np.concatenate(rounds)[start % size :][:count]


def largest_expected(
    lengths: npt.NDArray[np.int64], batch_size: int, layout: Layout
) -> npt.NDArray[np.float64]:
    """About how many tokens the largest pass of each step has, without laying it out.

    As if samples of like length came together, in the number of passes that costs least.

    Args:
        lengths: (steps, samples), 0 where there is none.
        batch_size, layout: as of `passes`.
    """
    count = lengths.shape[1]
    ordered = -np.sort(-lengths, axis=1)
    largest, least = np.zeros(len(lengths)), np.full(len(lengths), np.inf)
    fewest = -(-count // batch_size)
    for factor in (1, 2, 4, 8) if layout.packing else (1,):
        size = min(batch_size, -(-count // min(factor * fewest, count)))
        groups = np.pad(ordered, ((0, 0), (0, -count % size))).reshape(len(lengths), -1, size)
        longest = groups[:, :, 0]
        tokens = groups.sum(axis=2) if layout.packing else size * longest
        # A key costs about a thousandth of a token, as in `grid_of`.
        cost = (tokens * (1 + longest / 1000) + layout.pass_cost * (longest > 0)).sum(axis=1)
        largest = np.where(cost < least, tokens.max(axis=1), largest)
        least = np.minimum(cost, least)
    return largest


def _tokens_of(batch: Batch) -> int:
    """Of the grid, on which a pass's memory hangs."""
    return batch.tokens.size


def _longest(lengths: npt.NDArray[np.int64], count: int) -> list[int]:
    """Where the `count` largest lengths are."""
    return [int(at) for at in np.argsort(-lengths, kind="stable")[:count]]
