"""Direct preference optimization: chosen answers above rejected ones, next to a reference.

The reference is the model that training begins with: its log-probabilities are computed once,
before the first step, and kept with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxtune.data.pack import Batch
from mlxtune.losses import preference
from mlxtune.losses.preference import Pairs
from mlxtune.objectives.base import Objective, Sums, Targets
from mlxtune.recipe.objectives import DpoSection

_SMOOTHED = {"sigmoid": preference.sigmoid, "sigmoid_norm": preference.sigmoid_norm}
_PLAIN = {"ipo": preference.ipo, "hinge": preference.hinge, "apo_zero": preference.apo_zero}


@dataclass(frozen=True)
class DPO(Objective):
    """`objective = "dpo"`, with the settings of `[dpo]`.

    Its figures are means over pairs. A reward is beta times the log-ratio of policy and reference,
    summed over an answer; a pair is accurate where the chosen answer has the higher one.
    """

    settings: DpoSection = field(default_factory=DpoSection)

    name: ClassVar[str] = "dpo"
    form: ClassVar[str] = "pairs"
    figures: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        ),
        "pairs",
    )
    shown: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "rewards/margins")
    compares: ClassVar[bool] = True

    @property
    def units(self) -> tuple[str, ...]:
        """Pairs; tokens of chosen answers too, where their loss is added."""
        return ("pairs", *["chosen tokens"] * bool(self.settings.sft_weight))

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs, and tokens of chosen answers."""
        chosen = batch.owners % 2 == 0
        weight = float(batch.weights[chosen].sum(dtype=np.float64))
        return {"pairs": float(batch.filled_groups), "chosen tokens": weight}

    def arrays(self, batch: Batch) -> dict[str, Any]:
        """Whose each target is, the reference's log-probabilities, and which pairs there are."""
        there = (np.arange(batch.groups) < batch.filled_groups).astype(np.float32)
        return {"owners": batch.owners, "references": batch.references, "pairs": there}

    def __call__(self, targets: Targets) -> tuple[Sums, Sums]:
        """The loss of all pairs, and with `sft_weight` that of chosen answers (RPO)."""
        there = targets.arrays["pairs"]
        count, beta = there.shape[0], self.settings.beta
        policy = targets.sums(-targets.losses(), count, 2)
        reference = targets.sums(targets.arrays["references"], count, 2)
        ones = mx.ones_like(targets.arrays["weights"])
        # Of an empty pair there is nothing to divide.
        tokens = mx.maximum(targets.sums(ones, count, 2), 1)
        ratios = policy - reference
        pairs = Pairs(ratios[:, 0], ratios[:, 1], tokens[:, 0], tokens[:, 1])
        losses = {"pairs": (there * self._function()(pairs, beta)).sum()}
        if self.settings.sft_weight:
            losses["chosen tokens"] = -self.settings.sft_weight * policy[:, 0].sum()
        rewards = beta * ratios
        margins = rewards[:, 0] - rewards[:, 1]
        return losses, {
            "rewards/chosen": rewards[:, 0].sum(),
            "rewards/rejected": rewards[:, 1].sum(),
            "rewards/margins": margins.sum(),
            "rewards/accuracies": (margins > 0).astype(mx.float32).sum(),
            "logps/chosen": policy[:, 0].sum(),
            "logps/rejected": policy[:, 1].sum(),
        }

    def _function(self) -> Callable[[Pairs, float], mx.array]:
        name = self.settings.loss_type
        if name in _PLAIN:
            return _PLAIN[name]
        return partial(_SMOOTHED[name], smoothing=self.settings.label_smoothing)
