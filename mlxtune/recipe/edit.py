"""Change keys of a recipe file and leave the rest of it, comments too, as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomlkit

from mlxtune.files import require_no_file, write_text
from mlxtune.recipe.load import override_value


def write_edited(
    source: Path,
    output: Path,
    changes: Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Write a recipe with other values of some keys.

    Args:
        source: a recipe that loads.
        output: where to write it.
        changes: dotted keys, such as `train.batch_size`, to their values.
        overrides: `section.key=value`, as `load_recipe` takes them; changes come after them.
        overwrite: replace a file that is there.

    Raises:
        OutputExists: the file is there.
        StorageError: the disk refuses it.
    """
    require_no_file(output, overwrite)
    document = tomlkit.parse(source.read_text(encoding="utf-8-sig"))
    for override in overrides:
        override_value(document, override)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        table: Any = document.setdefault(section, tomlkit.table()) if section else document
        table[name] = value
    write_text(output, tomlkit.dumps(document))
