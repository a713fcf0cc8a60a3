"""Where things lie, records as files, and what a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHELL_TRAIN = ROOT / "data/shell/train.jsonl"

SHELL_HELDOUT = ROOT / "data/shell/heldout.jsonl"

# Real pairs that are not part of this project; see `beside`.
SHARED = ROOT.parent / "shared/data"


def beside(name: str) -> Path:
    """A file of real pairs that lies beside the checkout; without it the test is skipped."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside this checkout")
    return path


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path, hidden ones too, with its size and time of change."""
    paths = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(p.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for p, stat in paths}
