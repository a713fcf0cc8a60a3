"""The objective's figures on records that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune.arrays import scalar
from mlxtune.data.groups import grouped, samples_of, tokens_of
from mlxtune.data.passes import Layout, passes
from mlxtune.data.render import Sample
from mlxtune.models.heads import evaluating
from mlxtune.objectives import SFT, Objective
from mlxtune.train.distributed import Workers
from mlxtune.train.step import LossFunction

_LOSS, _FIGURE, _COUNT = "loss ", "figure ", "count "


def held_out_figures(
    model: nn.Module,
    samples: Sequence[Sample],
    objective: Objective,
    *,
    batch_size: int,
    layout: Layout,
    workers: Workers | None = None,
) -> dict[str, float]:
    """The objective's `loss` and its figures over all samples; dropout is off.

    Of several workers, which all have all samples, each computes its share.

    Args:
        model: with adapters in place.
        samples: groups of them follow each other.
        objective: what is trained for.
        batch_size: groups to a pass, at most.
        layout: of passes.
        workers: those that measure together.
    """
    workers = workers or Workers()
    loss_of = LossFunction(model, objective)
    # Groups of similar length together waste the least; a sum has no order.
    ordered = sorted(grouped(samples), key=tokens_of)
    share = ordered[workers.rank :: workers.size]
    # The same names in the same order on each worker, also on one without a share.
    units = dict.fromkeys([*objective.units, *objective.figures.values()])
    names = [_LOSS + unit for unit in objective.units]
    names += [_FIGURE + name for name in objective.figures] + [_COUNT + unit for unit in units]
    sums = dict.fromkeys(names, 0.0)
    before: dict[str, mx.array] = {}
    with evaluating(model):
        for at in range(0, len(share), batch_size):
            chosen = samples_of(share[at : at + batch_size])
            for batch in passes(chosen, batch_size, layout):
                losses, figures = loss_of.parts(loss_of.arrays(batch), batch.prefix, batch.packed)
                made = {_LOSS + unit: value for unit, value in losses.items()}
                made |= {_FIGURE + name: value for name, value in figures.items()}
                # This pass was made ready while the one before it was computed.
                _add(sums, before)
                mx.async_eval(made)
                before = made
                counts = objective.counts(batch)
                for unit in units:
                    sums[_COUNT + unit] += counts[unit]
    _add(sums, before)
    sums = dict(zip(names, workers.totals(*sums.values()), strict=True))
    loss = sum(sums[_LOSS + unit] / sums[_COUNT + unit] for unit in objective.units)
    figures_of = {n: sums[_FIGURE + n] / sums[_COUNT + u] for n, u in objective.figures.items()}
    return {"loss": loss} | figures_of


def _add(sums: dict[str, float], values: dict[str, mx.array]) -> None:
    for name, value in values.items():
        sums[name] += scalar(value)


def held_out_loss(
    model: nn.Module, samples: Sequence[Sample], *, batch_size: int, layout: Layout
) -> float:
    """Mean cross-entropy over all supervised tokens of the samples, nats; dropout is off."""
    figures = held_out_figures(model, samples, SFT(), batch_size=batch_size, layout=layout)
    return figures["loss"]


def sample_losses(
    model: nn.Module, samples: Sequence[Sample], *, batch_size: int, layout: Layout
) -> npt.NDArray[np.float64]:
    """The weighted sum of each sample's losses, nats: float64 (samples,); dropout is off."""
    return np.array(
        [losses.sum() for losses in token_losses(model, samples, batch_size, layout)], np.float64
    )


def token_losses(
    model: nn.Module, samples: Sequence[Sample], batch_size: int, layout: Layout
) -> list[npt.NDArray[np.float64]]:
    """The weighted loss of each trained token of each sample, nats; dropout is off."""
    loss_of = LossFunction(model)
    found: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(samples)
    # In a pass a sample is known by its record: here by its number among all.
    own = [replace(sample, record=number) for number, sample in enumerate(samples)]
    ordered = sorted(grouped(own), key=tokens_of)
    with evaluating(model):
        for at in range(0, len(ordered), batch_size):
            chosen = samples_of(ordered[at : at + batch_size])
            for batch in passes(chosen, batch_size, layout):
                arrays = loss_of.arrays(batch)
                losses = np.asarray(loss_of.each(arrays, batch.prefix, batch.packed), np.float64)
                for number, place in zip(batch.records, batch.places(), strict=True):
                    found[number] = losses[place]
    return found
