"""Optimizers by their recipe names."""

from __future__ import annotations

import mlx.nn as nn
import mlx.optimizers


def make_optimizer(name: str, model: nn.Module, *, weight_decay: float) -> mlx.optimizers.Optimizer:
    """An optimizer with its state ready for the model's trainable parameters.

    `adamw`: Loshchilov & Hutter 2017 (arXiv:1711.05101), betas 0.9 and 0.999, eps 1e-8,
    with bias correction as in the paper. The learning rate is given at each step.

    Raises:
        ValueError: no optimizer has that name.
    """
    if name != "adamw":
        raise ValueError(f"no optimizer is called {name!r}")
    optimizer = mlx.optimizers.AdamW(0.0, weight_decay=weight_decay, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    return optimizer
