"""What this machine has for training and shipping, what it lacks, and how to mend that."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from mlxtune.device import SWITCH, blas_remedy, device_name, find_blas, on_cpu
from mlxtune.errors import ExportError
from mlxtune.export.ollama import Ollama, base_url
from mlxtune.files import cache_folder
from mlxtune.install import explained, pip_install
from mlxtune.watchdog import VARIABLE, is_relaxed

GB = 10**9
# Packages whose versions matter; the last ones are extras.
PACKAGES = ("mlxtune", "mlx", "mlx-lm", "transformers", "gguf", "xllamacpp", "mistralrs")
# A model of some billions of weights, its cache and an export take that much.
_ROOM = 20 * GB
# Of a Mac's memory: what is left to macOS, and from how much on there is something to give.
_FOR_MACOS = 5 * GB
_LEAST_TO_WIRE = 16 * 2**30
_MISTRAL_RS = "https://github.com/EricLBuehler/mistral.rs"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what.
        state: `good`, `missing` where something that may be wanted is not there, or `bad`
            where training suffers from it.
        said: what was found.
        remedy: how to mend it; None where there is nothing to mend.
    """

    topic: str
    state: str
    said: str
    remedy: str | None = None


def examine(folder: Path) -> Iterator[Finding]:
    """Look at this machine, one thing after the other.

    Args:
        folder: where runs are to be written.
    """
    yield _system()
    yield from _mlx()
    yield _versions()
    yield _disk(folder)
    yield _hub()
    yield _ollama()
    yield _program("llama.cpp", "xllamacpp", "brew install llama.cpp", "llama-server", "llama-cli")
    yield _program("mistral.rs", "mistralrs", _MISTRAL_RS, "mistralrs")


def _system() -> Finding:
    said = f"{platform.platform(terse=True)}, {platform.machine()}, Python {sys.version.split()[0]}"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        remedy = "install a Python for Apple silicon: under Rosetta MLX does not run"
        return Finding("system", "bad", said, remedy)
    return Finding("system", "good", said)


def _mlx() -> Iterator[Finding]:
    """All that MLX is asked for; where it cannot be loaded, that alone."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        said = explained(error)
        what, remedy = (said.what, said.remedy) if said else (str(error), None)
        yield Finding("MLX", "bad", what, remedy)
        return
    yield Finding("device", "good", device_name())
    yield _memory()
    yield from _wired_limit()
    if sys.platform == "darwin":
        yield watchdog()
    yield from _blas()


def _memory() -> Finding:
    from mlxtune.memory import machine_memory, memory_budget

    budget = memory_budget()
    said = f"{machine_memory() / GB:.1f} GB, of which training takes up to {budget / GB:.1f}"
    return Finding("memory", "good", f"{said} (train.memory_limit)")


def _wired_limit() -> Iterator[Finding]:
    import mlx.core as mx

    if not mx.metal.is_available():
        return
    info = mx.device_info()
    total, allowed = int(info["memory_size"]), int(info["max_recommended_working_set_size"])
    said = f"the GPU may hold {allowed / GB:.1f} GB"
    megabytes = wired_limit_mb(total)
    if megabytes is not None and allowed < 0.7 * total:
        remedy = f"more, until the next start: sudo sysctl iogpu.wired_limit_mb={megabytes}"
        yield Finding("wired memory", "missing", said, remedy)
    else:
        yield Finding("wired memory", "good", said)


def wired_limit_mb(total: int) -> int | None:
    """How much memory a Mac's GPU may be allowed to hold, in MiB; None to leave it as it is.

    macOS and the programs beside training keep at least a fifth, and never less than 5 GB:
    memory that is wired cannot be taken from the GPU, and a Mac that has too little left stops.
    With less than 16 GB there is nothing to give.

    Args:
        total: bytes of memory.
    """
    if total < _LEAST_TO_WIRE:
        return None
    return min(total * 4 // 5, total - _FOR_MACOS) // 2**20


def watchdog() -> Finding:
    """Whether macOS's GPU watchdog is relaxed for training; see `mlxtune.watchdog`."""
    if is_relaxed():
        return Finding("GPU watchdog", "good", f"relaxed ({VARIABLE}=1)")
    value = os.environ.get(VARIABLE, "")
    said = f"not relaxed ({VARIABLE}={value}): macOS may stop training while a display is on"
    return Finding("GPU watchdog", "missing", said, f"unset {VARIABLE}")


def _blas() -> Iterator[Finding]:
    if not (on_cpu() and sys.platform == "linux"):
        return
    if "mkl" in os.environ.get("LD_PRELOAD", "") or "blas" in os.environ.get("LD_PRELOAD", ""):
        yield Finding("BLAS", "good", Path(os.environ["LD_PRELOAD"].split()[0]).name)
    elif (found := find_blas()) is not None:
        off = os.environ.get(SWITCH) == "off"
        remedy = f"unset {SWITCH}" if off else None
        said = f"{found.name} is there" + (f", and {SWITCH}=off leaves it out" if off else "")
        yield Finding("BLAS", "bad" if off else "good", said, remedy)
    else:
        said = "MLX's reference BLAS: products take about 90 times as long as they could"
        yield Finding("BLAS", "bad", said, blas_remedy())


def _versions() -> Finding:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Finding("packages", "good", ", ".join(found))


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    said = f"{free / GB:.0f} GB free in {folder}"
    kept = cache_folder()
    if kept.exists():
        size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
        said += f"; {size / GB:.1f} GB of tokens kept in {kept}"
    if free < _ROOM:
        remedy = "a model of 7 billion weights, its run and an export want some 20 GB"
        return Finding("disk", "missing", said, remedy)
    return Finding("disk", "good", said)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        said = f"offline (HF_HUB_OFFLINE): only models in {HF_HUB_CACHE}"
        return Finding("hub", "missing", said, "unset HF_HUB_OFFLINE to download models")
    if get_token() is None:
        remedy = "gated models, such as Llama and Gemma, need `hf auth login`"
        return Finding("hub", "missing", "not logged in", remedy)
    return Finding("hub", "good", "logged in")


def _ollama() -> Finding:
    try:
        url = base_url()
        with Ollama() as server:
            return Finding("Ollama", "good", f"{server.version()} at {url}")
    except ExportError as error:
        installed = shutil.which("ollama") is not None
        remedy = "ollama serve" if installed else "https://ollama.com/download"
        return Finding("Ollama", "missing", error.what, remedy)


def _program(topic: str, package: str, remedy: str, *programs: str) -> Finding:
    found = [path for name in programs if (path := shutil.which(name))]
    if (installed := _package(package)) is not None:
        found.append(f"Python package {installed}")
    if found:
        return Finding(topic, "good", ", ".join(found))
    return Finding(topic, "missing", "not found", f"{remedy}, or {pip_install(package)}")


def _package(module: str) -> str | None:
    """The distribution that a module is of, and its version; None where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a mere folder of that name is no package
        return None
    # mistral.rs comes as mistralrs, mistralrs-metal, mistralrs-cuda, …
    names = packages_distributions().get(module, [])
    return ", ".join(f"{name} {version(name)}" for name in sorted(set(names))) or module
