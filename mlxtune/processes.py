"""Other processes of this program, which work for the one that a person started.

Python computes on one core at a time; where what is done is many short calls, threads wait
for each other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")

# What a program that calls mlxtune has to do, since each process reads it again.
GUARD = (
    "it may have run out of memory; and a program of your own that calls mlxtune must do so "
    'under `if __name__ == "__main__":`'
)


class Processes:
    """Processes that are at work for this one; made by `started`."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self._pool = pool
        self._count = count
        with _without_interrupts():
            # A process is started for each task that finds none idle.
            self._started, *_ = [pool.submit(_nothing) for _ in range(count)]

    def map(
        self,
        function: Callable[..., R],
        items: Iterable[tuple[Any, ...]],
        here: Callable[..., R] | None = None,
    ) -> Iterator[R]:
        """What a function gives for each item, in their order.

        Until the others have started, which takes a second or two, this process does it. No
        more than a few items and results are in memory.

        Args:
            function: of a module, so that other processes find it.
            items: its arguments.
            here: what this process calls in its place.

        Raises:
            BrokenProcessPool: a process has ended unasked; see `GUARD`.
        """
        pending: deque[Future[R]] = deque()
        for item in items:
            if not self._started.done():
                yield (here or function)(*item)
                continue
            pending.append(self._pool.submit(function, *item))
            if len(pending) > 2 * self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def started(
    count: int, begin: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[Processes]:
    """Processes, until the end of the block.

    They leave Ctrl-C, which a terminal sends to all, to this one, and end when it does.

    Args:
        count: how many.
        begin: called in each at its start.
        arguments: of `begin`.
    """
    # Started afresh, not forked: the GPU's driver does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (begin, arguments)) as pool:
        try:
            yield Processes(pool, count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def cores() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def threads() -> int:
    """How many threads another library should compute with: `OMP_NUM_THREADS`, else `cores`."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else cores()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in here get no interrupts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _nothing() -> None:
    """A task that is done as soon as a process takes tasks."""


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _leave_with_parent() -> None:
    """End when the process that started this one does: if it was killed, it cannot say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
