"""Loss on records that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn

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
    with evaluating(model):
        for at in range(0, len(share), batch_size):
            for batch in passes(share[at : at + batch_size], batch_size, layout):
                total += scalar(loss_of(batch_arrays(batch), batch.prefix, batch.packed))
                weight += batch.weight
    total, weight = workers.totals(total, weight)
    return total / weight
