"""What an export keeps of itself, by which it is known to be the one that is asked for again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxtune.errors import OutputExists
from mlxtune.files import sha256

REPORT = "export.json"
# Of the file that is handed over.
SIZE = "bytes"

# What is told of a value that differs from what is asked for.
_DIFFERENT = {
    "file_type": "it is of another type",
    "kind": "its matrices are quantized otherwise",
    "pre": "it has another pre-tokenizer",
    "adapter": "it was made of another adapter",
    "imatrix": "it was made with another importance matrix, or with none",
    "calibration": "it was made with other texts to calibrate on, or with none",
    "keep_template": "its chat template is written otherwise (--keep-template)",
    "modelfile": "its Modelfile says something else",
    SIZE: "the file is not as long as it was when it was written",
}


def of_weights(folder: Path) -> dict[str, str]:
    """Name to SHA-256 of an adapter's weights."""
    # A checkpoint has the optimizer's state beside them.
    return {file.name: sha256(file) for file in sorted(folder.glob("adapter*.safetensors"))}


def of_file(path: Path | None) -> str | None:
    """SHA-256 of a file; None where none is given."""
    if path is None:
        return None
    return sha256(path) if path.is_file() else "of no file"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an export keeps; None where no export is."""
    try:
        record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def require_same(folder: Path, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    """See that an export is what would be written now.

    Args:
        folder: of the export.
        record: what it keeps.
        wanted: what it would keep, by the same keys.

    Raises:
        OutputExists: it is another.
    """
    for key, value in wanted.items():
        if record.get(key) != value:
            raise different(folder, _DIFFERENT[key])


def different(folder: Path, how: str) -> OutputExists:
    """What to raise for an export that is not the one asked for."""
    return OutputExists(
        f"this exists already, and {how}; nothing was written or handed over",
        where=str(folder),
        remedy="pass --overwrite to write it anew, or choose another place with --output",
    )
