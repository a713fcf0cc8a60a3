"""The machine that a plan is made for: this one, or a Mac by the name of its chip."""

from __future__ import annotations

import os
from dataclasses import dataclass

import mlx.core as mx

from mlxtune.bench.chips import Chip, find_chip, working_set_bytes
from mlxtune.bench.cost import Rates, measure_rates
from mlxtune.device import device_name, on_cpu
from mlxtune.errors import ChipError
from mlxtune.train.memory import memory_budget

# Of the memory's bandwidth as it is printed, what operations on each element reach.
_OF_BANDWIDTH = 0.8
# Of the arithmetic rate as it is printed, what large products reach: llama.cpp's prompts
# come to 0.69 to 0.77 of it on the chips of which both are known (`bench.chips`).
_OF_ARITHMETIC = 0.7
# Launching a kernel, when thousands follow one another.
_OVERHEAD = 2e-6


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Attributes:
        name: for people.
        budget: bytes that training may take.
        gpu: whether it computes on a GPU.
        rates: None where no rate of its chip is known.
        measured: whether the rates were measured on it; else they are estimates from what
            is published of its chip.
    """

    name: str
    budget: int
    gpu: bool
    rates: Rates | None
    measured: bool


def this_machine(*, with_rates: bool = True) -> Machine:
    """The machine at hand; measures its rates, which takes two seconds."""
    rates = measure_rates() if with_rates else None
    return Machine(device_name(), memory_budget(None), not on_cpu(), rates, measured=True)


def mac(chip: str, memory_gb: float | None) -> Machine:
    """A Mac.

    Args:
        chip: such as "M2 Pro".
        memory_gb: as sold; by default the least that the chip is sold with.

    Raises:
        ChipError: there is no such chip, or it is not sold with that much memory.
    """
    found = find_chip(chip)
    if memory_gb is None:
        memory_gb = min(found.memory_gb)
    if memory_gb not in found.memory_gb:
        sizes = ", ".join(f"{size:g}" for size in found.memory_gb)
        raise ChipError(
            f"the {found} is not sold with {memory_gb:g} GB", remedy=f"its sizes are {sizes} GB"
        )
    return Machine(
        f"{found}, {memory_gb:g} GB",
        working_set_bytes(memory_gb),
        gpu=True,
        rates=published_rates(found),
        measured=False,
    )


def published_rates(chip: Chip) -> Rates | None:
    """Rates as they may be expected from what is published; None where no arithmetic rate is."""
    printed = chip.float16_rate or chip.float32_rate
    rate = chip.prefill_rate or (printed and _OF_ARITHMETIC * printed)
    if not rate:
        return None
    moved = _OF_BANDWIDTH * chip.bandwidth
    # Powers are hidden behind the memory that they are read from.
    return Rates(((1.0, rate),), rate, moved, moved / 2, _OVERHEAD)


def total_memory() -> int:
    """Bytes of memory of the machine at hand."""
    size = mx.device_info().get("memory_size")
    return int(size or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
