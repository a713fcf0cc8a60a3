"""Annotated recipes to begin with."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mlxtune.errors import OutputExists, RecipeError
from mlxtune.files import write_text


def presets() -> dict[str, str]:
    """Name to summary, which is the first line of each recipe."""
    found = {}
    for file in sorted(_folder().iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            summary = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".toml")] = summary.lstrip("# ")
    return found


def write_preset(path: Path, name: str, *, overwrite: bool = False) -> None:
    """Write the preset `name` to `path`.

    Raises:
        RecipeError: there is no such preset.
        OutputExists: the file exists and `overwrite` is false.
    """
    if name not in presets():
        raise RecipeError(
            f"there is no preset {name!r}",
            where="--preset",
            remedy=f"there are: {', '.join(presets())}",
        )
    if path.exists() and not overwrite:
        raise OutputExists(
            "this exists already; nothing was written",
            where=str(path),
            remedy="name another file, or pass --overwrite",
        )
    write_text(path, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def _folder() -> resources.abc.Traversable:
    return resources.files("mlxtune.recipe") / "templates"
