"""Errors meant for the person at the keyboard.

Each says what is wrong, where (a file and line, a recipe key, a layer) and how to mend
it. The CLI prints them as one block and exits 1; anything else that escapes is a bug.
"""

from __future__ import annotations


class MlxtuneError(Exception):
    """Base of all user errors.

    Args:
        what: one sentence saying what is wrong.
        where: the place, such as `data/train.jsonl:17` or `train.learning_rate`.
        remedy: what to do about it.

    Attributes:
        in_short: a few words for a table or a list; None where `what` is short enough.
    """

    in_short: str | None = None

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.remedy}" if self.remedy else head


class RecipeError(MlxtuneError):
    """A recipe cannot be used. `problems` holds every error found in it."""

    def __init__(self, what: str, *, problems: tuple[MlxtuneError, ...] = (), **kw: str) -> None:
        super().__init__(what, **kw)
        self.problems = problems


class DataError(MlxtuneError):
    """A record, or a file of records, cannot be trained on."""


class ModelError(MlxtuneError):
    """A model cannot be found, read or used."""


class NoPlan(ModelError):
    """What training an architecture takes cannot be known before it is trained."""


class TargetError(ModelError):
    """A target name matches no layer of the model."""


class RunError(MlxtuneError):
    """A run folder is missing, damaged, or not in the state that a verb needs."""


class TrainingDiverged(RunError):
    """The loss or the gradient stopped being a number."""

    in_short = "training diverged"


class WorkerLost(RunError):
    """A worker that this one trains with has ended without a word."""


class WorkerFailed(RunError):
    """Another worker has failed and says so itself; this one ends with it.

    Args:
        rank: of that worker.
        text: what it says.
    """

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"worker {rank} has failed: {text}")
        self.rank = rank


class TooLarge(MlxtuneError):
    """A run would take more memory than there is."""


class OutOfMemory(MlxtuneError):
    """Memory ran out while something was computed: less of it, or more to spare, mends that."""

    in_short = "out of memory"


class GpuFailed(MlxtuneError):
    """The GPU stopped what it computed for another reason than memory.

    Args:
        what, where, remedy: as of `MlxtuneError`.
        in_short: the reason in a few words.
    """

    def __init__(self, what: str, *, in_short: str, **kw: str | None) -> None:
        super().__init__(what, **kw)
        self.in_short = in_short


class ExportError(MlxtuneError):
    """A model cannot be written in the form asked for."""


class OutputExists(MlxtuneError):
    """The place to write to is taken; nothing there was touched."""


class ChipError(MlxtuneError):
    """No chip is known by that name."""


class PackageMissing(MlxtuneError):
    """A Python package that this copy of mlxtune needs is missing, or cannot be loaded."""


class StorageError(MlxtuneError):
    """The disk refused to take a file; what stood there before still stands."""
