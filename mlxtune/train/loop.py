"""The training loop: steps, reports, held-out loss, checkpoints, and how it stops."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapters.store import save_adapter
from mlxtune.arrays import scalar
from mlxtune.data.ahead import ahead
from mlxtune.data.batches import Plan
from mlxtune.data.pack import Batch
from mlxtune.data.render import Sample
from mlxtune.errors import TrainingDiverged
from mlxtune.files import atomic_folder, clear_unfinished
from mlxtune.memory import memory_budget
from mlxtune.objectives import Objective
from mlxtune.recipe.schema import CheckpointSection, EvalSection, LogSection, TrainSection
from mlxtune.train.checkpoint import (
    DamagedCheckpoint,
    Progress,
    load_checkpoint,
    save_checkpoint,
    share_state,
)
from mlxtune.train.distributed import Stopped, Workers
from mlxtune.train.heldout import held_out_figures
from mlxtune.train.memory import keep_freed_buffers
from mlxtune.train.metrics import Report, Reporter
from mlxtune.train.notes import warmup_steps
from mlxtune.train.optim import optimizer_of
from mlxtune.train.run import Run, checkpoints
from mlxtune.train.schedule import learning_rate
from mlxtune.train.signals import stop_on_signals
from mlxtune.train.step import LossFunction, StepResult, TrainStep, counted


class Interrupted(Stopped):
    """Training was stopped from outside; everything is saved.

    Attributes:
        checkpoint: where.
        signal: what it was asked by.
    """

    def __init__(self, checkpoint: Path, by: signal.Signals = signal.SIGINT) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint
        self.signal = by


class Trainer:
    """Trains a model's adapters in a run's folder.

    Args:
        model: with adapters in place; for packed batches `enable_packs` was called.
        run: the folder.
        plan: what each step sees.
        held_out: samples to measure the objective on; may be empty.
        objective: what is trained for.
        train, evaluation, checkpoint, log: sections of the recipe.
        base: name of the base model, kept with the adapters.
        reporter: is told how it goes.
        workers: those it trains with. Only the first one writes.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        plan: Plan,
        held_out: Sequence[Sample],
        objective: Objective,
        *,
        train: TrainSection,
        evaluation: EvalSection,
        checkpoint: CheckpointSection,
        log: LogSection,
        base: str,
        reporter: Reporter,
        workers: Workers,
    ) -> None:
        self._model = model
        self._run = run
        self._plan = plan
        self._held_out = held_out
        self._objective = objective
        self._train = train
        self._evaluation = evaluation
        self._checkpoint = checkpoint
        self._log = log
        self._base = base
        self._reporter = reporter
        self._workers = workers
        self.total_steps = plan.total_steps(epochs=train.epochs, max_steps=train.max_steps)
        self._eval_every = evaluation.steps or plan.steps_per_epoch
        self._budget = memory_budget(train.memory_limit)
        self._optimizer = optimizer_of(train, model)
        self._progress = Progress()
        self._beside: str | None = None  # what is done between steps
        self.measuring = False  # whether that is the held-out loss, which has no backward pass
        self._mark = 0.0  # until when the time of steps is counted

    @property
    def doing(self) -> str:
        """Where an error occurred, such as `at step 12`: the first step not known to be done."""
        return self._beside or f"at step {self._progress.step + 1}"

    @contextmanager
    def _between_steps(self, doing: str) -> Iterator[None]:
        self._beside = doing
        yield
        self._beside = None  # not after an error, whose place it is

    def resume(self) -> tuple[int, list[str]]:
        """Go back to the latest whole checkpoint, if there is any.

        Only the first worker reads it; the others are given its state when training begins.

        Returns:
            The steps done, and what there is to say of damaged checkpoints after it.

        Raises:
            DamagedCheckpoint: there are checkpoints, and none is whole.
        """
        if not self._workers.first:
            return 0, []
        notes = []
        for folder in (self._run.path, self._run.checkpoints):
            clear_unfinished(folder)
        found = checkpoints(self._run.checkpoints)
        for path in reversed(found):
            try:
                self._progress = load_checkpoint(path, self._model, self._optimizer)
                break
            except DamagedCheckpoint as damaged:
                if path == found[0]:
                    raise DamagedCheckpoint(
                        f"no checkpoint of this run is whole; {path.name}: {damaged.what}",
                        where=str(self._run.path),
                        remedy="start anew with --overwrite",
                    ) from None
                notes.append(
                    f"{path.name} is damaged, the checkpoint before it is used: {damaged.what}"
                )
        for path in found[len(found) - len(notes) :]:
            # Or it would count among the latest, which are kept.
            shutil.rmtree(path, ignore_errors=True)
        # What was measured before the first step is measured again.
        self._run.forget_after(self._progress.step or -1)
        return self._progress.step, notes

    def __call__(self) -> None:
        """Train to the end and save the adapter.

        While a step is computed the next one is prepared, and only then its loss is looked
        at; whoever is told of a step, or keeps it, waits for it first.

        Raises:
            Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with everything saved.
            TrainingDiverged: the loss or the gradient is not a number.
            StorageError: the disk refuses a checkpoint; the one before stands.
        """
        step_on = TrainStep(
            self._model,
            self._optimizer,
            max_grad_norm=self._train.max_grad_norm,
            lora_plus_ratio=self._train.lora_plus_ratio,
            workers=self._workers,
            loss=LossFunction(self._model, self._objective),
        )
        self._share_state()
        self._model.train()
        mx.reset_peak_memory()
        first = self._progress.step
        if first == 0:
            self._measure()
        with stop_on_signals(self._workers) as asked:
            # A run that was stopped early may have been killed before it said so.
            left = first if self._enough() else self.total_steps
            begun: _Begun | None = None
            self._mark = time.perf_counter()
            for step, batches in enumerate(self._steps(first, left), start=first + 1):
                rate = self._rate(step - 1)
                seen = self._seen(batches)
                result = step_on(batches, rate, seen.counts)
                shown = result.loss, result.grad_norm, result.sums
                mx.async_eval(self._model.state, self._optimizer.state, *shown)
                if begun is not None:
                    self._settle(begun)
                begun = _Begun(batches, seen, result)
                last, stop = step == self.total_steps, self._workers.stopping
                if not (last or stop or step == first + 1 or self._is_due(step)):
                    continue
                norm, begun = self._settle(begun), None
                keep_freed_buffers(self._budget)
                if step % self._log.steps == 0 or last:
                    self._report(rate, norm)
                best = (step % self._eval_every == 0 or last) and self._measure()
                if not last and self._enough():
                    last = True
                    if self._progress.counts:
                        self._report(rate, norm)
                stop = self._workers.stopping
                if step % self._checkpoint.steps == 0 or best or last or stop:
                    self._save()
                if last:
                    break
                if stop:
                    # What asks one of several workers comes to the others as no signal.
                    alone = asked and self._workers.size == 1
                    by = signal.Signals(asked[0]) if alone else signal.SIGINT
                    raise Interrupted(self._run.checkpoints / f"step-{step}", by)
                self._mark = time.perf_counter()
        self._keep(self._run.adapter)

    def _steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Batches of each step, made ahead unless the policy itself makes them."""
        steps = self._plan.steps(start, stop)
        return steps if self._objective.draws else ahead(steps)

    def _is_due(self, step: int) -> bool:
        """Whether something is to be done after this step."""
        every = self._log.steps, self._eval_every, self._checkpoint.steps
        return any(step % count == 0 for count in every)

    def _settle(self, begun: _Begun) -> float:
        """Wait for a step and count it; the norm of its gradient."""
        loss, norm = scalar(begun.result.loss), scalar(begun.result.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(begun.batches, loss)
        before, self._mark = self._mark, time.perf_counter()
        sums = {name: scalar(value) for name, value in begun.result.sums.items()}
        self._advance(begun.seen, loss, sums, self._mark - before)
        self._reporter.stepped(self._progress.step)
        return norm

    def _enough(self) -> bool:
        """Whether the held-out figure has stopped getting better (early stopping)."""
        patience = self._evaluation.patience
        return patience is not None and self._progress.no_better >= patience

    def _rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self._train.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=warmup_steps(self._train, self.total_steps),
            kind=self._train.lr_scheduler,
            decay_steps=round(self._train.decay_ratio * self.total_steps),
            min_ratio=self._train.min_lr_ratio,
        )

    def _seen(self, batches: list[Batch]) -> _Seen:
        """What all workers together see in a step."""
        own = counted(self._objective, batches)
        tokens, supervised, groups, *counts = self._workers.totals(
            sum(b.token_count for b in batches),
            sum(b.supervised for b in batches),
            sum(b.filled_groups for b in batches),
            *own.values(),
        )
        together = dict(zip(own, counts, strict=True))
        return _Seen(together, int(tokens), int(supervised), int(groups))

    def _advance(self, seen: _Seen, loss: float, sums: dict[str, float], seconds: float) -> None:
        before = self._progress
        sums = {"loss": loss * seen.counts[self._objective.units[0]]} | sums
        self._progress = replace(
            before,
            step=before.step + 1,
            tokens=before.tokens + seen.tokens,
            supervised_tokens=before.supervised_tokens + seen.supervised,
            examples=before.examples + seen.examples,
            seconds=before.seconds + seconds,
            sums=_added(before.sums, sums),
            counts=_added(before.counts, seen.counts),
        )

    def _report(self, rate: float, norm: float) -> None:
        """Say how the steps since the last report went."""
        now = self._progress
        self._progress = replace(
            now,
            sums={},
            counts={},
            reported_tokens=now.tokens,
            reported_examples=now.examples,
            reported_seconds=now.seconds,
        )
        seconds = max(now.seconds - now.reported_seconds, 1e-9)
        peak = self._workers.largest(mx.get_peak_memory())
        if not self._workers.first:
            return
        per = {"loss": self._objective.units[0], **self._objective.figures}
        loss, *figures = (now.sums[name] / now.counts[unit] for name, unit in per.items())
        report = Report(
            step=now.step,
            epoch=now.step / self._plan.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=now.tokens,
            supervised_tokens=now.supervised_tokens,
            examples=now.examples,
            tokens_per_second=(now.tokens - now.reported_tokens) / seconds,
            examples_per_second=(now.examples - now.reported_examples) / seconds,
            peak_memory_bytes=int(peak),
            seconds=now.seconds,
            figures=dict(zip(self._objective.figures, figures, strict=True)),
        )
        self._run.log(report.as_entry())
        self._reporter.reported(report)

    def _measure(self) -> bool:
        """Held-out figures; the adapter is kept if it is the best so far, which is returned."""
        if not self._held_out:
            return False
        now, self.measuring = self._progress, True
        with self._between_steps(f"while the held-out loss was measured {_after(now.step)}"):
            figures = held_out_figures(
                self._model,
                self._held_out,
                self._objective,
                batch_size=self._train.batch_size,
                layout=self._plan.layout,
                workers=self._workers,
            )
        self.measuring = False
        if not math.isfinite(figures["loss"]):
            raise TrainingDiverged(
                f"the held-out loss is {figures['loss']} after step {now.step}",
                where=str(self._run.path),
                remedy='lower train.learning_rate; with model.dtype = "float16" take "bfloat16" or '
                '"float32"',
            )
        value = figures[self._objective.best.figure]
        best = self._objective.best.better(value, now.best)
        if not best:
            self._progress = replace(now, no_better=now.no_better + 1)
        else:
            self._progress = replace(now, best=value, best_step=now.step, no_better=0)
            if now.step:
                self._keep(self._run.best_adapter)
        if self._workers.first:
            epoch = now.step / self._plan.steps_per_epoch
            measured = {f"held_out_{name}": figure for name, figure in figures.items()}
            self._run.log({"step": now.step, "epoch": epoch} | measured)
            self._reporter.measured(now.step, figures, best)
        return best

    def _keep(self, path: Path) -> None:
        """Write the adapter."""
        if self._workers.first:
            with self._saving(), atomic_folder(path, overwrite=True) as folder:
                save_adapter(folder, self._model, base=self._base)

    def _share_state(self) -> None:
        self._progress = share_state(self._workers, self._model, self._optimizer, self._progress)

    def _saving(self) -> AbstractContextManager[None]:
        return self._between_steps(f"while the adapter was saved {_after(self._progress.step)}")

    def _save(self) -> None:
        with self._saving():
            self._share_state()
            if not self._workers.first:
                return
            path = save_checkpoint(
                self._run.checkpoints,
                self._model,
                self._optimizer,
                self._progress,
                keep=self._checkpoint.keep,
            )
        self._reporter.saved(path)

    def _diverged(self, batches: list[Batch], loss: float) -> TrainingDiverged:
        own = " ".join(str(r) for b in batches for r in b.records)
        records = sorted(int(r) for text in self._workers.texts(own) for r in text.split())
        good = checkpoints(self._run.checkpoints)
        what = f"the loss became {loss}" if not math.isfinite(loss) else "the gradient overflowed"
        return TrainingDiverged(
            f"{what} at step {self._progress.step + 1}, on records {', '.join(map(str, records))}",
            where=str(self._run.path),
            remedy="lower train.learning_rate, raise train.warmup_ratio, or look at those "
            f"records; last good checkpoint: {good[-1] if good else 'none yet'}",
        )


def _after(step: int) -> str:
    return f"after step {step}" if step else "before training"


def _added(totals: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return {name: totals.get(name, 0.0) + value for name, value in more.items()}


@dataclass(frozen=True)
class _Seen:
    """What a step sees, over all workers: the objective's units, tokens and groups of samples."""

    counts: dict[str, float]
    tokens: int
    supervised: int
    examples: int


@dataclass(frozen=True)
class _Begun:
    """A step that is being computed."""

    batches: list[Batch]
    seen: _Seen
    result: StepResult
