"""The machine that a plan is made for: this one, or a Mac by the name of its chip."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlxtune.bench.chips import Chip, find_chip, measured_products, working_set_bytes
from mlxtune.bench.cost import Rates, cost_of, measure_rates
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.results import measured_rates
from mlxtune.bench.step import StepModel
from mlxtune.data.pack import pack
from mlxtune.device import device_name, on_cpu
from mlxtune.errors import StorageError
from mlxtune.files import cache_folder, write_json
from mlxtune.layers.routes import device_key
from mlxtune.memory import budget_of_mac, machine_memory, memory_budget
from mlxtune.recipe.load import parse_recipe

# Of the memory's bandwidth as it is printed, what operations on each element reach.
_OF_BANDWIDTH = 0.8
# Of the arithmetic rate as it is printed, what large products reach: llama.cpp's prompts
# come to 0.69 to 0.77 of it on the chips of which both are known (`bench.chips`).
_OF_ARITHMETIC = 0.7
# Launching a kernel, when thousands follow one another.
_OVERHEAD = 2e-6
PUBLISHED = "published rates of the chip"


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Attributes:
        name: for people.
        budget: bytes that training may take.
        memory: bytes that it has; 0 where that is not known.
        gpu: whether it computes on a GPU.
        rates: None where no rate of its chip is known.
        measured: whether the rates were measured, on it or on one like it; else they are
            estimates from what is published of its chip.
        here: whether it is the machine at hand.
        basis: where the rates are from, in words.
    """

    name: str
    budget: int
    gpu: bool
    rates: Rates | None
    measured: bool
    here: bool = False
    basis: str = PUBLISHED
    memory: int = 0


CACHE = "rates.json"
# What was measured while other programs ran, where nothing better is known: it holds for this
# process, and is not kept.
_while_busy: dict[tuple[Path, str], Rates] = {}
_MEASURED = "rates measured here"
# Of all processors, how many programs may want in the last minute before a machine is busy.
_OCCUPIED = 0.75


def this_machine(
    *, remembered: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Machine:
    """The machine at hand.

    Beside other programs a machine seems many times slower than it is, so what was measured on
    it while it was idle is taken before anything that is measured then.

    Args:
        remembered: take the rates that were measured the last time, if they were.
        progress: called with a line if they are measured now, which takes some seconds, or if other
            programs want the processors.
    """
    file, key = cache_folder() / CACHE, device_key()
    last, occupied = _read(file).get(key), busy()
    rates, basis = last, _MEASURED
    if last is not None and occupied:
        basis += " before; the machine is busy with other programs now, so it will take longer"
        if not remembered:
            progress(
                "this machine is busy with other programs, so it is not measured again: the rates "
                "of the last time are taken; measure when it is idle"
            )
    elif last is None or not remembered:
        rates, disturbed = _measured(file, key, remembered, occupied, progress)
        basis += ", while it was busy: an idle one may be several times faster" * disturbed
    assert rates is not None
    return Machine(
        device_name(),
        memory_budget(),
        not on_cpu(),
        rates,
        measured=True,
        here=True,
        basis=basis,
        memory=machine_memory(),
    )


def busy() -> bool:
    """Whether other programs want a good part of the processors.

    A rate that is too low stays until somebody measures again, so this is stricter than what
    the choice of routes asks (`mlxtune.layers.routes.busy`).
    """
    return os.getloadavg()[0] > _OCCUPIED * (os.cpu_count() or 1)


def _measured(
    file: Path, key: str, remembered: bool, occupied: bool, progress: Callable[[str], None]
) -> tuple[Rates, bool]:
    """Rates measured now, and whether other programs disturbed that."""
    if remembered and (file, key) in _while_busy:
        return _while_busy[file, key], True
    progress("measuring this machine for the plan: products, memory, a small training step")
    rates = measure_rates()
    rates = replace(rates, efficiency=_efficiency(rates))
    if disturbed := occupied or busy():
        _while_busy[file, key] = rates
        progress(
            "this machine is busy with other programs: what was measured is not kept, and the "
            "plan's time may be several times too long"
        )
    else:
        _remember(file, _read(file) | {key: rates})
    return rates, disturbed


# A model of common proportions, small enough to be run in half a second on a CPU.
_REFERENCE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 4,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
# Fewer tokens where these would take longer than a moment.
_REFERENCE_LENGTHS = ((100, 80, 60, 120, 90, 70, 150, 40), (100, 40), (24,))
_MOMENT = 0.5


def _efficiency(rates: Rates) -> float:
    """What a step of a small model reaches of what the rates promise."""
    recipe = parse_recipe(
        {"name": "reference", "model": {"path": "reference"}, "data": [{"path": "reference"}]},
        where="reference",
    )
    dtype = "float32" if on_cpu() else "bfloat16"
    model = StepModel(recipe, _REFERENCE, None, dtype)
    for lengths in _REFERENCE_LENGTHS:
        batch = pack(samples_of(lengths))
        promised = cost_of(model.graph(batch), rates).seconds
        if promised < _MOMENT:
            break
    model.materialize()
    steps = 4 if promised < _MOMENT else 2
    return promised / model.measure(batch, steps=steps).seconds


def _remember(file: Path, rates: dict[str, Rates]) -> None:
    with suppress(StorageError):
        write_json(file, {name: asdict(each) for name, each in rates.items()})


def _read(file: Path) -> dict[str, Rates]:
    """The rates that were measured; none, if the file is not what was written."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: Rates(**value | {"products": tuple((a, b) for a, b in value["products"])})
            for key, value in entries.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def mac(chip: str, memory_gb: float | None) -> Machine:
    """A Mac.

    Args:
        chip: such as "M2 Pro".
        memory_gb: as sold; by default the least that the chip is sold with.

    Raises:
        ChipError: there is no such chip, or it is not sold with that much memory.
        RunError: the file with what was measured on it is damaged.
    """
    found = find_chip(chip, memory_gb)
    if memory_gb is None:
        memory_gb = min(found.memory_gb)
    known = measured_rates(found)
    rates, basis = published_rates(found), PUBLISHED
    if known is not None:
        rates, file = known
        basis = f"rates measured on this chip: {file.name}"
    return Machine(
        f"{found}, {memory_gb:g} GB",
        budget_of_mac(int(memory_gb * 2**30), working_set_bytes(memory_gb)),
        gpu=True,
        rates=rates,
        measured=known is not None,
        basis=basis,
        memory=int(memory_gb * 2**30),
    )


def published_rates(chip: Chip) -> Rates | None:
    """Rates as they may be expected from what is published; None where no arithmetic rate is."""
    printed = None if chip.matrix_units else chip.float16_rate or chip.float32_rate
    rate = chip.prefill_rate or (printed and _OF_ARITHMETIC * printed) or measured_products(chip)
    if not rate:
        return None
    moved = _OF_BANDWIDTH * chip.bandwidth
    # Powers are hidden behind the memory that they are read from.
    return Rates(((1.0, rate),), rate, moved, moved / 2, _OVERHEAD)
