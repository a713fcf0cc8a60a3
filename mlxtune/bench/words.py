"""A plan as people read it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxtune.bench.plan import RunPlan

GB, MB = 10**9, 10**6
_AT_LEAST = "weights, adapters and optimizer alone"
_FIT = "mlxtune plan RECIPE --fit FILE"


def plan_lines(result: RunPlan) -> list[str]:
    """A whole plan."""
    memory, *time = summary_lines(result)
    lines = [
        f"machine  {result.machine}, {result.dtype}",
        f"model    {result.model}",
        f"adapter  {result.parameters_trained / 1e6:.2f} M parameters train",
        f"data     {result.lengths}",
        memory,
        *_left_lines(result),
        *time,
        "",
        parts_line(result),
    ]
    if result.checkpointed_blocks:
        lines.append(
            f"  gradient checkpointing in {result.checkpointed_blocks} of {result.blocks} blocks"
        )
    lines += [f"note     {note}" for note in result.notes]
    if not result.fits:
        lines += ["", *advice_lines(result)]
    return lines


def _left_lines(result: RunPlan) -> list[str]:
    """What the machine keeps for everything but the training."""
    left = result.machine_bytes - result.budget_bytes
    if left <= 0:
        return []
    whole = size(result.machine_bytes)
    return [f"         {size(left)} of {whole} are left to the system and other programs"]


def summary_lines(result: RunPlan) -> list[str]:
    """The two lines that matter: whether it fits, and how long it takes."""
    verdict = "fits" if result.fits else "DOES NOT FIT"
    held_back = ", but these records cannot be trained on as they are"
    after = "" if result.held_back is None else held_back
    taken, there = size(result.peak_memory_bytes), size(result.budget_bytes)
    if result.at_least:
        return [f"memory   at least {taken} of {there}: {verdict} ({_AT_LEAST}){after}"]
    memory = f"memory   {taken} at most of {there}: {verdict} (estimate){after}"
    if result.seconds_per_step is None:
        return [memory, "time     unknown: no arithmetic rate of this chip is published"]
    basis = result.rates
    if not result.measured_rates and result.dtype == "bfloat16":
        basis += ", float16's for bfloat16"
    each = f"{result.seconds_per_step:.2f} s"
    if result.steps is None:
        return [memory, f"time     {each} a step; the records say how many (estimate from {basis})"]
    total = _span(result.seconds_per_step * result.steps)
    return [memory, f"time     {total} for {result.steps} steps of {each} (estimate from {basis})"]


def beyond_line(result: RunPlan) -> str:
    """What is known at once of a recipe that is out of reach as it is."""
    return (
        f"it does not fit as it is: {_AT_LEAST} take {size(result.peak_memory_bytes)} of "
        f"{size(result.budget_bytes)}; looking for what would make it fit"
    )


def parts_line(result: RunPlan) -> str:
    """What the peak is made of, in one unit."""
    unit, name, digits = (GB, "GB", 2) if result.peak_memory_bytes >= GB else (MB, "MB", 1)
    parts = [
        ("weights", result.weights_bytes),
        ("adapters", result.adapters_bytes),
        ("gradients", result.gradients_bytes),
        ("optimizer", result.optimizer_bytes),
    ]
    if not result.at_least:
        parts += [("logits", result.logits_bytes), ("activations", result.activations_bytes)]
    return (
        "  " + "  ".join(f"{part} {value / unit:.{digits}f}" for part, value in parts) + f"  {name}"
    )


def advice_lines(result: RunPlan) -> list[str]:
    """What would make a recipe fit, or that nothing in it would."""
    alone = [advice for advice in result.advice if advice.fits]
    lines = ["what saves memory:"] if result.advice else []
    for advice in result.advice:
        fits = "; fits then" if advice.fits else ""
        less = "at least " * result.at_least + size(advice.saves_bytes)
        lines.append(f"  {assignments(advice.changes)}: {less} less{fits} ({advice.why})")
    if alone:
        return [*lines, f"`{_FIT}` writes a recipe that fits"]
    if result.together:
        return [
            *lines,
            f"together: {assignments(result.together)}: fits; `{_FIT}` writes it",
        ]
    return [*lines, "nothing in the recipe would make it fit: take a smaller model"]


def assignments(changes: dict[str, Any]) -> str:
    """Changes as a recipe has them, in one line."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in changes.items())


def size(count: int) -> str:
    """Bytes, in the unit that one says them in."""
    if count >= GB:
        return f"{count / GB:.2f} GB"
    return f"{count / MB:.0f} MB" if count >= 10 * MB else f"{count / MB:.1f} MB"


def _span(seconds: float) -> str:
    """A time, in the unit that one says it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
