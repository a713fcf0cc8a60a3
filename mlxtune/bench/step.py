"""A training step as a graph: built from a config, traced, never computed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtune.arrays import flat
from mlxtune.bench.fused import fused_kernels
from mlxtune.bench.graph import Graph, trace
from mlxtune.data.pack import Batch
from mlxtune.errors import ModelError
from mlxtune.layers.gated import GatedClasses, use_gated_activations
from mlxtune.models.enable import enable_packs
from mlxtune.models.heads import split_head
from mlxtune.models.load import DTYPES
from mlxtune.models.skeleton import Config, Forms, hollow, skeleton, tiny_twin
from mlxtune.objectives import objective_of
from mlxtune.recipe.schema import Recipe, TrainSection
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.model import put_adapters, put_own_layers
from mlxtune.train.optim import optimizer_of
from mlxtune.train.step import LossFunction, TrainStep, arrays_for


@dataclass(frozen=True)
class Sizes:
    """Bytes that are there all the time.

    Attributes:
        weights: of the frozen model, as stored.
        adapters: trained parameters.
        optimizer: its state.
    """

    weights: int
    adapters: int
    optimizer: int

    @property
    def floor(self) -> int:
        """No step takes less: all of these, and a gradient for each trained parameter."""
        return self.weights + 2 * self.adapters + self.optimizer


@dataclass(frozen=True)
class Measured:
    """Steps that were run.

    Attributes:
        seconds: of a step, the first one left out.
        peak: bytes, at most.
        first: seconds of the first step, in which kernels are compiled.
    """

    seconds: float
    peak: int
    first: float


class StepModel:
    """A recipe's model without weights, ready for a step to be traced through it.

    Args:
        recipe: checked; of its model only the sections count, not where it lies.
        config: of the model.
        forms: how a GGUF packs it.
        dtype: that it computes in.

    Attributes:
        model: mlx-lm's, with adapters in place.
        packing: whether it takes packed batches.
        sizes: what it takes between steps.

    Raises:
        ModelError: the config is not one of a model that mlx-lm knows.
        TargetError: the recipe's targets are not the model's.
    """

    def __init__(self, recipe: Recipe, config: Config, forms: Forms | None, dtype: str) -> None:
        self._train = recipe.train
        self._objective = objective_of(recipe)
        self.model = model = skeleton(config, DTYPES[dtype], forms)
        classes: GatedClasses = {}
        self.packing = recipe.train.packing
        twin = _twin(config, classes)
        if self.packing:
            try:
                if twin is None:
                    raise ModelError("no small model of this architecture can be tried")
                enable_packs(twin)
                enable_packs(model, twin)
            except ModelError:
                self.packing = False
        self._comes_apart = twin is not None and split_head(twin) is not None
        put_own_layers(model, recipe.model, DTYPES[dtype], evaluate=False)
        use_gated_activations(model, classes)
        put_adapters(model, recipe.lora, evaluate=False)
        hollow(model)
        model.train()
        self._optimizer = _optimizer(recipe.train, model)
        self.blocks = len(model.layers)
        trained = sum(a.nbytes for a in flat(model.trainable_parameters()).values())
        everything = sum(a.nbytes for a in flat(model.parameters()).values())
        state = sum(a.nbytes for a in flat(self._optimizer.state).values())
        self.sizes = Sizes(everything - trained, trained, state)

    @property
    def trainable(self) -> int:
        """How many parameters train."""
        return sum(a.size for a in flat(self.model.trainable_parameters()).values())

    def materialize(self, seed: int = 0) -> None:
        """Give the model weights: small random numbers, to measure steps with."""
        key = mx.random.key(seed)

        def filled(array: mx.array) -> mx.array:
            if not mx.issubdtype(array.dtype, mx.floating):
                return mx.random.randint(0, 255, array.shape, array.dtype, key=key)
            return (0.02 * mx.random.normal(array.shape, key=key)).astype(array.dtype)

        for name, array in flat(self.model.parameters()).items():
            self.model.update(tree_unflatten([(name, filled(array))]))
            mx.eval(self.model.parameters())
        mx.eval(self._optimizer.state)

    def measure(
        self,
        batch: Batch,
        checkpointed: Iterable[int] = (),
        *,
        steps: int = 4,
        compiled: bool | None = None,
    ) -> Measured:
        """Run steps for real, after `materialize`.

        Args:
            batch: to train on.
            checkpointed: numbers of the blocks that are recomputed in the backward pass.
            steps: two at least.
            compiled: compile them; by default wherever that pays.

        Returns:
            The median time of a step after the first, the peak, and the time of the first.
        """
        seconds = []
        with self._step(checkpointed, compiled=compiled) as step:
            mx.reset_peak_memory()
            for _ in range(steps):
                begun = time.perf_counter()
                result = step([batch], 1e-5)
                mx.eval(self.model.state, self._optimizer.state, result.loss, result.grad_norm)
                seconds.append(time.perf_counter() - begun)
        return Measured(median(seconds[1:]), mx.get_peak_memory(), seconds[0])

    def graph(self, batch: Batch, checkpointed: Iterable[int] = ()) -> Graph:
        """One whole step on one pass: forward, backward, update.

        Args:
            batch: only its shapes matter.
            checkpointed: numbers of the blocks that are computed twice.
        """
        model, optimizer = self.model, self._optimizer
        arrays = arrays_for(self._objective, batch)
        optimizer.learning_rate = mx.array(0.0)
        trees = [flat(tree) for tree in (model.parameters(), optimizer.state, arrays)]

        with self._step(checkpointed, compiled=False) as step:

            def whole_step(*given: mx.array) -> list[mx.array]:
                each = iter(given)
                parameters, state, inputs = ({name: next(each) for name in t} for t in trees)
                model.update(tree_unflatten(list(parameters.items())))
                optimizer.state = tree_unflatten(list(state.items()))
                loss, norm, sums = step.whole(inputs, batch.prefix, batch.packed)
                after = [*flat(model.parameters()).values(), *flat(optimizer.state).values()]
                return [*after, loss, norm, *sums]

            try:
                with fused_kernels():
                    return trace(whole_step, *(a for tree in trees for a in tree.values()))
            finally:
                model.update(tree_unflatten(list(trees[0].items())))
                optimizer.state = tree_unflatten(list(trees[1].items()))

    @contextmanager
    def _step(
        self, checkpointed: Iterable[int], *, compiled: bool | None = None
    ) -> Iterator[TrainStep]:
        """A step of the model, some of whose blocks are computed twice for as long."""
        classes = [type(layer) for layer in self.model.layers]
        checkpoint_blocks(self.model, checkpointed)
        try:
            yield TrainStep(
                self.model,
                self._optimizer,
                max_grad_norm=self._train.max_grad_norm,
                lora_plus_ratio=self._train.lora_plus_ratio,
                compiled=compiled,
                loss=LossFunction(self.model, self._objective, comes_apart=self._comes_apart),
            )
        finally:
            for layer, original in zip(self.model.layers, classes, strict=True):
                layer.__class__ = original


def _twin(config: Config, classes: GatedClasses) -> nn.Module | None:
    """A small model that was tried out; None where none can be made."""
    try:
        twin = tiny_twin(config)
        use_gated_activations(twin, classes)
        return tiny_twin(config)
    except Exception:  # whatever an unknown architecture makes of small sizes
        return None


def _optimizer(train: TrainSection, model: nn.Module) -> Any:
    optimizer = optimizer_of(train, model)
    state = flat(optimizer.state).items()
    optimizer.state = tree_unflatten([(name, mx.zeros(a.shape, a.dtype)) for name, a in state])
    return optimizer
