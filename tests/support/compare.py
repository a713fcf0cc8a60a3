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
    return LossFunction(model)(batch_arrays(batch), batch.prefix, batch.packed)[0]


def value_and_gradients(
    model: nn.Module, loss: Callable[..., mx.array], *args: Any
) -> tuple[float, dict[str, mx.array]]:
    value, gradients = nn.value_and_grad(model, loss)(*args)
    return value.item(), dict(tree_flatten(gradients))


def random_groups(
    prompts: Iterable[int],
    answers: Iterable[int] = (7, 12),
    *,
    prefix: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """Groups of answers to a prompt of each of these lengths, all of which begin with `prefix`
    tokens. About half of an answer's tokens are targets, its first one among them."""
    generator = np.random.default_rng(seed)
    common = generator.integers(0, 128, prefix)
    samples = []
    for record, length in enumerate(prompts, start=1):
        prompt = generator.integers(0, 128, length)
        prompt[:prefix] = common
        for side, more in enumerate(answers):
            own = generator.integers(0, 128, more + record % 3)
            own[0] = (7 * side + record) % 128
            weights = np.zeros(length + len(own), np.float32)
            weights[length:] = generator.random(len(own)) < 0.5
            weights[length] = 1
            tokens = np.concatenate([prompt, own]).astype(np.int32)
            references = np.where(weights > 0, -generator.random(len(tokens)), 0)
            references = references.astype(np.float32)
            sample = Sample(tokens, weights, record, side=side, references=references)
            samples.append(sample)
    return samples
