"""What MLX says when the GPU fails, as errors that say what to do about it.

MLX raises a RuntimeError for all of it, so that only the text tells what happened. The texts are
those of MLX's sources: `mlx/backend/metal/device.cpp` (what Metal says of a command buffer),
`mlx/backend/metal/allocator.cpp`, and `allocator.cpp`, `utils.cpp` and `cublas_utils.cpp` in
`mlx/backend/cuda`. A GPU computes later than it is asked to: the error may come out of any
later call that waits for it.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from mlxtune.errors import GpuFailed, MlxtuneError, OutOfMemory

Kind = Literal["memory", "buffer", "resources", "watchdog", "timeout", "other"]

_BUFFER = re.compile(
    r"\[metal::malloc\] Attempting to allocate (\d+) bytes which is greater than the maximum "
    r"allowed buffer size of (\d+) bytes"
)
_RESOURCES = re.compile(r"\[metal::malloc\] Resource limit \((\d+)\) exceeded")
# Earlier versions of MLX say `[malloc_or_wait]`.
_MALLOC = re.compile(r"\[(?:metal::)?malloc(?:_or_wait)?\] Unable to allocate (\d+) bytes")
_METAL = re.compile(r"\[METAL\] Command buffer execution failed: (.+)")
_METAL_KINDS: tuple[tuple[str, Kind], ...] = (
    ("Insufficient Memory", "memory"),
    ("ErrorOutOfMemory", "memory"),
    ("Impacting Interactivity", "watchdog"),
    ("ErrorImpactingInteractivity", "watchdog"),
    ("GPU Timeout", "timeout"),
    ("ErrorTimeout", "timeout"),
    ("GPU Hang", "timeout"),
    ("ErrorHang", "timeout"),
)
# MLX writes the call as it stands in its source, and what CUDA calls its error.
_CUDA = re.compile(r"\bcu(?:da)?[A-Z]\w*\(.*?\) failed: ([^\n]+)", re.DOTALL)
_CUDA_KINDS: tuple[tuple[str, Kind], ...] = (
    ("out of memory", "memory"),
    ("launch timed out", "timeout"),
    # The rest that may befall a device: others, such as an invalid argument, are mistakes of
    # the program.
    ("illegal memory access", "other"),
    ("unspecified launch failure", "other"),
    ("misaligned address", "other"),
    ("uncorrectable ECC error", "other"),
    ("hardware stack error", "other"),
    ("unknown error", "other"),
)
# CUBLAS_STATUS_ALLOC_FAILED
_CUBLAS = re.compile(r"\bcublas\w*\(.*?\) failed with code: 3\.", re.DOTALL)

# What helps where it is not known what was computed.
_LESS = {
    "memory": "close other programs, and try again",
    "buffer": "compute less at once: fewer or shorter texts, or a smaller model",
    "resources": "compute less at once: fewer or shorter texts, or a smaller model",
}

# Operations to a command buffer, where Metal has 20 to 50 by default: with fewer the GPU is given
# less to do at once.
_FEWER = "MLX_MAX_OPS_PER_BUFFER=4"


@dataclass(frozen=True)
class Fault:
    """What happened to the GPU, or to a machine that has no memory left.

    Attributes:
        kind: `memory`, a single `buffer` that is too large, too many `resources`, the display's
            `watchdog`, a `timeout`, or `other`.
        text: what MLX or Python says.
        asked: bytes that were to be allocated, if they are named.
        allowed: the most that is: bytes of a buffer, or how many resources.
        of_gpu: whether it is the GPU's; otherwise the machine's.
    """

    kind: Kind
    text: str
    asked: int | None = None
    allowed: int | None = None
    of_gpu: bool = True

    @property
    def is_out_of_memory(self) -> bool:
        """Whether what takes less memory would not have met it."""
        return self.kind in ("memory", "buffer", "resources")


def fault_in(text: str) -> Fault | None:
    """The GPU's fault that a text of MLX tells of; None if it tells of none."""
    if found := _BUFFER.search(text):
        return Fault("buffer", text, asked=int(found[1]), allowed=int(found[2]))
    if found := _RESOURCES.search(text):
        return Fault("resources", text, allowed=int(found[1]))
    if found := _MALLOC.search(text):
        return Fault("memory", text, asked=int(found[1]))
    if found := _METAL.search(text):
        return Fault(_kind(found[1], _METAL_KINDS) or "other", text)
    if (found := _CUDA.search(text)) and (kind := _kind(found[1], _CUDA_KINDS)):
        return Fault(kind, text)
    return Fault("memory", text) if _CUBLAS.search(text) else None


