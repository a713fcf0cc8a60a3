"""The program as a process."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from support import process
from support.faults import Failing, as_json
from support.process import HANGS

_PROGRAM = (sys.executable, "-m", "mlxtune")
_TESTS = Path(__file__).parents[1]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def environment() -> dict[str, str]:
    """Of the program as a process: it does without torch, and is not run once more for a BLAS."""
    own = {"MLXTUNE_BLAS": "off", "HF_HUB_OFFLINE": "1"}
    folders = [str(_TESTS), str(_TESTS / "support/site"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, folders))
    kept = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return kept | own | {"PYTHONPATH": path}


# Before any test has changed it.
_OF_FORKS = environment()


def _at_import(environ: dict[str, str]) -> dict[str, str]:
    """What is read when the program and its libraries are imported, not later by a fork."""
    read = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LD_PRELOAD", "PYTHONPATH")
    return {name: environ[name] for name in read if name in environ}


def mlxtune(
    *arguments: str, cwd: Path, fault: Failing | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program: on Linux in a fork, which spares its imports.

    Args:
        arguments: of the program.
        cwd: where it runs.
        fault: what fails in it.
    """
    environ = environment()
    if sys.platform != "linux" or _at_import(environ) != _at_import(_OF_FORKS):
        return mlxtune_afresh(*arguments, cwd=cwd, fault=fault)
    forks = _forks()
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        asked = {"arguments": arguments, "cwd": str(cwd), "environment": environ}
        asked |= {"stdout": str(stdout), "stderr": str(stderr)}
        asked |= {} if fault is None else {"fault": asdict(fault)}
        forks.stdin.write(json.dumps(asked) + "\n")
        forks.stdin.flush()
        status, seconds = json.loads(forks.stdout.readline())
        process.elsewhere += seconds
        return subprocess.CompletedProcess(
            arguments, status, stdout.read_text("utf-8"), stderr.read_text("utf-8")
        )


def mlxtune_afresh(
    *arguments: str, cwd: Path, stdin: str | None = None, fault: Failing | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    failing = (sys.executable, "-m", "support.faults", "" if fault is None else as_json(fault))
    return subprocess.run(
        [*(_PROGRAM if fault is None else failing), *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
        **given,
    )


@contextmanager
def running(*arguments: str, cwd: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """The program while it runs; at the end of the block it is killed, with all its children.

    Args:
        arguments: of the program.
        cwd: where it runs.
        environ: what is different in its environment.
    """

    def begin() -> None:
        os.setsid()
        for number in _SIGNALS:  # which nohup, or a shell in the background, ignores
            signal.signal(number, signal.SIG_DFL)

    started = subprocess.Popen(
        [*_PROGRAM, *arguments],
        cwd=cwd,
        env=environment() | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=begin,
    )
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def wait_until(condition: Callable[[], Any], of: subprocess.Popen[str] | None = None) -> None:
    """Wait for a condition.

    Args:
        condition: asked again and again.
        of: the process that is to bring it about.

    Raises:
        AssertionError: the process has ended without, or the condition takes so long that
            something hangs.
    """
    end = time.monotonic() + HANGS
    while not condition():
        if of is not None and of.poll() is not None and not condition():
            raise AssertionError(f"it ended with {of.returncode}: {of.communicate()[1]}")
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


@cache
def _forks() -> subprocess.Popen[str]:
    forks = subprocess.Popen(
        [sys.executable, "-c", "from support import forks; forks.serve()"],
        env=_OF_FORKS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.kept.add(forks.pid)
    atexit.register(forks.communicate)  # at the end of its stdin it ends
    return forks
