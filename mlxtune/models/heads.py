"""Split an mlx-lm model into its body and its output head.

Training needs logits only where there is a loss, so hidden states are gathered between
the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Body = Callable[..., mx.array]
Head = Callable[[mx.array], mx.array]


def split_head(model: nn.Module) -> tuple[Body, Head] | None:
    """`body(tokens, cache=…)` and `head(hidden)` with model = head after body.

    Returns:
        The two, or None if this architecture does not come apart in the known way; that
        is checked on two tokens, so a scaled or capped head is never left out.
    """
    body = getattr(model, "model", None)
    if not isinstance(body, nn.Module):
        return None
    project: Any
    if "lm_head" in model:
        project = model.lm_head
    elif hasattr(getattr(body, "embed_tokens", None), "as_linear"):
        project = body.embed_tokens.as_linear
    else:
        return None
    finish = _final_form(model)

    def head(hidden: mx.array) -> mx.array:
        return finish(project(hidden))

    probe = mx.array([[1, 2]])
    with evaluating(model):  # dropout would tell two equal passes apart
        try:
            same = mx.allclose(head(body(probe)), model(probe), rtol=1e-3, atol=1e-3).item()
        except Exception:  # an architecture of another form
            return None
    return (body, head) if same else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for a while; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module._set_training_mode(True)  # `train` would reach the modules below too


def _final_form(model: nn.Module) -> Head:
    """What an architecture does to its logits after the projection."""
    args = getattr(model, "args", None)
    if cap := getattr(args, "final_logit_softcapping", None):
        return lambda logits: mx.tanh(logits / cap) * cap
    if divisor := getattr(args, "logits_scaling", None):
        return lambda logits: logits / divisor
    if factor := getattr(args, "logit_scale", None):
        return lambda logits: logits * factor
    return lambda logits: logits
