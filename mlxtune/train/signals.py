"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlxtune.train.distributed import Workers


@contextmanager
def stop_on_signals(workers: Workers) -> Iterator[list[int]]:
    """The first Ctrl-C asks for a stop after this step; the second stops at once.

    So do SIGTERM, which a machine that shuts down sends, or a queue whose time is up, and the
    loss of the terminal (SIGHUP), as which Ctrl-C comes to workers on another machine. To one
    worker of several SIGTERM means that another has ended, and is left alone; so is what was
    ignored already, as `nohup` has it.

    Yields:
        The signals that have come.
    """
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGINT and signal.SIGINT in asked
        asked.append(number)
        if number == signal.SIGHUP:
            _write_to_no_terminal()
        if again:
            raise KeyboardInterrupt
        workers.ask_to_stop()

    numbers = [signal.SIGINT, signal.SIGHUP, *([signal.SIGTERM] if workers.size == 1 else [])]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, ask) for number in heard]
    try:
        yield asked
    finally:
        for number, handler in zip(heard, before, strict=True):
            signal.signal(number, handler)


def _write_to_no_terminal() -> None:
    """What is written to a terminal that is gone would be an error, before all is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
