"""Optimizers by their recipe names, and the update that they make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_unflatten

from mlxtune.arrays import flat
from mlxtune.errors import RecipeError
from mlxtune.recipe.schema import TrainSection
from mlxtune.train.adamw8bit import BLOCK, SMALLEST, AdamW8bit
from mlxtune.train.stacks import Arrays, Stack, joined, split, stacks_of

Optimizer = mlx.optimizers.Optimizer


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    weight_decay: float,
    beta1: float | None = None,
    beta2: float | None = None,
    epsilon: float | None = None,
    bias_correction: bool | None = None,
) -> Optimizer:
    """An optimizer with its state ready for the model's trainable parameters.

    The learning rate is given at each step. Decay is decoupled (a share of the weights,
    times the learning rate) in all but `muon` and `sgd`, where it is added to the gradient.
    It reaches matrices only: vectors (biases, norms, DoRA's magnitudes) are not decayed.

    `adamw`: Loshchilov & Hutter 2017 (arXiv:1711.05101), betas 0.9 and 0.999, eps 1e-8,
    with bias correction as in the paper. `adamw_8bit`: the same with moments of a byte
    each (Dettmers et al. 2021, arXiv:2110.02861). `adafactor`: Shazeer & Stern 2018
    (arXiv:1804.04235), second moments of a matrix kept as one row and one column, no
    relative step. `lion`: Chen et al. 2023 (arXiv:2302.06675), betas 0.9 and 0.99; it wants
    a tenth of AdamW's learning rate. `muon`: Jordan et al. 2024, momentum 0.95, updates made
    orthogonal by Newton-Schulz iterations. `sgd`: momentum 0.9.

    Args:
        name: one of these.
        model: with its adapters in place and all else frozen.
        weight_decay: 0 for none.
        beta1, beta2: other decay rates of the moments, of those that have two.
        epsilon: another term in the denominator of AdamW.
        bias_correction: whether AdamW makes up for moments that begin at zero. Without, as
            mlx-lm has it, its steps are several times longer at first.

    Raises:
        ValueError: no optimizer has that name, or it has no such betas or epsilon.
        RecipeError: it does not train the adapters of experts.
    """
    if name not in _MAKERS:
        raise ValueError(f"no optimizer is called {name!r}")
    options: dict[str, Any] = {}
    if name in _BETAS:
        usual1, usual2 = _BETAS[name]
        options["betas"] = [
            usual1 if beta1 is None else beta1,
            usual2 if beta2 is None else beta2,
        ]
    elif beta1 is not None or beta2 is not None:
        raise ValueError(f"{name} has no two betas")
    if bias_correction is not None:
        if name not in ("adamw", "adamw_8bit"):
            raise ValueError(f"{name} has no bias to correct")
        options["bias_correction"] = bias_correction
    if epsilon is not None:
        if name not in ("adamw", "adamw_8bit"):
            raise ValueError(f"{name} has no epsilon that can be chosen")
        options["eps"] = epsilon
    if name == "muon" and any(a.ndim > 2 for a in flat(model.trainable_parameters()).values()):
        # MLX's makes one matrix of all experts, and their updates orthogonal to each other.
        raise RecipeError(
            "muon is for matrices, and adapters of experts are many at once",
            where="train.optimizer",
            remedy="take adamw, or leave the experts out with lora.exclude_modules",
        )
    optimizer = _MAKERS[name](0.0, weight_decay=weight_decay, **options)
    parameters = flat(model.trainable_parameters())
    optimizer.init(tree_unflatten(list(joined(stacks_for(optimizer, model), parameters).items())))
    return optimizer


def stacks_for(optimizer: Optimizer, model: nn.Module) -> tuple[Stack, ...]:
    """Which trained parameters of a model an optimizer updates together.

    Optimizers that work on each weight alone do the same with parameters that are joined;
    AdamW in 8 bits too, where each begins a block of its own. Adafactor and Muon look at
    whole matrices, and are given each by itself.
    """
    parameters = flat(model.trainable_parameters())
    if isinstance(optimizer, AdamW8bit):
        return stacks_of(parameters, lambda a: a.size >= SMALLEST and a.size % BLOCK == 0)
    alone = isinstance(optimizer, mlx.optimizers.Adafactor | mlx.optimizers.Muon)
    return stacks_of(parameters, lambda _: not alone)


def optimizer_of(train: TrainSection, model: nn.Module) -> Optimizer:
    """The optimizer of a recipe, for the model's trainable parameters."""
    return make_optimizer(
        train.optimizer,
        model,
        weight_decay=train.weight_decay,
        beta1=train.adam_beta1,
        beta2=train.adam_beta2,
        epsilon=train.adam_epsilon,
        bias_correction=train.adam_bias_correction,
    )


class _DecaysMatrices(Optimizer):
    """Put before an optimizer's own class, it keeps decay from vectors and scalars."""

    weight_decay: float

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        decay = self.weight_decay
        self.weight_decay = decay if parameter.ndim >= 2 else 0.0
        try:
            updated: mx.array = super().apply_single(gradient, parameter, state)
        finally:
            self.weight_decay = decay
        return updated


def _matrices(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """An optimizer's class whose decay reaches matrices only."""
    return type(kind.__name__, (_DecaysMatrices, kind), {})


_MAKERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(_matrices(mlx.optimizers.AdamW), bias_correction=True),
    "adamw_8bit": partial(_matrices(AdamW8bit), bias_correction=True),
    "adafactor": partial(
        _matrices(mlx.optimizers.Adafactor), relative_step=False, scale_parameter=False
    ),
    "lion": _matrices(mlx.optimizers.Lion),
    "muon": _matrices(mlx.optimizers.Muon),
    "sgd": partial(_matrices(mlx.optimizers.SGD), momentum=0.9),
}

_BETAS = {"adamw": (0.9, 0.999), "adamw_8bit": (0.9, 0.999), "lion": (0.9, 0.99)}


def update(
    optimizer: Optimizer, model: nn.Module, gradients: Any, *, lora_plus_ratio: float = 1.0
) -> None:
    """Apply a tree of gradients to the model; see `update_joined`."""
    stacks = stacks_for(optimizer, model)
    own = joined(stacks, flat(gradients))
    update_joined(optimizer, model, stacks, own, lora_plus_ratio=lora_plus_ratio)


def update_joined(
    optimizer: Optimizer,
    model: nn.Module,
    stacks: tuple[Stack, ...],
    gradients: Arrays,
    *,
    lora_plus_ratio: float = 1.0,
) -> None:
    """Apply gradients to the model.

    With `lora_plus_ratio` the B matrices of adapters learn that many times faster than the
    A matrices (LoRA+, Hayou et al. 2024, arXiv:2402.12354). All optimizers here change a
    weight in proportion to the learning rate, so the change is scaled instead of it.

    Args:
        optimizer: of `make_optimizer`.
        model: that it was made for.
        stacks: `stacks_for` of the two.
        gradients: of each stack, by its name.
        lora_plus_ratio: 1 for one rate.
    """
    before = joined(stacks, flat(model.trainable_parameters()))
    trees = (tree_unflatten(list(arrays.items())) for arrays in (gradients, before))
    updated = flat(optimizer.apply_gradients(*trees))
    if lora_plus_ratio != 1:
        for stack in stacks:
            if stack.paths[0].endswith(".lora_b"):
                old = before[stack.name]
                updated[stack.name] = old + lora_plus_ratio * (updated[stack.name] - old)
    model.update(tree_unflatten(list(split(stacks, updated).items())))
