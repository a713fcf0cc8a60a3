"""What every kind of adapter layer has in common, whatever it wraps."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import custom_gradient


class Adapter(nn.Module):
    """A frozen layer and the few arrays trained beside it.

    Saving, fusing and counting ask for nothing more than this, so a new kind of adapter
    is a new subclass and nothing else.

    Attributes:
        kind: name of the method, as mlx-lm's `fine_tune_type` has it.
        linear: the frozen layer, under the name that mlx-lm gives it.
        scale: factor on the update.
        off: whether it computes what the frozen layer computes, see `without_adapters`.
    """

    kind: ClassVar[str]
    linear: Any  # each kind wraps layers of its own
    scale: float
    off: bool = False

    @property
    def rank(self) -> int:
        """Width of the update."""
        raise NotImplementedError

    def in_turn(self, x: mx.array) -> tuple[mx.array, ...]:
        """The input and what is trained, as they are; in training `gradients_in_turn`."""
        own = tuple(self[name] for name in self.trained())
        return gradients_in_turn(x, *own) if self.training else (x, *own)

    def trained(self) -> tuple[str, ...]:
        """Names of the arrays that are trained, which are all that is saved of it."""
        raise NotImplementedError

    def fused_weight(self) -> mx.array:
        """The weight in float32, in the shape of the base's own, that computes the same."""
        raise NotImplementedError

    def fuse(self) -> nn.Module:
        """A plain float32 layer that computes what this one computes."""
        raise NotImplementedError


@contextmanager
def without_adapters(model: nn.Module, *, but: Collection[str] = ()) -> Iterator[None]:
    """The model as it is without its adapters, for a while.

    They are passed by, whatever they compute: a scale of zero is not enough for DoRA.

    Args:
        model: with adapters in place.
        but: paths of adapters that stay on.
    """
    modules = ((path, m) for path, m in model.named_modules() if path not in but)
    adapters = [module for _, module in modules if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.off = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.off = False


def _identity(*arrays: mx.array) -> tuple[mx.array, ...]:
    return arrays


def _parameters_first(_primals: Any, cotangents: Any, _results: Any) -> Any:
    below, *own = cotangents
    return (*mx.depends([below], own), *own)


# An input and parameters as they are. In the backward pass the parameters' gradients are
# computed before the pass goes on below: MLX computes first what is furthest from the results
# of a step, which these are nearest to, so it would keep what they are made of, the gradients
# of every layer's output, until the pass has reached the first layer.
gradients_in_turn = custom_gradient(_parameters_first)(_identity)
