"""What an objective is, and what it is given of a pass through the model.

Every objective is a function of per-token quantities of the targets (`Targets`). All else of
training is the same for all of them: accumulation, clipping, schedules, memory, checkpoints,
workers, what is logged and what is held out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from mlxtune.data.pack import Batch
from mlxtune.device import on_cpu
from mlxtune.layers.lora import fixed_dropout
from mlxtune.losses.cross_entropy import chunked_cross_entropy, weighted_cross_entropy
from mlxtune.losses.measures import CROSS_ENTROPY, Logits, Measure
from mlxtune.losses.per_token import Chunked, per_token
from mlxtune.models.heads import Head

Arrays = dict[str, mx.array]
Sums = dict[str, mx.array]

# Logits to a chunk: 16 MiB of float32. Smaller ones would cost more than they save: on a CPU
# a packed head is expanded for each, and MLX lays out some ten operations ahead.
LOGITS_AT_ONCE = 1 << 22
# But no fewer rows than that: all of the head is read for each chunk, so that half as many
# hidden states take three quarters of the time.
LEAST_ROWS = 64
# A GPU wants more to do at once; of that size no figure has been measured yet. The least rows are
# the same there: 64 rows of 262,144 float32 logits are 67 MB, and keep it busy.
_GPU_FACTOR = 4


def rows_to_a_chunk(vocabulary: int) -> int:
    """How many hidden states have their logits at once."""
    at_once = LOGITS_AT_ONCE * (1 if on_cpu() else _GPU_FACTOR)
    return max(LEAST_ROWS, at_once // max(1, vocabulary))


@dataclass(frozen=True)
class Targets:
    """The targets of a pass, and what predicts each of them.

    Attributes:
        states: hidden states (m, width), or logits (m, vocabulary) where there is no head.
        head: from hidden states to logits; None where the model's does not come apart.
        arrays: of the batch: `targets` int (m,), `weights` float32 (m,), and what the
            objective asked for with `Objective.arrays`.
        gradient: whether what comes of it will be differentiated.
    """

    states: mx.array
    head: Head | None
    arrays: Arrays
    gradient: bool

    def cross_entropy(self) -> mx.array:
        """The weighted sum of the targets' losses, a scalar: for a loss that is nothing else."""
        targets, weights = self.arrays["targets"], self.arrays["weights"]
        if self.head is None:
            return weighted_cross_entropy(self.states, targets, weights)
        trained = self.head.trained
        return chunked_cross_entropy(
            self.head.taking(trained) if trained else self.head,
            self.states,
            targets,
            weights,
            rows=rows_to_a_chunk(self.head.vocabulary),
            trained=list(trained.values()),
            gradient=self.gradient,
        )

    def losses(self) -> mx.array:
        """-log p of each target, nats: float32 (m,), differentiable in each of them."""
        [losses] = self.measured([CROSS_ENTROPY])
        return losses

    def measured(
        self, measures: Sequence[Measure], given: Sequence[mx.array] = ()
    ) -> tuple[mx.array, ...]:
        """Figures of the distribution that each target is drawn from: float32 (m,) each.

        Args:
            measures: see `losses.measures`.
            given: what they take beside the targets, arrays (m, …).
        """
        taken = [self.arrays["targets"], *given]
        if self.head is None:
            logits = Logits(self.states, sloped=False)
            return tuple(measure.value(logits, *taken) for measure in measures)
        trained, rows = self.head.trained, rows_to_a_chunk(self.head.vocabulary)
        head = self.head.taking(trained) if trained else self.head
        count = -(-self.states.shape[0] // rows)
        drawing = fixed_dropout(self.head.module, count)
        chunked = Chunked(head, rows, list(trained.values()), drawing)
        return per_token(chunked, self.states, measures, taken, gradient=self.gradient)

    def sums(self, values: mx.array, groups: int, sides: int) -> mx.array:
        """Weighted sums of values (m,) over each sample's targets: (groups, sides).

        By a product, which adds up in the same order whatever the device.
        """
        slots = mx.arange(groups * sides)[:, None] == self.arrays["owners"]
        weights = slots.astype(mx.float32) * self.arrays["weights"]
        return (weights @ values[:, None]).reshape(groups, sides)


@dataclass(frozen=True)
class Best:
    """Which held-out figure says which adapter is the best.

    Attributes:
        figure: its name; `loss` is that of the objective.
        higher: whether more of it is better.
    """

    figure: str = "loss"
    higher: bool = False

    def better(self, value: float, before: float | None) -> bool:
        """Whether a value is better than the best so far."""
        if before is None:
            return True
        return value > before if self.higher else value < before


class Objective(ABC):
    """What is trained for: a frozen dataclass of its settings.

    Attributes:
        name: as a recipe has it.
        form: what becomes of a record: `answers` are samples by themselves, `pairs` a group
            of a chosen and a rejected one.
        figures: names of what `__call__` sums up beside the loss, and which of `counts`
            each is divided by.
        shown: those of them that a line in the terminal has room for.
        best: which held-out figure decides.
        compares: whether it needs the log-probabilities of a reference model, which are
            computed before the first step.
        draws: whether the policy itself makes a step's batch, so that none is made ahead.
    """

    name: ClassVar[str]
    form: ClassVar[str] = "answers"
    figures: ClassVar[Mapping[str, str]] = {}
    shown: ClassVar[tuple[str, ...]] = ()
    best: ClassVar[Best] = Best()
    compares: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    @property
    @abstractmethod
    def units(self) -> tuple[str, ...]:
        """Which of `counts` the parts of its loss are divided by, first that of a step."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, float]:
        """How much of each unit a batch has; they are summed over a step and its workers."""

    def arrays(self, _batch: Batch) -> dict[str, Any]:
        """Arrays that it needs of a batch beside `targets` and `weights`, as NumPy's."""
        return {}

    @abstractmethod
    def __call__(self, targets: Targets) -> tuple[Sums, Sums]:
        """Of a batch, the sums that its loss is made of, and the sums of its figures.

        The loss is the sum of the first, each divided by those of `counts` that it is named
        after, counted over the whole step.
        """