def fault_of(error: BaseException | None) -> Fault | None:
    """The fault that an error comes from, or those that it was raised for; None if from none."""
    while error is not None:
        if isinstance(error, MemoryError):
            return Fault("memory", str(error), of_gpu=False)
        if isinstance(error, RuntimeError) and (fault := fault_in(str(error))) is not None:
            return fault
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one that less memory would have avoided.

    That is memory itself, the GPU's or the machine's, a buffer larger than the GPU allows, or
    more buffers than it allows.
    """
    if isinstance(error, OutOfMemory):
        return True
    fault = fault_of(error)
    return fault is not None and fault.is_out_of_memory


def as_user_error(
    error: BaseException,
    *,
    doing: str = "",
    where: str | None = None,
    less: str | None = None,
    command: str | None = None,
) -> MlxtuneError | None:
    """A failure of the GPU, or memory that ran out, as a user error.

    Args:
        error: what was raised.
        doing, where, less, command: as `user_error` takes them.

    Returns:
        None where it is no such failure.
    """
    if isinstance(error, MlxtuneError):  # which says already what to do
        return error if isinstance(error, OutOfMemory | GpuFailed) else None
    fault = fault_of(error)
    if fault is None:
        return None
    told = user_error(fault, doing=doing, where=where, less=less, command=command)
    for note in getattr(error, "__notes__", ()):
        told.add_note(note)
    return told


def user_error(
    fault: Fault,
    *,
    doing: str = "",
    where: str | None = None,
    less: str | None = None,
    command: str | None = None,
    limit: int | None = None,
) -> MlxtuneError:
    """What to tell people of a fault.

    Args:
        fault: what happened.
        doing: when, such as `at step 12`.
        where: the place, such as a run's folder.
        less: what to do to take less memory; by default what helps any program.
        command: what to type to go on after another fault; by default to try again.
        limit: bytes that MLX may take (`train.memory_limit`), if that is known.
    """
    when = f" {doing}" if doing else ""
    told: MlxtuneError
    if fault.is_out_of_memory:
        remedy = less or _LESS[fault.kind]
        told = OutOfMemory(_too_much(fault, when, limit), where=where, remedy=remedy)
    else:
        what, in_short = _stopped(fault, when)
        told = GpuFailed(what, where=where, remedy=_way_on(fault, command), in_short=in_short)
    if fault.text:  # what people look for on the web, and report
        said = " ".join(fault.text.split())[:300]
        told.add_note(f"  {'MLX' if fault.of_gpu else 'Python'} says: {said}")
    return told


def _too_much(fault: Fault, when: str, limit: int | None) -> str:
    if fault.kind == "buffer":
        return (
            f"the GPU was to hold an array of {_size(fault.asked)}{when}, and allows one of "
            f"{_size(fault.allowed)} at most"
        )
    if fault.kind == "resources":
        return f"MLX held {fault.allowed:,} arrays at once{when}, and the GPU allows no more"
    told = f"{'the GPU' if fault.of_gpu else 'this machine'} ran out of memory{when}"
    details = []
    if fault.asked is not None:
        details.append(f"there was no room for {_size(fault.asked)} more")
    if (peak := _peak()) > 0:
        of = "" if limit is None else f" of the {_size(limit)} that it may (train.memory_limit)"
        details.append(f"MLX had taken up to {_size(peak)}{of}")
    return f"{told}: {', and '.join(details)}" if details else told


def _stopped(fault: Fault, when: str) -> tuple[str, str]:
    """The whole sentence, and its few words."""
    if fault.kind == "watchdog":
        return (
            f"macOS stopped the GPU{when}, because the display had to wait for it",
            "stopped by macOS, because the display had to wait",
        )
    if fault.kind == "timeout":
        return (
            f"the GPU was stopped{when}, because one piece of work took it too long",
            "the GPU took too long",
        )
    reason = (_METAL.search(fault.text) or _CUDA.search(fault.text) or [fault.text] * 2)[1]
    in_short = f"the GPU failed: {' '.join(reason.split()).rstrip('.')[:100]}"
    return f"the GPU failed{when}", in_short


def _way_on(fault: Fault, command: str | None) -> str:
    if fault.kind == "watchdog":
        first = "let the display sleep, or close programs that draw on it"
        return f"{first}, and {f'go on: {command}' if command else 'try again'}"
    if fault.kind == "timeout":
        first = "close other programs that use the GPU, and give it less to do at once"
        if command is not None and command.startswith("mlxtune"):
            return f"{first}: {_FEWER} {command}"
        return f"{first} ({_FEWER} in the environment): {command or 'try again'}"
    return f"go on: {command}" if command else "try again"


def _kind(reason: str, kinds: tuple[tuple[str, Kind], ...]) -> Kind | None:
    return next((kind for sign, kind in kinds if sign in reason), None)


def _peak() -> int:
    """The most bytes that MLX has held; 0 where it was never imported."""
    mx: Any = sys.modules.get("mlx.core")
    try:
        return 0 if mx is None else int(mx.get_peak_memory())
    except RuntimeError:  # no device at all
        return 0


def _size(count: int | None) -> str:
    """Bytes for people."""
    count = count or 0
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
