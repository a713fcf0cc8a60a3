"""Run checks in another process, so that one which ends the process ends no other.

An error of Metal may end it without an exception that Python could catch, and a GPU may hang.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from mlxtune.selfcheck.check import FAILED, NOT_RUN, Outcome

COMMAND = (sys.executable, "-m", "mlxtune.selfcheck.worker")
# Characters of what a process has printed that are kept when it ends.
_TAIL = 2000


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Attributes:
        begin: no check is begun after that.
        end: all are ended then.
        check: a check may take.
    """

    begin: float = 540.0
    end: float = 590.0
    check: float = 180.0


def run_checks(
    names: Sequence[str],
    *,
    limits: Limits = Limits(),
    command: Sequence[str] = COMMAND,
    begins: Callable[[str], None] = lambda _: None,
) -> Generator[Outcome]:
    """Run checks one after another, and give back what came of each.

    Args:
        names: of checks in the registry.
        limits: of the time that they take.
        command: starts the process that runs them, see `worker`.
        begins: called with the name of each check before it runs.
    """
    started = time.monotonic()
    with (
        TemporaryDirectory(prefix="mlxtune-check-") as folder,
        _Workers(command, folder) as workers,
    ):
        for name in names:
            gone = time.monotonic() - started
            if gone >= limits.begin:
                reason = f"no check is begun after {limits.begin:.0f} seconds"
                yield Outcome(name, NOT_RUN, errors=(reason,))
                continue
            begins(name)
            yield workers.outcome(name, min(limits.check, limits.end - gone))


class _Workers:
    """A process that runs checks, and another when it has ended."""

    def __init__(self, command: Sequence[str], folder: str) -> None:
        self._command, self._folder = command, folder
        self._worker: _Worker | None = None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def outcome(self, name: str, seconds: float) -> Outcome:
        """Run a check; it has failed if it takes longer, or ends its process."""
        begun = time.monotonic()
        if self._worker is None:
            self._worker = _Worker(self._command, self._folder)
        worker = self._worker
        try:
            line = worker.ask(name, seconds)
        except TimeoutError:
            reason = f"it was ended after {seconds:.0f} seconds"
        else:
            if line:
                return Outcome.from_json(json.loads(line))
            reason = f"{worker.ending()}\n{worker.printed()}".strip()
        self._end()
        return Outcome(name, FAILED, time.monotonic() - begun, errors=(reason,))


class _Worker:
    """One process that runs checks."""

    def __init__(self, command: Sequence[str], folder: str) -> None:
        self._read, write = os.pipe()
        self._printed = Path(folder, "printed")
        # What checks write goes with the folder, and nothing is remembered or fetched.
        own = {"TMPDIR": folder, "MLXTUNE_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                [*command, str(write)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                env=os.environ | own,
                start_new_session=True,  # Ctrl-C is for the process that waits
            )
        os.close(write)

    def ask(self, name: str, seconds: float) -> bytes:
        """The line that is said of a check; nothing if the process ends instead.

        Raises:
            TimeoutError: it takes longer.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{name}\n".encode())
            self._process.stdin.flush()
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            if not (more := os.read(self._read, 1 << 16)):
                return b""
            line += more
        return line

    def ending(self) -> str:
        """How the process ended."""
        code = self._process.wait()
        if code >= 0:
            return f"the process that computed has ended with {code}"
        return f"the process that computed has ended by {signal.Signals(-code).name}"

    def printed(self) -> str:
        """The last that the process printed."""
        return self._printed.read_bytes().decode("utf-8", "replace")[-_TAIL:]

    def kill(self) -> None:
        """End the process, and close what it was connected by."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        os.close(self._read)
