"""What helps a run that the GPU has ended: less memory, or another try."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mlxtune.errors import MlxtuneError
from mlxtune.gpu_errors import Fault, fault_of, user_error
from mlxtune.memory import GB
from mlxtune.recipe.schema import TrainSection
from mlxtune.train.run import RECIPE

if TYPE_CHECKING:
    from mlxtune.train.loop import Trainer

# The share of a run's budget that is named as the next one to try.
_LESS = 0.8


@dataclass(frozen=True)
class Remedies:
    """What a run can do about a failure of the GPU.

    Args:
        run: its folder.
        train: `[train]` of its recipe.
        budget: bytes that it may take.
        all_checkpointed: whether all blocks are recomputed already, so that none is left.
        alone: whether this process trains it, or several workers do.
    """

    run: Path
    train: TrainSection
    budget: int
    all_checkpointed: bool
    alone: bool = True

    @contextmanager
    def told(self, trainer: Trainer) -> Iterator[None]:
        """Raise a failure of the GPU in the block as a user error.

        Args:
            trainer: whose work the block is.

        Raises:
            OutOfMemory, GpuFailed: with what to do about it.
        """
        try:
            yield
        except MlxtuneError:
            raise
        except Exception as error:
            if (fault := fault_of(error)) is None:
                raise
            raise user_error(
                fault,
                doing=trainer.doing,
                where=str(self.run),
                less=self.less(fault, backward=not trainer.measuring),
                command=self._resume(),
                limit=self.budget,
            ) from error

    def less(self, fault: Fault, *, backward: bool) -> str:
        """How to train in less memory: the change that costs least of those not made yet.

        Args:
            fault: what happened.
            backward: whether there was a backward pass to come, for which blocks keep what they
                compute.
        """
        if not fault.of_gpu:
            return f"close other programs, and go on: {self._resume()}"
        if fault.kind != "buffer":  # which neither of these makes smaller
            if backward and not self.all_checkpointed:
                return f"go on with less: {self._resume('train.gradient_checkpointing=true')}"
            if self.train.memory_limit is None:
                limit = max(0.1, math.floor(10 * _LESS * self.budget / GB) / 10)
                return f"go on with less: {self._resume(f'train.memory_limit={limit:g}')}"
        recipe, size = quote(str(self.run / RECIPE)), self.train.batch_size
        if size == 1:
            return f"see what each change of the recipe would save: mlxtune plan {recipe}"
        smaller = max(n for n in range(1, size) if size % n == 0)
        times = self.train.gradient_accumulation_steps * size // smaller
        anew = f"{recipe} -o {quote(str(self.run))} --overwrite" if self.alone else "--overwrite"
        return (
            "start anew in smaller passes, as many of them to a step: "
            f"{self._lora(anew)} --set train.batch_size={smaller} "
            f"--set train.gradient_accumulation_steps={times}"
        )

    def _resume(self, change: str | None = None) -> str:
        changed = f" --set {change}" if change else ""
        where = f"{quote(str(self.run))} " if self.alone else ""
        return f"{self._lora(f'{where}--resume')}{changed}"

    def _lora(self, arguments: str) -> str:
        # How the launcher of several workers was called is not known here.
        return f"mlxtune lora {arguments}" if self.alone else f"the same command with {arguments}"
