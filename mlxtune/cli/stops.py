"""Signals that end the program as Ctrl-C does: what is half written is removed on the way."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal has asked for an end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


def stop_on_signals() -> None:
    """Have SIGTERM, and the loss of the terminal, raise `Stopped` from here on.

    A machine that shuts down sends the first, and a queue whose time is up. What is ignored
    already stays so, as `nohup` has it; training hears them in a way of its own.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)
