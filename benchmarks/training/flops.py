"""Floating-point operations of a training pass, and the device's own rate."""

from __future__ import annotations

import math
import time

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import flat
from mlxtune.data.pack import Batch
from mlxtune.layers.inject import lora_layers
from mlxtune.layers.quantized import PackedLayer
from mlxtune.models.heads import split_head


class Flops:
    """Counts the products that training on some batches needs.

    A frozen projection is multiplied forward and for its input's gradient, an adapter's
    matrices also for their own; a checkpointed block goes forward once more.
    """

    def __init__(self, model: nn.Module, *, checkpointed: bool) -> None:
        bases = [layer.linear for _, layer in lora_layers(model)]
        self._weights = sum(
            math.prod(b.shape if isinstance(b, PackedLayer) else b.weight.shape) for b in bases
        )
        self._adapters = sum(a.size for a in flat(model.trainable_parameters()).values())
        args, parts = model.args, split_head(model)
        assert parts is not None
        self._head = parts[1].vocabulary * args.hidden_size
        width = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
        self._attention = len(model.layers) * args.num_attention_heads * 2 * width
        self._forwards = 2 if checkpointed else 1

    def __call__(self, batches: list[Batch]) -> float:
        """Operations of forward and backward passes."""
        total = 0.0
        for batch in batches:
            tokens = batch.tokens.size
            keys = tokens * (batch.prefix + batch.tokens.shape[1])
            total += 2 * tokens * self._weights * (self._forwards + 1)
            total += 2 * tokens * self._adapters * (self._forwards + 2)
            total += 2 * keys * self._attention * (self._forwards + 2)
            total += 2 * len(batch.targets) * self._head * 2
        return total

    def padded(self, rows: int, width: int) -> float:
        """Of a batch as mlx-lm computes it: each row whole, and logits of all tokens."""
        tokens = rows * (width - 1)
        total = 2.0 * tokens * self._weights * (self._forwards + 1)
        total += 2 * tokens * self._adapters * (self._forwards + 2)
        total += 2 * tokens * (width - 1) * self._attention * (self._forwards + 2)
        return total + 2 * tokens * self._head * 2

    def looked_at(self, rows: int, width: int) -> float:
        """Of the same by a model without adapters that is not trained: a forward pass."""
        tokens = rows * (width - 1)
        return 2.0 * tokens * (self._weights + (width - 1) * self._attention + self._head)


def matmul_rate(dtype: mx.Dtype = mx.float32) -> float:
    """The best rate of a large product on this device, in operations a second."""
    a, b = (mx.random.normal(shape).astype(dtype) for shape in ((1024, 2048), (2048, 2048)))
    mx.eval(a, b)
    best = 0.0
    for _ in range(12):
        begun = time.perf_counter()
        mx.eval(a @ b)
        best = max(best, 2 * 1024 * 2048 * 2048 / (time.perf_counter() - begun))
    return best
