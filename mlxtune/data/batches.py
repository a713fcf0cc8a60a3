"""The order in which samples are seen: shuffled, repeatable, resumable anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlxtune.data.pack import Batch, pack, pad
from mlxtune.data.render import Sample


@dataclass(frozen=True)
class Plan:
    """How many steps there are, and what each step sees.

    The order of an epoch depends on the seed and its number alone, so step N sees the
    same records whether or not the run was interrupted before it.

    Attributes:
        samples: everything that is trained on.
        batch_size: samples to a forward pass.
        accumulation: forward passes to a step.
        seed: of the shuffle.
        packing: pack the samples of a batch instead of padding them.
    """

    samples: Sequence[Sample]
    batch_size: int
    accumulation: int
    seed: int
    packing: bool

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every sample once; the last may be smaller."""
        return -(-len(self.samples) // (self.batch_size * self.accumulation))

    def total_steps(self, *, epochs: float, max_steps: int | None) -> int:
        """Steps of a run: `max_steps` if given, else of that many epochs."""
        if max_steps is not None:
            return max_steps
        return max(1, round(epochs * self.steps_per_epoch))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The batches of each step from `start` to `stop`, counted from 0."""
        order: Sequence[int] = ()
        current = -1
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order, current = self._order(epoch), epoch
            group = self.batch_size * self.accumulation
            chosen = [self.samples[i] for i in order[within * group : (within + 1) * group]]
            yield list(batched(chosen, self.batch_size, packing=self.packing))

    def _order(self, epoch: int) -> Sequence[int]:
        generator = np.random.default_rng([self.seed, epoch])
        return [int(i) for i in generator.permutation(len(self.samples))]


def batched(samples: Sequence[Sample], batch_size: int, *, packing: bool) -> Iterator[Batch]:
    """Samples in order, `batch_size` to a batch."""
    lay_out: Callable[[Sequence[Sample]], Batch] = pack if packing else pad
    for start in range(0, len(samples), batch_size):
        yield lay_out(samples[start : start + batch_size])
