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
    min_ratio: float = 0.0,
) -> float:
    """The rate for step `step`, counted from 0.

    Linear warmup from peak / warmup_steps, then `constant`, `linear` to zero, `cosine` to
    zero (Loshchilov & Hutter 2016, arXiv:1608.03983), or `warmup_stable_decay`: constant,
    and linear to zero over the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395).
    With `min_ratio` these three end at that share of the peak instead of at zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "warmup_stable_decay":
        share = min(1.0, (total_steps - step) / max(1, decay_steps))
    elif kind == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1 - min_ratio) * share)
