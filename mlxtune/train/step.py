"""One training step: compiled, and weighted by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_map

from mlxtune.arrays import flat
from mlxtune.data.pack import Batch
from mlxtune.device import on_cpu
from mlxtune.losses.cross_entropy import (
    chunked_cross_entropy,
    chunked_token_losses,
    token_losses,
    weighted_cross_entropy,
)
from mlxtune.models.enable import pack_kind
from mlxtune.models.heads import split_head
from mlxtune.train.distributed import Workers
from mlxtune.train.neftune import embedding_noise, noise_sizes
from mlxtune.train.optim import stacks_for, update_joined
from mlxtune.train.shapes import Shapes
from mlxtune.train.stacks import joined

Arrays = dict[str, mx.array]

# Logits to a chunk: 16 MiB of float32. Smaller ones would cost more than they save: on a CPU
# a packed head is expanded for each, and MLX lays out some ten operations ahead.
LOGITS_AT_ONCE = 1 << 22
# But no fewer rows than that: all of the head is read for each chunk, so that half as many
# hidden states take three quarters of the time.
LEAST_ROWS = 64
# A GPU wants more to do at once; of that size no figure has been measured yet. The least rows are
# the same there: 64 rows of 262,144 float32 logits are 67 MB, and keep it busy.
_GPU_FACTOR = 4


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself; both are lazy scalars.

    Attributes:
        loss: mean over the step's supervised tokens, nats.
        grad_norm: of all gradients together, before clipping.
    """

    loss: mx.array
    grad_norm: mx.array


class LossFunction:
    """Sum of weighted losses of a batch, logits computed only where there is a loss.

    In training the embeddings carry noise if the model was given any (`neftune`).

    Args:
        model: an mlx-lm model; for packed batches `enable_packs` must have been called.
        comes_apart: whether its head can be split off; None to try it.
    """

    def __init__(self, model: nn.Module, *, comes_apart: bool | None = None) -> None:
        self._model = model
        self._parts = None
        if comes_apart is not False:
            self._parts = split_head(model, proven=comes_apart is True)
        self._blocks = len(model.layers)
        self._pack = pack_kind(model)

    def __call__(self, arrays: Arrays, prefix: int, packed: bool) -> mx.array:
        """The weighted sum as a float32 scalar; arguments come from `batch_arrays`."""
        chosen, head = self._chosen(arrays, prefix, packed)
        targets, weights = arrays["targets"], arrays["weights"]
        if head is None:  # the body gave logits already
            return weighted_cross_entropy(chosen, targets, weights)
        trained = head.trained
        return chunked_cross_entropy(
            head.taking(trained) if trained else head,
            chosen,
            targets,
            weights,
            rows=rows_to_a_chunk(head.vocabulary),
            trained=list(trained.values()),
            gradient=self._model.training,
        )

    def each(self, arrays: Arrays, prefix: int, packed: bool) -> mx.array:
        """The weighted loss of each target, float32 (m,); for evaluation."""
        chosen, head = self._chosen(arrays, prefix, packed)
        targets, weights = arrays["targets"], arrays["weights"]
        if head is None:
            return weights * token_losses(chosen, targets)
        rows = rows_to_a_chunk(head.vocabulary)
        return weights * chunked_token_losses(head, chosen, targets, rows=rows)

    def _chosen(self, arrays: Arrays, prefix: int, packed: bool) -> tuple[mx.array, Any]:
        """What predicts each target: hidden states and the head, or logits and None."""
        tokens, call = arrays["tokens"], {}
        if packed:
            cache = self._pack(arrays["positions"], arrays["segments"], prefix)
            tokens = tokens.reshape(1, -1)
            call = {"cache": [cache] * self._blocks}
        # Without a cache the model masks causally, and padding at the right of a row is
        # never looked at.
        body, head = self._parts or (self._model, None)
        with embedding_noise(self._model, arrays["noise"]):
            hidden = body(tokens, **call)
        return hidden.reshape(-1, hidden.shape[-1])[arrays["sources"]], head


