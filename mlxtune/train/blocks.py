"""Gradient checkpointing: recompute a block's activations instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import checkpoint
from mlxtune.layers.lora import Dropout


def checkpoint_blocks(model: nn.Module, chosen: Iterable[int]) -> None:
    """Make these blocks of the model keep only their input for the backward pass.

    (Chen et al. 2016, arXiv:1604.06174.) The instances get a class of their own, derived
    from theirs; mlx-lm's classes stay as they are.
    """
    for number in chosen:
        block = model.layers[number]
        original = type(block)
        block.__class__ = type(
            f"Checkpointed{original.__name__}",
            (original,),
            {"__call__": _recomputing(original.__call__)},
        )


def _recomputing(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        dropouts = [m for m in self.modules() if isinstance(m, Dropout) and m.active]
        # Drawn here once, so that the second pass drops what the first has dropped.
        keys = [mx.random.randint(0, 2**31 - 1, (2,), dtype=mx.uint32) for _ in dropouts]

        # Whatever carries a gradient has to be an argument: parameters, the input, and in
        # some architectures keys and values of other blocks.
        def block(parameters: Any, given: Any, keys: list[mx.array]) -> Any:
            self.update(parameters)
            hidden, others, named = given
            for dropout, key in zip(dropouts, keys, strict=True):
                dropout.draw_with(mx.stop_gradient(key))
            try:
                return call(self, hidden, *others, **named)
            finally:
                for dropout in dropouts:
                    dropout.draw_with(None)

        return checkpoint(block)(self.trainable_parameters(), (x, args, kwargs), keys)

    return run
