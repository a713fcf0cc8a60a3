"""Comparisons of arrays, losses and gradients, and random ragged samples for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxtune.data.pack import Batch
from mlxtune.data.render import Sample
from mlxtune.train.step import LossFunction, batch_arrays


def distance(got: mx.array, want: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    assert got.shape == want.shape
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()


def trainable(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def random_samples(
    lengths: Iterable[int], *, prefix: int = 0, untrained: int = 1, seed: int = 0
) -> list[Sample]:
    """Samples of these lengths that share their first `prefix` tokens and differ after.

    The first target is the token at `untrained`, and about half of those after it are
    targets too, with random weights.
    """
    generator = np.random.default_rng(seed)
    common = generator.integers(0, 128, prefix)
    samples = []
    for record, length in enumerate(lengths, start=1):
        tokens = generator.integers(0, 128, length).astype(np.int32)
        tokens[:prefix] = common
        tokens[prefix] = (record * 7) % 128
        weights = generator.uniform(0.2, 2.0, length) * (generator.random(length) < 0.5)
        weights[:untrained] = 0
        weights[untrained] = 1
        samples.append(Sample(tokens, weights.astype(np.float32), record))
    return samples


def loss_of_each_alone(model: nn.Module, samples: Iterable[Sample]) -> mx.array:
    """The weighted sum, each sample through the model by itself, with MLX's own loss."""
    total = mx.array(0.0)
    for sample in samples:
        logits = model(mx.array(sample.tokens[None]))[0, :-1]
        targets, weights = mx.array(sample.tokens[1:]), mx.array(sample.weights[1:])
        total = total + nn.losses.cross_entropy(logits, targets, weights, reduction="sum")
    return total


def loss_of_batch(model: nn.Module, batch: Batch) -> mx.array:
    return LossFunction(model)(batch_arrays(batch), batch.prefix, batch.packed)


def value_and_gradients(
    model: nn.Module, loss: Callable[..., mx.array], *args: Any
) -> tuple[float, dict[str, mx.array]]:
    value, gradients = nn.value_and_grad(model, loss)(*args)
    return value.item(), dict(tree_flatten(gradients))
