"""Tables of objectives: a recipe has the one that is named like its `objective`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mlxtune.recipe.section import Section


class DpoSection(Section):
    """`[dpo]`: direct preference optimization.

    `beta` says how far the policy may move from the reference: less is farther. `loss_type` is
    `sigmoid` (DPO), `sigmoid_norm` (by token), `ipo`, `hinge` (SLiC) or `apo_zero`.
    `label_smoothing`, of the two sigmoids, is the share of pairs whose sides are thought to be
    swapped (conservative DPO). `sft_weight` adds that many times the loss of the chosen answers,
    a mean over their tokens (RPO).
    """

    beta: float = Field(default=0.1, gt=0)
    loss_type: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "apo_zero"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    sft_weight: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _smooths_a_sigmoid(self) -> DpoSection:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "sigmoid_norm"):
            raise ValueError(
                f"label_smoothing goes with sigmoid and sigmoid_norm, not {self.loss_type}"
            )
        return self


TABLES: dict[str, type[Section]] = {"dpo": DpoSection}

# What other defaults than those of supervised fine-tuning an objective has, by section. Rates are
# lower: what is trained is a difference of log-probabilities, which moves far with little.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {"train": {"learning_rate": 5e-6, "epochs": 1.0}},
}

# What the figures of an objective, and its `loss`, say to someone who sees them for the first time.
# By objective; here, where a report finds them without MLX.
MEANINGS: dict[str, dict[str, str]] = {
    "dpo": {
        "loss": "A mean over pairs: how far chosen answers are from being preferred to rejected "
        "ones as much as beta asks for. 0.693 before the first step of a sigmoid loss.",
        "rewards/accuracies": "The share of pairs whose chosen answer has the higher reward.",
        "rewards/margins": "How far the rewards of both sides are apart.",
        "rewards/chosen": "Beta times the log-ratio of the model to itself before training. It is "
        "common that this falls: the loss asks for a difference alone, and lowering the rejected "
        "answer lowers its neighbours too. It is no fault as long as held-out accuracy rises and "
        "answers stay good. If they get worse: dpo.sft_weight = 0.5 to 1 keeps chosen answers "
        'likely, loss_type = "apo_zero" raises them by themselves, a larger beta or a lower rate '
        "holds the model back.",
        "rewards/rejected": "The same of rejected answers, which should fall.",
        "logps/chosen": "Log-probability of chosen answers, summed over their tokens.",
        "logps/rejected": "Log-probability of rejected answers, summed over their tokens.",
    },
}
