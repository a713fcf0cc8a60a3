"""Packages that only some steps need, loaded when a step does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mlxtune.errors import DataError
from mlxtune.install import install_extra


def load(module: str, need: str, extra: str = "prep") -> Any:
    """A module of an optional package.

    Raises:
        DataError: it isn't installed; `need` says what it is for.
    """
    try:
        return import_module(module)
    except ImportError:
        raise DataError(
            f"{need} needs another package: {module.partition('.')[0]}",
            remedy=install_extra(extra),
        ) from None
