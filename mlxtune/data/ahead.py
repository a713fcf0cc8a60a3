"""Prepare what comes next while the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
_POLL = 0.1


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made before they are asked for.

    A thread of its own makes them. What it raises is raised here, where the item would have
    been; when the caller stops asking (`close`), so does the thread.
    """
    made: Queue[tuple[bool, T | BaseException | None]] = Queue(depth)
    stopped = Event()

    def put(item: tuple[bool, T | BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                made.put(item, timeout=_POLL)
            except Full:
                continue
            return

    def make() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    Thread(target=make, name="ahead", daemon=True).start()
    try:
        while True:
            more, item = made.get()
            if more:
                yield item  # type: ignore[misc]  # `more` says that it is an item
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        stopped.set()
