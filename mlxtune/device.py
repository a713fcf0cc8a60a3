"""The device that MLX runs on, and a real BLAS where it is a CPU.

MLX's Linux wheel for CPUs is linked to reference BLAS (3 GFLOP/s in float32 on two
cores). A BLAS preloaded into the process takes its place: MKL or OpenBLAS multiply about
90 times faster. Preloading has to happen before the process starts, so the program runs
itself once more.

    python -m mlxtune.device COMMAND…    # run any Python program that way
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from mlxtune.install import explained, pip_install

SWITCH = "MLXTUNE_BLAS"
_DONE = "preloaded"

# Debian's and Fedora's places for OpenBLAS, where the `mkl` wheel is not installed.
_OPENBLAS = (
    "/usr/lib/{arch}-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/{arch}-linux-gnu/libopenblas.so.0",
    "/usr/lib64/libopenblas.so.0",
)

# MLX frees and takes whole activations all the time. By default glibc gives each one
# back to the system, which clears the pages again: a sixth of a training step.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}
# Threads of MKL that wait for each other in a loop keep the one they wait for off its core:
# where another program wants the cores too, a training step took five times as long. Without
# any loop each of a step's thousands of products waits for the system to wake a thread.
_THREADS = {"GOMP_SPINCOUNT": "2000"}


_assumed_gpu: ContextVar[bool] = ContextVar("assumed_gpu", default=False)


def on_cpu() -> bool:
    """Whether MLX computes on a CPU here."""
    import mlx.core as mx

    return not _assumed_gpu.get() and bool(mx.default_device() == mx.cpu)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Take the ways that are taken on a GPU, to see what they are; nothing is computed there."""
    token = _assumed_gpu.set(True)
    try:
        yield
    finally:
        _assumed_gpu.reset(token)


# Where launchers say which of several processes this is, and how many there are.
_RANKS = (
    ("MLX_RANK", "MLX_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def worker_rank() -> int | None:
    """This process's rank among those that a launcher started together; None if alone."""
    hosts = os.environ.get("MLX_HOSTFILE")
    # What `mlx.launch -n 1` gives is an empty file.
    if hosts and Path(hosts).is_file() and not Path(hosts).read_text(encoding="utf-8").strip():
        return None
    for rank, size in _RANKS:
        if os.environ.get(rank, "").isdigit() and os.environ.get(size) != "1":
            return int(os.environ[rank])
    return None


def device_name() -> str:
    """What MLX runs on, for people: `Apple M2 Pro`, or a CPU's architecture."""
    import mlx.core as mx

    if on_cpu():
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return str(mx.device_info().get("device_name", "GPU"))


def gpu_cores() -> int | None:
    """How many cores this Mac's GPU has, by which chips of one name differ; None elsewhere."""
    if platform.system() != "Darwin":
        return None
    command = ("system_profiler", "SPDisplaysDataType", "-json")
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return cores_of(json.loads(told.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def cores_of(displays: object) -> int | None:
    """The number of cores in what macOS's `system_profiler SPDisplaysDataType -json` says."""
    found = displays.get("SPDisplaysDataType") if isinstance(displays, dict) else None
    for adapter in found if isinstance(found, list) else ():
        if isinstance(adapter, dict) and str(adapter.get("sppci_cores", "")).isdigit():
            return int(adapter["sppci_cores"])
    return None


def find_blas() -> Path | None:
    """A BLAS to preload: MKL's wheel in this environment, else the system's OpenBLAS."""
    for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"), reverse=True):
        return path
    for pattern in _OPENBLAS:
        path = Path(pattern.format(arch=platform.machine()))
        if path.exists():
            return path
    return None


def needs_blas() -> bool:
    """Whether this process would multiply on MLX's reference BLAS and may be told not to."""
    return (
        sys.platform == "linux"
        and os.environ.get(SWITCH, "") not in ("off", _DONE)
        and not any(name in os.environ.get("LD_PRELOAD", "") for name in ("mkl_rt", "blas"))
        and on_cpu()
    )


def blas_remedy() -> str:
    """What brings a BLAS that `find_blas` finds."""
    if platform.machine() == "x86_64":
        return pip_install("mkl")
    return "install OpenBLAS: sudo apt install libopenblas0-pthread"


def say_blas(blas: Path | None) -> None:
    """Say on stderr which BLAS is preloaded, or that none was found and how to get one."""
    if blas is None:
        line = (
            "mlxtune: MLX multiplies with its reference BLAS here, about 90 times slower than "
            f"this machine can\n  {blas_remedy()}"
        )
    else:
        line = f"mlxtune: computing on the CPU with {blas.name} ({SWITCH}=off to do without)"
    print(line, file=sys.stderr)


def run_with_blas(command: list[str], say: Callable[[Path | None], None] = say_blas) -> None:
    """Replace this process by `command` with a BLAS preloaded.

    Returns only where that is not needed, or no BLAS is found.

    Args:
        command: a program's path and its arguments.
        say: is called with the BLAS, or with None where none is found.
    """
    if not needs_blas():
        return
    blas = find_blas()
    if not worker_rank():  # the first of several speaks for all
        say(blas)
    if blas is None:
        return
    preload = " ".join(filter(None, [str(blas), os.environ.get("LD_PRELOAD")]))
    environment = _MALLOC | _THREADS | os.environ | {"LD_PRELOAD": preload, SWITCH: _DONE}
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _main() -> None:
    command = sys.argv[1:]
    program = shutil.which(command[0]) if command else None
    if program is None:
        sys.exit("usage: python -m mlxtune.device COMMAND…")
    command = [program, *command[1:]]
    try:
        run_with_blas(command)
    except ImportError as error:
        if (said := explained(error)) is None:
            raise
        sys.exit(f"error: {said}")
    os.execv(program, command)


if __name__ == "__main__":
    _main()
