"""Learning rate by step."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    kind: str,
    decay_steps: int = 0,
) -> float:
    """The rate for step `step`, counted from 0.

    Linear warmup from peak / warmup_steps, then `constant`, `linear` to zero, `cosine` to
    zero (Loshchilov & Hutter 2016, arXiv:1608.03983), or `warmup_stable_decay`: constant,
    and linear to zero over the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    if kind == "warmup_stable_decay":
        left = total_steps - step
        return peak * min(1.0, left / max(1, decay_steps))
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
