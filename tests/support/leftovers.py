"""A pytest plugin: no test file leaves a process behind.

Linux only. Processes whose parent has ended become children of this one, so that they are seen.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from support import process

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
_ENDING = 20.0  # seconds that a process may take to end


def pytest_configure() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    if nextitem is None or nextitem.path != item.path:
        end = time.monotonic() + _ENDING
        while (left := _left()) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left:
            pytest.fail(f"{item.path.name} leaves processes behind: {left}", pytrace=False)
    return result


def _left() -> dict[int, str]:
    """Command lines of child processes that run and are not to live as long as this one."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid() and state != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(folder.name) not in process.kept and "resource_tracker" not in command:
                    found[int(folder.name)] = command
    return found
