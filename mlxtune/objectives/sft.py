"""Supervised fine-tuning: the cross-entropy of answers, a mean over their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxtune.data.pack import Batch
from mlxtune.objectives.base import Objective, Sums, Targets


@dataclass(frozen=True)
class SFT(Objective):
    """`objective = "sft"`."""

    name: ClassVar[str] = "sft"

    @property
    def units(self) -> tuple[str, ...]:
        """Tokens that are trained."""
        return ("tokens",)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Tokens, by their weight."""
        return {"tokens": batch.weight}

    def __call__(self, targets: Targets) -> tuple[Sums, Sums]:
        """The weighted sum of all losses."""
        return {"tokens": targets.cross_entropy()}, {}
