"""Split an mlx-lm model into its body and its output head.

Training needs logits only where there is a loss, so hidden states are gathered between
the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtune.arrays import flat, scalar
from mlxtune.gpu_errors import fault_of

Body = Callable[..., mx.array]
Finish = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Head:
    """Hidden states (n, width) to logits (n, vocabulary).

    Attributes:
        module: that holds the weights: an output layer, or the embedding if they are tied.
        project: the product with them.
        finish: what the architecture does to its logits after that.
    """

    module: nn.Module
    project: Callable[[mx.array], mx.array]
    finish: Finish

    @property
    def vocabulary(self) -> int:
        """How many logits a hidden state has."""
        base: Any = getattr(self.module, "linear", self.module)  # of one with an adapter
        return int(base.weight.shape[0])

    @property
    def trained(self) -> dict[str, mx.array]:
        """Those of its weights that are trained."""
        return flat(self.module.trainable_parameters())

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.finish(self.project(hidden))

    def taking(self, names: Iterable[str]) -> Callable[..., mx.array]:
        """The same as a function of the hidden states and of the weights so named."""

        def call(hidden: mx.array, *arrays: mx.array) -> mx.array:
            before = self.trained
            self.module.update(tree_unflatten(list(zip(names, arrays, strict=True))))
            try:
                return self(hidden)
            finally:
                self.module.update(tree_unflatten(list(before.items())))

        return call


def language_model(model: nn.Module) -> nn.Module:
    """What of a model writes text: itself, or a part where it also sees or hears."""
    while isinstance(inner := getattr(model, "language_model", None), nn.Module):
        model = inner
    return model


def split_head(model: nn.Module, *, proven: bool = False) -> tuple[Body, Head] | None:
    """`body(tokens, cache=…)` and `head(hidden)` with model = head after body.

    Args:
        model: of mlx-lm.
        proven: it is known that another model of this architecture comes apart, and nothing
            is computed.

    Returns:
        The two, or None if this architecture does not come apart in the known way; that
        is checked on two tokens, so a scaled or capped head is never left out.
    """
    inner = language_model(model)
    body = getattr(inner, "model", None)
    if not isinstance(body, nn.Module):
        return None
    embedding: Any = getattr(body, "embed_tokens", None)
    if "lm_head" in inner:
        head = Head(inner.lm_head, inner.lm_head, _final_form(inner))
    elif hasattr(embedding, "as_linear"):
        head = Head(embedding, embedding.as_linear, _final_form(inner))
    else:
        return None
    if proven:
        return body, head
    probe = mx.array([[1, 2]])
    with evaluating(model):  # dropout would tell two equal passes apart
        try:
            got, want = head(body(probe)), model(probe)
            error = scalar(mx.abs(got - want).max() / mx.abs(want).max())
        except Exception as problem:  # an architecture of another form
            if fault_of(problem) is not None:
                raise
            return None
    # The two compute the same in the same order; a cap of 30 on small logits shows in the
    # fourth digit.
    return (body, head) if error < (1e-5 if want.dtype == mx.float32 else 1e-2) else None


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode (no dropout) for a while; each module's own mode comes back."""
    return _in_mode(model, False)


def training(model: nn.Module) -> AbstractContextManager[None]:
    """Training mode for a while, likewise."""
    return _in_mode(model, True)


@contextmanager
def _in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    others = [module for module in model.modules() if module.training != mode]
    model.train(mode)
    try:
        yield
    finally:
        for module in others:
            module._set_training_mode(not mode)  # `train` would reach the modules below too


def _final_form(model: nn.Module) -> Finish:
    """What an architecture does to its logits after the projection."""
    args = getattr(model, "args", None)
    if cap := getattr(args, "final_logit_softcapping", None):
        return lambda logits: mx.tanh(logits / cap) * cap
    if divisor := getattr(args, "logits_scaling", None):
        return lambda logits: logits / divisor
    if factor := getattr(args, "logit_scale", None):
        return lambda logits: logits * factor
    return lambda logits: logits
