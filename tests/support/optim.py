"""AdamW of the paper in NumPy, and the least that an optimizer takes for a model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

RATE, DECAY = 0.01, 0.1


class One:
    """A 'model' of one matrix."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = mx.array(weight)

    def trainable_parameters(self) -> dict[str, mx.array]:
        return {"weight": self.weight}

    def __getitem__(self, name: str) -> mx.array:
        return self.weight

    def get(self, name: str, default=None) -> mx.array:
        return self.weight

    def update(self, values: dict[str, mx.array]) -> None:
        self.weight = values["weight"]


def adamw(w, gradients):
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w * (1 - RATE * DECAY) - RATE * step
    return w
