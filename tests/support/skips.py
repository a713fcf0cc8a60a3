"""Skipping what a machine lacks, though not where CI has installed it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip a test; with CI in the environment, where nothing may go unseen, fail it."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{reason}, and CI is set: .ci/run installs it")
    pytest.skip(reason)
