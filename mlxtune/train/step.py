"""One training step, whatever it is trained for: compiled, and divided by what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_map

from mlxtune.arrays import flat
from mlxtune.data.pack import Batch
from mlxtune.device import on_cpu
from mlxtune.models.enable import pack_kind
from mlxtune.models.heads import split_head
from mlxtune.objectives import SFT, Objective
from mlxtune.objectives.base import Arrays, Sums, Targets
from mlxtune.train.distributed import Workers
from mlxtune.train.neftune import embedding_noise, noise_sizes
from mlxtune.train.optim import stacks_for, update_joined
from mlxtune.train.shapes import Shapes
from mlxtune.train.stacks import joined

Totals = Mapping[str, float]
_TOTAL = "total "


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself; all are lazy scalars.

    Attributes:
        loss: mean over the step's units: supervised tokens (then nats), pairs.
        grad_norm: of all gradients together, before clipping.
        sums: of the objective's figures.
    """

    loss: mx.array
    grad_norm: mx.array
    sums: Sums


class LossFunction:
    """The loss of a batch, summed over its units, logits computed only where there is a target.

    In training the embeddings carry noise if the model was given any (`neftune`).

    Args:
        model: an mlx-lm model; for packed batches `enable_packs` must have been called.
        objective: what the loss is; by default that of supervised fine-tuning.
        comes_apart: whether its head can be split off; None to try it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None = None,
        *,
        comes_apart: bool | None = None,
    ) -> None:
        self._model = model
        self.objective = objective or SFT()
        self._parts = None
        if comes_apart is not False:
            self._parts = split_head(model, proven=comes_apart is True)
        self._blocks = len(model.layers)
        self._pack = pack_kind(model)

    def __call__(self, arrays: Arrays, prefix: int, packed: bool) -> tuple[mx.array, Sums]:
        """The sum as a float32 scalar, and sums of the objective's figures.

        Arguments come from `arrays`.
        """
        parts, figures = self.parts(arrays, prefix, packed)
        first, *others = self.objective.units
        loss = parts[first]
        for unit in others:
            loss = loss + parts[unit] * (self.total(arrays) / arrays[_TOTAL + unit])
        return loss, figures

    def parts(self, arrays: Arrays, prefix: int, packed: bool) -> tuple[Sums, Sums]:
        """The sums that the loss is made of, by what each is divided by, and the figures'."""
        return self.objective(self.targets(arrays, prefix, packed))

    def arrays(self, batch: Batch, totals: Totals | None = None) -> Arrays:
        """A batch's arrays on the device, see `arrays_for`."""
        return arrays_for(self.objective, batch, totals)

    def total(self, arrays: Arrays) -> mx.array:
        """What the loss of the step is divided by."""
        return arrays[_TOTAL + self.objective.units[0]]

    def targets(self, arrays: Arrays, prefix: int, packed: bool) -> Targets:
        """The forward pass: what predicts each target."""
        tokens, call = arrays["tokens"], {}
        if packed:
            positions, segments = arrays["positions"], arrays["segments"]
            cache = self._pack(positions, segments, prefix, arrays.get("parents"))
            tokens = tokens.reshape(1, -1)
            call = {"cache": [cache] * self._blocks}
        # Without a cache the model masks causally, and padding at the right of a row is
        # never looked at.
        body, head = self._parts or (self._model, None)
        with embedding_noise(self._model, arrays["noise"]):
            hidden = body(tokens, **call)
        states = hidden.reshape(-1, hidden.shape[-1])[arrays["sources"]]
        return Targets(states, head, arrays, self._model.training)

    def each(self, arrays: Arrays, prefix: int, packed: bool) -> mx.array:
        """The weighted cross-entropy of each target, nats, float32 (m,); for evaluation."""
        return arrays["weights"] * self.targets(arrays, prefix, packed).losses()


