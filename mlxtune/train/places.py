"""Where what a run's recipe names lies: absolute when it is kept, found again when it was moved.

A project may be moved as a whole, the run in it. So a run keeps, beside each absolute path,
the same place as it is seen from the run's folder.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlxtune.data.sources import HUB
from mlxtune.recipe.schema import Recipe


def with_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """The recipe with its paths changed; names of the hub, packages and Ollama stay."""

    def changed(path: str | None) -> str | None:
        return path if path is None or path.startswith(HUB) else change(path)

    data = tuple(s.model_copy(update={"path": changed(s.path)}) for s in recipe.data)
    evaluation = {"path": changed(recipe.eval.path), "suite": changed(recipe.eval.suite)}
    model = {"chat_template": changed(recipe.model.chat_template)}
    if _is_path(recipe.model.path):
        model["path"] = change(recipe.model.path)
    return recipe.model_copy(
        update={
            "data": data,
            "eval": recipe.eval.model_copy(update=evaluation),
            "model": recipe.model.model_copy(update=model),
            "lora": recipe.lora.model_copy(update={"init_from": changed(recipe.lora.init_from)}),
            "export": recipe.export.model_copy(update={"license": changed(recipe.export.license)}),
        }
    )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it is kept with a run, usable from any folder."""
    return with_paths(recipe, lambda path: str(Path(path).expanduser().absolute()))


def places_of(recipe: Recipe, run: Path) -> dict[str, str]:
    """Each path of a recipe, absolute, and the same place as seen from a run's folder."""
    found: dict[str, str] = {}

    def note(path: str) -> str:
        found[path] = os.path.relpath(path, run.absolute())
        return path

    with_paths(recipe, note)
    return found


def moved_places(places: dict[str, str], run: Path) -> dict[str, str]:
    """Of what is no longer at its absolute place, that place and where it is now.

    Args:
        places: from `places_of`, when the run was made.
        run: its folder, wherever that is now.
    """
    here = {old: os.path.normpath(run.absolute() / seen) for old, seen in places.items()}
    return {old: new for old, new in here.items() if not _is_there(old) and _is_there(new)}


def relocated(name: str, moved: dict[str, str]) -> str:
    """A path, which may be of a file in a folder or of a pattern, as it is after a move."""
    for old, new in moved.items():
        if name == old:
            return new
        with suppress(ValueError):
            return str(_fixed(new) / Path(name).relative_to(_fixed(old)))
    return name


def _is_there(path: str) -> bool:
    return _fixed(path).exists()


def _fixed(path: str) -> Path:
    """What is there of a path: of a pattern the folder it looks in, of `RUN@step-N` the run."""
    fixed = Path(path.partition("@step-")[0])
    while glob.has_magic(str(fixed)) and not fixed.exists():
        fixed = fixed.parent
    return fixed


def _is_path(model: str) -> bool:
    path = Path(model).expanduser()
    return path.is_absolute() or path.exists()