def rows_to_a_chunk(vocabulary: int) -> int:
    """How many hidden states have their logits at once."""
    at_once = LOGITS_AT_ONCE * (1 if on_cpu() else _GPU_FACTOR)
    return max(LEAST_ROWS, at_once // max(1, vocabulary))


def batch_arrays(batch: Batch, weight: float = 1.0) -> Arrays:
    """A batch's arrays on the device, with the sum of its step's loss weights, `weight`."""
    arrays = {
        "tokens": mx.array(batch.tokens),
        "sources": mx.array(batch.sources),
        "targets": mx.array(batch.targets),
        "weights": mx.array(batch.weights),
        "total": mx.array(weight),
        "noise": mx.array(noise_sizes(batch)),
    }
    if batch.packed:
        arrays |= {
            "positions": mx.array(batch.positions),
            "segments": mx.array(batch.segments),
        }
    return arrays


class TrainStep:
    """Forward, backward, clip, update; compiled over model, optimizer and RNG state.

    Loss and gradients of a step are divided by the sum of the loss weights of all its
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
        self._gradient = nn.value_and_grad(model, loss or LossFunction(model))
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
            self.shapes = Shapes()
            state = [model.state, optimizer.state, mx.random.state]
            self._whole = mx.compile(self.whole, inputs=state, outputs=state)
            self._one = mx.compile(self._gradient, inputs=state, outputs=state)
            self._finish = mx.compile(self._update, inputs=state, outputs=state)

    def __call__(
        self, batches: list[Batch], learning_rate: float, weight: float | None = None
    ) -> StepResult:
        """Train on the batches of one step.

        Args:
            batches: this worker's; none, if the others have some.
            learning_rate: of this step.
            weight: sum of all workers' loss weights; by default these batches are all.
        """
        self._optimizer.learning_rate = mx.array(learning_rate)
        if weight is None:
            weight = sum(batch.weight for batch in batches)
        if len(batches) == 1 and self._workers.size == 1:
            (batch,) = batches
            batch, compiled = self._fitted(batch, "whole")
            whole = self._whole if compiled else self.whole
            loss, norm = whole(batch_arrays(batch, weight), batch.prefix, batch.packed)
            return StepResult(loss, norm)
        total = mx.array(weight)
        loss, gradients = mx.array(0.0), None
        with self._workers.own_randomness():
            before: Any = ()
            for batch in batches:
                batch, compiled = self._fitted(batch, "one of several")
                one = self._one if compiled else self._gradient
                more, of_batch = one(batch_arrays(batch), batch.prefix, batch.packed)
                loss, gradients = loss + more, _sum(gradients, of_batch)
                # Each batch's activations are released before the next is begun, which is
                # made ready meanwhile.
                mx.eval(before)
                mx.async_eval(loss, gradients)
                before = loss, gradients
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self._model.trainable_parameters())
        loss, gradients = self._workers.sum((loss, gradients))
        return StepResult(loss / total, self._finish(gradients, total))

    def _fitted(self, batch: Batch, kind: str) -> tuple[Batch, bool]:
        """The batch as it is computed, and whether a compiled function does it."""
        return (batch, False) if self.shapes is None else self.shapes.fit(batch, kind)

    # ------------------------------------------------------------------ the step itself

    def whole(self, arrays: Arrays, prefix: int, packed: bool) -> tuple[mx.array, mx.array]:
        """A step of one batch, uncompiled: its loss and the norm of its gradient."""
        loss, gradients = self._gradient(arrays, prefix, packed)
        return loss / arrays["total"], self._update(gradients, arrays["total"])

    def _update(self, gradients: Any, total: mx.array) -> mx.array:
        """Update with gradients of a sum over the weight `total`; the norm of their mean."""
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


def _sum(gradients: Any, more: Any) -> Any:
    return more if gradients is None else tree_map(mx.add, gradients, more)
