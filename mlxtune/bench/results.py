"""What `mlxtune bench` keeps of a machine: files with its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlxtune
from mlxtune.bench.chips import Chip
from mlxtune.bench.cost import Rates
from mlxtune.errors import RunError, StorageError
from mlxtune.files import cache_folder, storage_errors, write_json

Figures = dict[str, Any]

# Of a workload that was run.
_OF_A_STEP = (
    "seconds", "peak_bytes", "tokens_per_second", "examples_per_second",
    "model_flops_utilisation", "planned_seconds", "planned_peak_bytes",
)  # fmt: skip
# Files of before these were kept.
_OVERHEAD, _EFFICIENCY = 2e-6, 1.0


def write_figures(figures: Figures, folder: Path) -> Path:
    """Keep the figures of a machine in a file that bears its name.

    Raises:
        StorageError: the disk refuses it.
    """
    path = folder / file_name(machine_name(figures))
    write_json(path, figures)
    return path


def remember_figures(figures: Figures) -> None:
    """Keep them for this user's plans too, wherever they are made; if they can be kept."""
    with suppress(StorageError):
        write_figures(figures, _own_folder())


def require_folder(folder: Path) -> None:
    """Make a folder for results, before minutes go into them.

    Raises:
        StorageError: there can be none.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def machine_name(figures: Figures) -> str:
    """Of the machine that was measured, as `Chip` names a Mac's: `M2 Pro (19-core GPU)`."""
    name = str(figures["device"]).removeprefix("Apple ")
    cores = figures.get("gpu_cores")
    return name if cores is None else f"{name} ({cores}-core GPU)"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_name(machine: str) -> str:
    """Of a machine's figures."""
    return f"bench-{slug(machine)}.json"


def read_figures(folder: Path) -> list[Figures]:
    """What `write_figures` kept in a folder, by device.

    Raises:
        RunError: a file is not what it wrote.
    """
    return [read_file(path) for path in sorted(folder.glob("bench-*.json"))]


def read_file(path: Path) -> Figures:
    """The figures of one machine.

    Raises:
        RunError: the file is not what `write_figures` writes, or lacks figures.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(figures["device"], str) or not isinstance(figures["rates"], dict):
            raise TypeError
        missing = [what for row in figures["workloads"] for what in _missing(row)]
    except (OSError, ValueError, KeyError, TypeError):
        raise _refused("it is not what `mlxtune bench` writes", path) from None
    if missing:
        raise _refused(f"it lacks {', '.join(missing)}", path)
    found: Figures = figures
    return found


def _missing(row: Figures) -> Iterator[str]:
    """Figures that a workload's row should have."""
    name = row["workload"]
    if not isinstance(name, str):
        raise TypeError
    if "left_out" in row:
        return
    for key in _OF_A_STEP:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{key} of {name!r}"


def rates_of(figures: Figures, *, where: Path) -> Rates:
    """The rates of a machine from its figures.

    Raises:
        RunError: the file lacks them.
    """
    rates = figures["rates"]
    try:
        sizes = sorted((float(size) ** 3, float(rate)) for size, rate in rates["products"].items())
        if not sizes:
            raise ValueError
        return Rates(
            products=tuple(sizes),
            packed=float(rates["packed_products"]["64"]),
            bytes=float(rates["bytes"]),
            powers=float(rates["powers"]),
            overhead=float(rates.get("overhead", _OVERHEAD)),
            efficiency=float(rates.get("efficiency", _EFFICIENCY)),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _refused("it lacks the machine's rates", where) from None


def measured_rates(chip: Chip) -> tuple[Rates, Path] | None:
    """What `mlxtune bench` measured on a chip, and the file; None where nobody did.

    It is looked for where results are kept: below this folder, in the checkout that mlxtune
    runs from, and among what this user measured anywhere.

    Raises:
        RunError: its file is not what `mlxtune bench` writes.
    """
    for folder in _folders():
        path = folder / file_name(str(chip))
        if path.is_file():
            return rates_of(read_file(path), where=path), path
    return None


def _folders() -> Iterator[Path]:
    results = Path("benchmarks", "results")
    yield results
    yield Path(mlxtune.__file__).parents[1] / results
    yield _own_folder()


def _own_folder() -> Path:
    return cache_folder() / "bench"


def _refused(what: str, path: Path) -> RunError:
    return RunError(what, where=str(path), remedy="measure again with `mlxtune bench`")
