"""Gradient checkpointing: recompute a block's activations instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def checkpoint_blocks(model: nn.Module) -> None:
    """Make every block of this model keep only its input for the backward pass.

    (Chen et al. 2016, arXiv:1604.06174.) The instances get a class of their own, derived
    from theirs; mlx-lm's classes stay as they are.
    """
    for block in model.layers:
        original = type(block)
        block.__class__ = type(
            f"Checkpointed{original.__name__}",
            (original,),
            {"__call__": _recomputing(original.__call__)},
        )


def _recomputing(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        # Masks and caches carry no gradient, so they may be captured; parameters and
        # the input have to be arguments for their gradients to be found.
        def block(parameters: Any, hidden: mx.array) -> Any:
            self.update(parameters)
            return call(self, hidden, *args, **kwargs)

        return mx.checkpoint(block)(self.trainable_parameters(), x)

    return run
