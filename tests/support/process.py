"""The environment of a process that runs tests, and the processor time that it takes."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

_LIBRARIES = ("MKL_NUM", "OMP_NUM", "OPENBLAS_NUM", "RAYON_NUM", "VECLIB_MAXIMUM")
THREADS = tuple(f"{name}_THREADS" for name in _LIBRARIES)
_KERNELS = Path(__file__).parents[2] / ".cache/kernels"

# After so many seconds something hangs: ten times what the longest wait is on an idle machine.
HANGS = 600

# Processor seconds of processes that are not children of this one; see `support.program`.
elsewhere = 0.0
# Ids of child processes that live as long as this one.
kept: set[int] = set()


def prepare() -> None:
    """Set the environment; call it before MLX or NumPy is imported."""
    # A shell's background processes ignore it; tests interrupt themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        # There is a worker for each core.
        os.environ.update(dict.fromkeys(THREADS, "1"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # mistral.rs keeps keys and values as MLX keeps them here.
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    # Where pytest keeps the folders of the last three sessions.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    own = tempfile.mkdtemp(prefix="mlxtune-test-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    # Tokens that tests make are theirs alone, and go with them.
    os.environ["MLXTUNE_CACHE"] = f"{own}/cache"
    # On a CPU, MLX compiles kernels with the system's C++ compiler into $TMPDIR/mlx, a second
    # each. They are kept for the next time; and of two processes that share the folder one
    # may load what the other is still writing, so each has its own.
    kernels = _KERNELS / (worker or "alone")
    kernels.mkdir(parents=True, exist_ok=True)
    Path(own, "mlx").symlink_to(kernels)
    os.environ["TMPDIR"] = tempfile.tempdir = own


def processor_seconds() -> float:
    """Of this process, and of the processes that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system + elsewhere
