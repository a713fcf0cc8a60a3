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
    text = source.read_text(encoding="utf-8-sig")
    write_text(output, edited(text, changes, overrides))


def edited(text: str, changes: Mapping[str, Any], overrides: Iterable[str] = ()) -> str:
    """A recipe's text with other values of some keys.

    Args:
        text: valid TOML; with one `[[data]]`, if a key of that is changed.
        changes: as in `write_edited`.
        overrides: as in `write_edited`.
    """
    document = tomlkit.parse(text)
    for override in overrides:
        override_value(document, override)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        table: Any = document.setdefault(section, tomlkit.table()) if section else document
        if isinstance(table, list):
            [table] = table
        _put(table, name, value)
    return tomlkit.dumps(document)


def _put(table: Any, name: str, value: Any) -> None:
    """Set a key; a comment behind its value stays in its column."""
    column = _column(table, name)
    table[name] = value
    if (now := _column(table, name)) is not None and column is not None:
        trivia = _item(table, name).trivia
        trivia.comment_ws = " " * max(2, len(trivia.comment_ws) + column - now)


def _column(table: Any, name: str) -> int | None:
    """Where the comment behind a value begins, counted from the value; None without one."""
    item = _item(table, name)
    if item is None or not item.trivia.comment:
        return None
    return len(item.as_string()) + len(item.trivia.comment_ws)


def _item(table: Any, name: str) -> Any:
    container = table if hasattr(table, "item") else table.value  # the document, or a table
    return container.item(name) if name in table else None