def arrays_for(objective: Objective, batch: Batch, totals: Totals | None = None) -> Arrays:
    """A batch's arrays on the device, as an objective needs them.

    Args:
        objective: what is trained for.
        batch: of a pass.
        totals: counts of the objective's units in the whole step; by default those of the batch.
    """
    counts = counted(objective, [batch]) if totals is None else totals
    return (
        batch_arrays(batch)
        | {name: mx.array(array) for name, array in objective.arrays(batch).items()}
        | {f"{_TOTAL}{unit}": mx.array(count) for unit, count in counts.items()}
    )


def batch_arrays(batch: Batch) -> Arrays:
    """A batch's arrays on the device that every objective needs."""
    arrays = {
        "tokens": mx.array(batch.tokens),
        "sources": mx.array(batch.sources),
        "targets": mx.array(batch.targets),
        "weights": mx.array(batch.weights),
        "noise": mx.array(noise_sizes(batch)),
    }
    if batch.packed:
        arrays |= {
            "positions": mx.array(batch.positions),
            "segments": mx.array(batch.segments),
        }
        if batch.parents is not None:
            arrays["parents"] = mx.array(batch.parents)
    return arrays


class TrainStep:
    """Forward, backward, clip, update; compiled over model, optimizer and RNG state.

    Loss and gradients of a step are divided by the units (tokens, pairs) of all its
    batches, so 8 x 1 and 1 x 8 are the same mathematics whatever the lengths, on one worker or
    many. Not before the backward pass: what a token has of a mean over thousands is less than
    float16 can hold.

    Args:
        model: with its adapters in place and all else frozen.
        optimizer: its learning rate is set before each step.
        max_grad_norm: clip the gradient of a step to this norm; 0 for no clipping.
        lora_plus_ratio: see `optim.update_joined`.
        compiled: compile the step, for a few shapes of batches (`Shapes`); by default wherever
            that pays.
        workers: those that each step's batches are spread over.
        loss: by default one made for the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: mlx.optimizers.Optimizer,
        *,
        max_grad_norm: float,
        lora_plus_ratio: float = 1.0,
        compiled: bool | None = None,
        workers: Workers | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        self._workers = workers or Workers()
        self._model = model
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._lora_plus_ratio = lora_plus_ratio
        self._stacks = stacks_for(optimizer, model)
        self.loss = loss or LossFunction(model)
        self._gradient = nn.value_and_grad(model, self._joined)
        self._whole: Callable[..., Any] = self.whole
        self._one: Callable[..., Any] = self._gradient
        self._finish: Callable[..., Any] = self._update
        self.shapes: Shapes | None = None
        if compiled is None:
            # On a CPU compiling is a loss: MLX builds its fused kernels with a C++ compiler
            # (up to 40 s at the first step) and they run no faster, being bound by exp
            # (measured on 2 cores: 3.27 examples/s either way).
            compiled = not on_cpu()
        if compiled:
            self.shapes = Shapes(grouped=self.loss.objective.form == "pairs")
            state = [model.state, optimizer.state, mx.random.state]
            self._whole = mx.compile(self.whole, inputs=state, outputs=state)
            self._one = mx.compile(self._gradient, inputs=state, outputs=state)
            self._finish = mx.compile(self._update, inputs=state, outputs=state)

    def __call__(
        self, batches: list[Batch], learning_rate: float, totals: Totals | None = None
    ) -> StepResult:
        """Train on the batches of one step.

        Args:
            batches: this worker's; none, if the others have some.
            learning_rate: of this step.
            totals: all workers' counts of the objective's units; by default these batches
                are all.
        """
        self._optimizer.learning_rate = mx.array(learning_rate)
        if totals is None:
            totals = counted(self.loss.objective, batches)
        if len(batches) == 1 and self._workers.size == 1:
            (batch,) = batches
            batch, compiled = self._fitted(batch, "whole")
            whole = self._whole if compiled else self.whole
            arrays = self.loss.arrays(batch, totals)
            loss, norm, sums = whole(arrays, batch.prefix, batch.packed)
            return StepResult(loss, norm, self._named(sums))
        total = mx.array(totals[self.loss.objective.units[0]])
        count = len(self.loss.objective.figures)
        value: Any = (mx.array(0.0), [mx.zeros(count)] if count else [])
        gradients = None
        with self._workers.own_randomness():
            before: Any = ()
            for batch in batches:
                batch, compiled = self._fitted(batch, "one of several")
                one = self._one if compiled else self._gradient
                arrays = self.loss.arrays(batch, totals)
                more, of_batch = one(arrays, batch.prefix, batch.packed)
                value, gradients = _sum(value, more), _sum(gradients, of_batch)
                # Each batch's activations are released before the next is begun, which is
                # made ready meanwhile.
                mx.eval(before)
                mx.async_eval(value, gradients)
                before = value, gradients
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self._model.trainable_parameters())
        loss, sums = value
        # By name: a list without anything in it would be lost on the way.
        figures = {"figures": sums[0]} if sums else {}
        given = self._workers.sum({"loss": loss, "gradients": gradients} | figures)
        norm = self._finish(given["gradients"], total)
        sums = [given["figures"]] if sums else []
        return StepResult(given["loss"] / total, norm, self._named(sums))

    def _fitted(self, batch: Batch, kind: str) -> tuple[Batch, bool]:
        """The batch as it is computed, and whether a compiled function does it."""
        return (batch, False) if self.shapes is None else self.shapes.fit(batch, kind)

    # ------------------------------------------------------------------ the step itself

    def _joined(self, arrays: Arrays, prefix: int, packed: bool) -> tuple[mx.array, list[mx.array]]:
        """The loss, and the figures' sums as one array, if there are any.

        By themselves MLX 0.32.4 cannot compile them where one is computed in the loss too, or
        two are the same ("_Map_base::at").
        """
        loss, sums = self.loss(arrays, prefix, packed)
        each = [sums[name] for name in self.loss.objective.figures]
        return loss, [mx.stack(each)] if each else []

    def _named(self, joined: list[mx.array]) -> Sums:
        return {n: joined[0][i] for i, n in enumerate(self.loss.objective.figures)}

    def whole(
        self, arrays: Arrays, prefix: int, packed: bool
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """A step of one batch, uncompiled: its loss, the norm of its gradient, and sums."""
        (loss, sums), gradients = self._gradient(arrays, prefix, packed)
        total = self.loss.total(arrays)
        return loss / total, self._update(gradients, total), sums

    def _update(self, gradients: Any, total: mx.array) -> mx.array:
        """Update with gradients of a sum over `total` units; the norm of their mean."""
        own = joined(self._stacks, flat(gradients))
        # Each by itself on a CPU, where that costs nothing: the sums' last digits are then those
        # of the gradients of each parameter. On a GPU each sum is two launches.
        each = flat(gradients) if on_cpu() else own
        squares = [g.astype(mx.float32).square().sum() for g in each.values()]
        norm = mx.sqrt(sum(squares[1:], squares[0])) / total
        factor = 1 / total
        if self._max_grad_norm:
            factor = factor * mx.minimum(self._max_grad_norm / (norm + 1e-6), 1.0)
        update_joined(
            self._optimizer,
            self._model,
            self._stacks,
            {name: g * factor for name, g in own.items()},
            lora_plus_ratio=self._lora_plus_ratio,
        )
        return norm


def counted(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """How much batches have together of each unit that the loss or a figure is divided by."""
    totals = dict.fromkeys([*objective.units, *objective.figures.values()], 0.0)
    for batch in batches:
        counts = objective.counts(batch)
        totals = {unit: total + counts[unit] for unit, total in totals.items()}
    return totals


def _sum(tree: Any, more: Any) -> Any:
    return more if tree is None else tree_map(mx.add, tree, more)
