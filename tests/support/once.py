"""Folders that take long to make, made by one of several processes and used by all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Once:
    """Makes each folder once for all pytest-xdist workers; the others wait for it.

    Args:
        root: a folder that the workers share.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self._root = root

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name. Do not change what is in it.

        Args:
            name: of the folder, and of the lock beside it.
            make: called with the path of an empty folder; if it fails, the next one that
                asks begins anew.
        """
        path, done = self._root / name, self._root / f"{name}.done"
        with FileLock(self._root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                done.touch()
        return path
