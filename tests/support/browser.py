"""Chromium, without a network and without a word on its console."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.process import HANGS
from support.skips import lacking

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    """Run a page in Chromium; nothing may turn up on its console."""
    done = subprocess.run(
        [_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
         "--host-resolver-rules=MAP * ~NOTFOUND", *arguments],
        capture_output=True, text=True, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@pytest.fixture
def browser(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Chromium with arguments."""
    if _CHROMIUM is None:
        lacking("chromium is not installed")
    return lambda *arguments: browse(*arguments, profile=tmp_path / "profile")
