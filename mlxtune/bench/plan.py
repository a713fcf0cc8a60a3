"""What a recipe takes before it is run: memory, time, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from mlxtune.bench.advice import (
    Advice,
    Trial,
    advice_for,
    fitting_changes,
    least_values,
    with_changes,
)
from mlxtune.bench.depth import StepEstimator
from mlxtune.bench.facts import ModelFacts, model_facts
from mlxtune.bench.lengths import Lengths, lengths_of_recipe
from mlxtune.bench.machine import Machine
from mlxtune.bench.words import assignments, size
from mlxtune.data.batches import Part, Plan
from mlxtune.data.pack import Batch
from mlxtune.data.render import Sample
from mlxtune.device import as_on_gpu
from mlxtune.errors import DataError, ModelError
from mlxtune.memory import GB
from mlxtune.models.skeleton import Config
from mlxtune.objectives.base import rows_to_a_chunk
from mlxtune.recipe.schema import Recipe, TrainSection
from mlxtune.train.model import layout_for
from mlxtune.train.notes import context_notes, part_lengths, warmup_notes

# Steps that are looked at to know an average one.
_STEPS = 8
# Keys that say how records come to passes: the model is the same whatever they say.
_OF_PASSES = {
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.gradient_checkpointing": False,
    "train.max_seq_length": 1,
}


@dataclass(frozen=True)
class RunPlan:
    """What a run takes. All figures are estimates.

    Attributes:
        machine: for which it was made.
        measured_rates: whether its time is from rates measured on the machine, or one like it.
        rates: where they are from.
        model: where its sizes are from.
        lengths: how the lengths of the records are known.
        dtype: that the model computes in.
        parameters_trained: of the adapters.
        packed: whether batches are packed.
        checkpointed_blocks: how many blocks are computed twice, of `blocks`.
        peak_memory_bytes: of MLX; the sum of the parts below it.
        budget_bytes: that training may take.
        machine_bytes: of the machine's memory; 0 where that is not known.
        fits: whether the peak is within the budget.
        seconds_per_step: of an average step; None where no rate is known.
        steps: of the whole run; None where neither the records nor `max_steps` say.
        flops_per_step: of products.
        advice: what each change would save, or nothing if it fits.
        together: changes that make it fit where no single one does, if there are any.
        at_least: whether the peak is only what lies there all the time: that alone is over the
            budget, so no step was laid out, and activations and time are not known.
        held_back: what `mlxtune lora` will say instead of training, if anything.
        notes: remarks on the run.
    """

    machine: str
    measured_rates: bool
    rates: str
    model: str
    lengths: str
    dtype: str
    parameters_trained: int
    packed: bool
    blocks: int
    checkpointed_blocks: int
    peak_memory_bytes: int
    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    logits_bytes: int
    activations_bytes: int
    budget_bytes: int
    fits: bool
    seconds_per_step: float | None
    steps: int | None
    flops_per_step: float
    advice: tuple[Advice, ...] = ()
    together: dict[str, Any] | None = None
    at_least: bool = False
    held_back: str | None = None
    notes: tuple[str, ...] = ()
    machine_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """As `mlxtune plan --json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class _Memory:
    """What a recipe takes at most, and what that was found by."""

    model: StepEstimator
    batches: Plan
    largest: Batch
    twice: int
    peak: int
    budget: int


class Planner:
    """Makes plans of recipes with one model and one set of records.

    Args:
        recipe: checked.
        machine: that it is to run on.
        facts: of the model; by default looked up.
        lengths: of the records; by default as well as they can be known.
        workers: that train together, each on its share.

    Raises:
        ModelError: the model's sizes cannot be had.
    """

    def __init__(
        self,
        recipe: Recipe,
        machine: Machine,
        *,
        facts: ModelFacts | None = None,
        lengths: Lengths | None = None,
        workers: int = 1,
    ) -> None:
        self.recipe = recipe
        self.machine = machine
        self._facts = facts or model_facts(recipe)
        self._lengths = lengths or lengths_of_recipe(recipe, self._facts.source)
        self._workers = workers
        self._made: dict[str, RunPlan] = {}
        self._looked_at: dict[str, _Memory] = {}
        self._estimators: dict[str, StepEstimator] = {}
        self._passes: dict[Hashable, Batch] = {}

    def __call__(self, progress: Callable[[str], None] = lambda _: None) -> RunPlan:
        """The plan of the recipe, with advice if it does not fit.

        Args:
            progress: is told which change is tried.
        """
        before, tried = self._trial(self.recipe), self._trials(progress)
        plan = self._without_a_step() if before.out_of_reach else self.estimate(self.recipe)
        if plan.fits:
            return plan
        if before.out_of_reach and tried(least_values(self.recipe)).out_of_reach:
            return plan  # nothing would make it fit, and that is known at once
        advice = advice_for(self.recipe, before, tried)
        if any(each.fits for each in advice):
            return replace(plan, advice=advice)
        together, _ = fitting_changes(self.recipe, before, tried)
        return replace(plan, advice=advice, together=together)

    def fitted(
        self, progress: Callable[[str], None] = lambda _: None
    ) -> tuple[Recipe, RunPlan, dict[str, Any]]:
        """A recipe that fits, its plan, and what was changed: nothing that it could do without.

        It trains on the same records: none is refused for its length that was not before.

        Args:
            progress: is told which change is tried.

        Raises:
            ModelError: nothing makes it fit.
        """
        before = self._trial(self.recipe)
        if before.fits:
            return self.recipe, self.estimate(self.recipe), {}
        changes, least = fitting_changes(self.recipe, before, self._trials(progress))
        if changes is None:
            budget = self._budget(self.recipe.train.memory_limit)
            raise ModelError(
                f"nothing makes it fit {size(budget)}: at least {size(least)} are needed",
                where=self.machine.name,
                remedy="take a smaller model, or a machine with more memory",
            )
        recipe = with_changes(self.recipe, changes)
        return recipe, self.estimate(recipe), changes

    @property
    def problem(self) -> DataError | None:
        """For which training would refuse the records."""
        return self._lengths.problem

    def out_of_reach(self) -> RunPlan | None:
        """The plan of a recipe that takes too much before a step begins; None of any other.

        Known within seconds, where laying out steps takes minutes.
        """
        return None if self._beyond(self.recipe) is None else self._without_a_step()

    def estimate(self, recipe: Recipe) -> RunPlan:
        """The plan of a recipe, without advice."""
        key = recipe.model_dump_json()
        if key not in self._made:
            with self._as_there():
                self._made[key] = self._estimate(recipe)
        return self._made[key]

    def _estimate(self, recipe: Recipe) -> RunPlan:
        found = self._memory(recipe)
        seconds, flops = self._time(found.model, found.batches, found.twice)
        rest = found.peak - found.model.sizes.floor
        logits = min(rest, _logits_bytes(self._facts.config, found.largest))
        return replace(
            self._before_a_step(recipe, found.batches),
            checkpointed_blocks=found.twice,
            peak_memory_bytes=found.peak,
            logits_bytes=logits,
            activations_bytes=rest - logits,
            fits=found.peak <= found.budget,
            seconds_per_step=seconds,
            flops_per_step=flops,
        )

    def _without_a_step(self) -> RunPlan:
        """Of a recipe that takes too much before a step begins."""
        with self._as_there():
            batches = self._batches(self.recipe)
            return replace(self._before_a_step(self.recipe, batches), at_least=True)

    def _before_a_step(self, recipe: Recipe, batches: Plan) -> RunPlan:
        """What is known before a step is laid out."""
        model = self._estimator(recipe)
        sizes, budget = model.sizes, self._budget(recipe.train.memory_limit)
        steps, problem = self._steps(batches, recipe.train), self._lengths.problem
        return RunPlan(
            machine=self.machine.name,
            measured_rates=self.machine.measured,
            rates=self.machine.basis,
            model=self._facts.origin,
            lengths=self._lengths.note,
            dtype=self._dtype(recipe),
            parameters_trained=model.trainable,
            packed=model.packing,
            blocks=model.blocks,
            checkpointed_blocks=0,
            peak_memory_bytes=sizes.floor,
            weights_bytes=sizes.weights,
            adapters_bytes=sizes.adapters,
            gradients_bytes=sizes.adapters,
            optimizer_bytes=sizes.optimizer,
            logits_bytes=0,
            activations_bytes=0,
            budget_bytes=budget,
            machine_bytes=self.machine.memory,
            fits=sizes.floor <= budget,
            seconds_per_step=None,
            steps=steps,
            flops_per_step=0.0,
            held_back=None if problem is None else str(problem),
            notes=tuple(self._notes(recipe.train, steps)),
        )

    def _notes(self, train: TrainSection, steps: int | None) -> Iterator[str]:
        lengths = self._lengths
        yield from lengths.notes
        if lengths.basis != "worst case":
            about = lengths.basis != "tokenized"
            each = part_lengths(lengths.parts)
            yield from context_notes(each, self._facts.config, about=about)
        if steps is not None:
            yield from warmup_notes(train, steps)

    def _memory(self, recipe: Recipe) -> _Memory:
        """What a recipe takes at most; its time is not looked at."""
        key = recipe.model_dump_json()
        if key in self._looked_at:
            return self._looked_at[key]
        train, model = recipe.train, self._estimator(recipe)
        batches = self._batches(recipe)
        largest = self._largest(batches, train)
        budget = self._budget(train.memory_limit)
        # Gradients of several passes are added up.
        several = len(next(iter(batches.steps(0, 1)))) > 1
        extra = model.sizes.adapters if several else 0
        twice, peak = self._checkpointed(model, largest, recipe, budget - extra)
        found = _Memory(model, batches, largest, twice, peak + extra, budget)
        self._looked_at[key] = found
        return found

    def _batches(self, recipe: Recipe) -> Plan:
        train = recipe.train
        return Plan(
            self._parts(train.max_seq_length),
            train.batch_size,
            train.gradient_accumulation_steps,
            recipe.seed,
            layout_for(self._estimator(recipe).packing, self._facts.config),
            ranks=self._workers,
        )

    def _largest(self, batches: Plan, train: TrainSection) -> Batch:
        """The pass that takes most: the run's own, or of the longest records together where
        that is larger and lengths are not known for sure."""
        key = (batches.batch_size, batches.accumulation, train.max_seq_length, batches.layout)
        if key not in self._passes:
            steps = batches.total_steps(epochs=train.epochs, max_steps=train.max_steps)
            found = [batches.largest_of_run(steps)]
            if self._lengths.basis != "tokenized":
                found.append(batches.largest())
            self._passes[key] = max(found, key=lambda batch: batch.tokens.size)
        return self._passes[key]

    def _estimator(self, recipe: Recipe) -> StepEstimator:
        """Of steps with a recipe's model, which knows again what it was asked before."""
        alike = with_changes(recipe, _OF_PASSES)
        key = alike.model_dump_json()
        if key not in self._estimators:
            facts, rates = self._facts, self.machine.rates
            try:
                made = StepEstimator(alike, facts.config, facts.forms, self._dtype(recipe), rates)
            except ModelError as error:
                if error.where in (None, "config.json"):
                    error.where = f"config.json of {recipe.model.path}"
                raise
            self._estimators[key] = made
        return self._estimators[key]

    def _trial(self, recipe: Recipe) -> Trial:
        if (beyond := self._beyond(recipe)) is not None:
            return beyond
        with self._as_there():
            found = self._memory(recipe)
        fits, floor = found.peak <= found.budget, found.model.sizes.floor
        return Trial(found.peak, fits, floor=floor)

    def _beyond(self, recipe: Recipe) -> Trial | None:
        """What lies there all the time, where that is more than there is."""
        with self._as_there():
            floor = self._estimator(recipe).sizes.floor
        over = floor > self._budget(recipe.train.memory_limit)
        return Trial(floor, False, out_of_reach=True, floor=floor) if over else None

    def _trials(self, progress: Callable[[str], None]) -> Callable[[dict[str, Any]], Trial]:
        """What the recipe comes to with other values, each told before it is looked at."""

        def tried(changes: dict[str, Any]) -> Trial:
            recipe = with_changes(self.recipe, changes)
            if recipe.model_dump_json() not in self._looked_at:
                progress(f"it does not fit; with {assignments(changes)}?")
            return self._trial(recipe)

        return tried

    def _as_there(self) -> AbstractContextManager[None]:
        return as_on_gpu() if self.machine.gpu else nullcontext()

    def _budget(self, limit: float | None) -> int:
        """Bytes that training may take; `limit` in GB, as the recipe says."""
        if limit is None:
            return self.machine.budget
        # Here a recipe may ask for more than the device recommends. Of another machine there
        # is no more than it has.
        own = math.inf if self.machine.here else self.machine.budget
        return int(min(limit * GB, own))

    def _steps(self, batches: Plan, train: TrainSection) -> int | None:
        if train.max_steps is None and self._lengths.basis == "worst case":
            return None
        return batches.total_steps(epochs=train.epochs, max_steps=train.max_steps)

    def _parts(self, limit: int) -> tuple[Part, ...]:
        """The records, none longer than `limit`."""
        if limit >= self.recipe.train.max_seq_length:
            return self._lengths.parts
        return tuple(
            Part([_cut(sample, limit) for sample in part.samples], part.epochs)
            for part in self._lengths.parts
        )

    def _dtype(self, recipe: Recipe) -> str:
        if recipe.model.dtype != "auto":
            return recipe.model.dtype
        if not self.machine.gpu:
            return "float32"
        config = self._facts.config
        stored = config.get("torch_dtype") or config.get("dtype")
        if stored is None and self._facts.forms:
            return "float16"
        return stored if stored in ("float16", "bfloat16", "float32") else "bfloat16"

    def _checkpointed(
        self, model: StepEstimator, batch: Batch, recipe: Recipe, budget: int
    ) -> tuple[int, int]:
        """How many blocks are computed twice, and the peak then."""
        wish, every = recipe.train.gradient_checkpointing, model.blocks
        if wish is True:
            return every, model.step(batch, every).peak_within(budget)
        if wish is not False and wish != "auto":
            count = len(range(0, every, wish))
            return count, model.step(batch, count).peak_within(budget)
        if wish == "auto" and model.sizes.floor >= budget:
            return every, model.step(batch, every).peak_within(budget)
        without = model.step(batch)
        if wish is False or without.peak_within(budget) <= budget:
            return 0, without.peak_within(budget)
        all_ = model.step(batch, every)
        if all_.least >= budget:
            return every, all_.peak_within(budget)
        needed = math.ceil((without.least - budget) * every / (without.least - all_.least))
        return needed, model.step(batch, needed).peak_within(budget)

    def _time(self, model: StepEstimator, batches: Plan, twice: int) -> tuple[float | None, float]:
        """Seconds of an average step, if rates are known, and its operations."""
        steps = list(islice(batches.steps(0, _STEPS), _STEPS))
        passes = sorted((p for step in steps for p in step), key=lambda p: p.tokens.size)
        middle = passes[len(passes) // 2]
        total = model.step(middle, twice)
        # What a pass takes is about in proportion to its tokens.
        times = sum(p.tokens.size for p in passes) / middle.tokens.size / len(steps)
        seconds = None if total.seconds is None else total.seconds * times
        return seconds, total.flops * times


def _logits_bytes(config: Config, batch: Batch) -> int:
    """Of a chunk of the loss: the logits, their powers and their gradient in float32."""
    vocabulary = int(config.get("vocab_size") or 0)
    return 3 * 4 * min(rows_to_a_chunk(vocabulary), len(batch.targets)) * vocabulary


def _cut(sample: Sample, limit: int) -> Sample:
    if len(sample.tokens) <= limit:
        return sample
    ones = np.ones(limit, np.float32)
    return replace(sample, tokens=sample.tokens[:limit], weights=ones, references=None)
