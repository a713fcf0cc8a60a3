"""Loss on records that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune.arrays import scalar
from mlxtune.data.passes import Layout, passes
from mlxtune.data.render import Sample
from mlxtune.models.heads import evaluating
from mlxtune.train.distributed import Workers
from mlxtune.train.step import LossFunction, batch_arrays


def held_out_loss(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    layout: Layout,
    workers: Workers | None = None,
) -> float:
    """Mean loss over all supervised tokens of the samples, nats; dropout is off.

    Of several workers, which all have all samples, each computes its share.
    """
    workers = workers or Workers()
    loss_of = LossFunction(model)
    total = weight = 0.0
    # Samples of similar length together waste the least; a sum has no order.
    ordered = sorted(samples, key=lambda s: len(s.tokens))
    share = ordered[workers.rank :: workers.size]
    before = mx.array(0.0)
    with evaluating(model):
        for at in range(0, len(share), batch_size):
            for batch in passes(share[at : at + batch_size], batch_size, layout):
                loss = loss_of(batch_arrays(batch), batch.prefix, batch.packed)
                # This pass was made ready while the one before it was computed.
                total += scalar(before)
                mx.async_eval(loss)
                before = loss
                weight += batch.weight
    total += scalar(before)
    total, weight = workers.totals(total, weight)
    return total / weight


def sample_losses(
    model: nn.Module, samples: Sequence[Sample], *, batch_size: int, layout: Layout
) -> npt.NDArray[np.float64]:
    """The weighted sum of each sample's losses, nats: float64 (samples,); dropout is off."""
    loss_of = LossFunction(model)
    found = np.zeros(len(samples))
    # In a pass samples are known by their record: here each is its own.
    own = [replace(sample, record=number) for number, sample in enumerate(samples)]
    counts = [int(np.count_nonzero(sample.weights[1:])) for sample in samples]
    ordered = sorted(own, key=lambda s: len(s.tokens))
    with evaluating(model):
        for at in range(0, len(ordered), batch_size):
            for batch in passes(ordered[at : at + batch_size], batch_size, layout):
                each = loss_of.each(batch_arrays(batch), batch.prefix, batch.packed)
                losses = np.asarray(each, np.float64)
                ends = np.cumsum([counts[number] for number in batch.records])
                for number, some in zip(batch.records, np.split(losses, ends), strict=False):
                    found[number] = some.sum()
    return found
