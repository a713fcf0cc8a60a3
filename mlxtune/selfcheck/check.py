"""A check, what it finds, and what is measured while it runs."""

from __future__ import annotations

import gc
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PASSED, FAILED, LEFT_OUT, NOT_RUN = "passed", "failed", "left out", "not run"
# Frames of a traceback that are kept: where it happened, and what called that.
_FRAMES = 6
# Characters of an error's own text.
_TEXT = 2000


@dataclass(frozen=True)
class Difference:
    """How far something is from what it should be.

    Attributes:
        what: is compared, and with what.
        value: relative to the largest value.
        allowed: most that it may be.
    """

    what: str
    value: float
    allowed: float

    @property
    def exceeds(self) -> bool:
        """Whether it is more than allowed, or no number."""
        return not self.value <= self.allowed


@dataclass(frozen=True)
class Found:
    """What a check comes back with; it has failed if it raises, too.

    Attributes:
        differences: from what was expected.
        figures: what else was measured, as JSON takes it.
        errors: what did not work at all.
    """

    differences: tuple[Difference, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One entry of the registry."""

    name: str
    function: Callable[[], Found]


class LeftOutError(Exception):
    """A check cannot be done here; its text says why."""


@dataclass(frozen=True)
class Outcome:
    """A check that was run.

    Attributes:
        name: of the check.
        state: `passed`, `failed`, `left out` or `not run`.
        seconds: that it took.
        peak_bytes: most memory that MLX held while it ran.
        kept_bytes: what MLX holds more than before, after all was let go of.
        host_peak_bytes: most memory that the process has had until now.
        differences: see `Found`.
        figures: see `Found`.
        errors: what did not work, as text.
    """

    name: str
    state: str
    seconds: float = 0.0
    peak_bytes: int = 0
    kept_bytes: int = 0
    host_peak_bytes: int = 0
    differences: tuple[Difference, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For a file; JSON has no NaN and no infinity, which become text."""
        values: dict[str, Any] = _finite(asdict(self))
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Outcome:
        """What `as_json` made."""
        differences = tuple(
            Difference(each["what"], float(each["value"]), float(each["allowed"]))
            for each in values["differences"]
        )
        rest = {"differences": differences, "errors": tuple(values["errors"])}
        return cls(**values | rest)


def run_check(check: Check) -> Outcome:
    """Run a check; whatever it raises is part of what comes out."""
    before = _held()
    mx.reset_peak_memory()
    begun = time.perf_counter()
    found, state = Found(), PASSED
    try:
        found = check.function()
        # MLX computes late: what is wrong may show here.
        mx.synchronize()
        if found.errors or any(each.exceeds for each in found.differences):
            state = FAILED
    except LeftOutError as error:
        found, state = Found(errors=(str(error),)), LEFT_OUT
    except Exception as error:
        found, state = Found(errors=(told(error),)), FAILED
    seconds, peak = time.perf_counter() - begun, mx.get_peak_memory()
    return Outcome(
        check.name,
        state,
        seconds,
        peak,
        _held() - before,
        _host_peak(),
        found.differences,
        found.figures,
        found.errors,
    )


def told(error: BaseException) -> str:
    """An error with the places it passed, without the folders that they are in."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = [
        f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}"
        for frame in frames
    ]
    return "\n  ".join([f"{type(error).__name__}: {str(error)[:_TEXT]}", *places])


def distance(got: mx.array, want: mx.array) -> float:
    """Largest difference, relative to the largest value; infinite where shapes differ."""
    if got.shape != want.shape:
        return math.inf
    # In NumPy, so that the device which is checked has no part in it.
    ours, theirs = (np.array(each.astype(mx.float32)) for each in (got, want))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _held() -> int:
    """Bytes that MLX holds when all that can be let go of is."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def _host_peak() -> int:
    """Most bytes that this process has had; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
