"""Optimizers by their recipe names, and the update that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_map_with_path

Optimizer = mlx.optimizers.Optimizer


def make_optimizer(name: str, model: nn.Module, *, weight_decay: float) -> Optimizer:
    """An optimizer with its state ready for the model's trainable parameters.

    The learning rate is given at each step. Decay is decoupled (a share of the weights,
    times the learning rate) in all but `muon` and `sgd`, where it is added to the gradient.

    `adamw`: Loshchilov & Hutter 2017 (arXiv:1711.05101), betas 0.9 and 0.999, eps 1e-8,
    with bias correction as in the paper. `adafactor`: Shazeer & Stern 2018
    (arXiv:1804.04235), second moments of a matrix kept as one row and one column, no
    relative step. `lion`: Chen et al. 2023 (arXiv:2302.06675), betas 0.9 and 0.99; it wants
    a tenth of AdamW's learning rate. `muon`: Jordan et al. 2024, momentum 0.95, updates made
    orthogonal by Newton-Schulz iterations. `sgd`: momentum 0.9.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name not in _MAKERS:
        raise ValueError(f"no optimizer is called {name!r}")
    optimizer = _MAKERS[name](weight_decay)
    optimizer.init(model.trainable_parameters())
    return optimizer


_MAKERS: dict[str, Callable[[float], Optimizer]] = {
    "adamw": lambda decay: mlx.optimizers.AdamW(0.0, weight_decay=decay, bias_correction=True),
    "adafactor": lambda decay: mlx.optimizers.Adafactor(
        0.0, weight_decay=decay, relative_step=False, scale_parameter=False
    ),
    "lion": lambda decay: mlx.optimizers.Lion(0.0, weight_decay=decay),
    "muon": lambda decay: mlx.optimizers.Muon(0.0, weight_decay=decay),
    "sgd": lambda decay: mlx.optimizers.SGD(0.0, momentum=0.9, weight_decay=decay),
}


def update(
    optimizer: Optimizer, model: nn.Module, gradients: Any, *, lora_plus_ratio: float = 1.0
) -> None:
    """Apply the gradients to the model.

    With `lora_plus_ratio` the B matrices of adapters learn that many times faster than the
    A matrices (LoRA+, Hayou et al. 2024, arXiv:2402.12354). All optimizers here change a
    weight in proportion to the learning rate, so the change is scaled instead of it.
    """
    updated = optimizer.apply_gradients(gradients, model)
    if lora_plus_ratio != 1:
        before = model.trainable_parameters()

        def faster(path: str, new: mx.array, old: mx.array) -> mx.array:
            return old + lora_plus_ratio * (new - old) if path.endswith(".lora_b") else new

        updated = tree_map_with_path(faster, updated, before)
    model.update(updated)
