"""Annotated recipes to begin with."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from mlxtune.errors import OutputExists, RecipeError
from mlxtune.files import write_text
from mlxtune.recipe.section import name_from

# All of it is chosen for that model and that data.
_FIXED = "quickstart"


def presets() -> dict[str, str]:
    """Name to summary, which is the first line of each recipe."""
    found = {}
    for file in sorted(_folder().iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            summary = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".toml")] = summary.lstrip("# ")
    return found


def write_preset(
    path: Path,
    name: str,
    *,
    model: str | None = None,
    data: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the preset `name` to `path`.

    Args:
        path: of the recipe.
        name: of the preset.
        model: for `model.path`.
        data: for the path of `[[data]]`; the run is called after it.
        overwrite: replace a file that is there.

    Raises:
        RecipeError: there is no such preset, or it is for one model and its data alone.
        OutputExists: the file exists and `overwrite` is false.
    """
    if name not in presets():
        near = get_close_matches(name, presets(), n=1)
        raise RecipeError(
            f"there is no preset {name!r}",
            where="--preset",
            remedy=f"did you mean {near[0]}?" if near else f"there are: {', '.join(presets())}",
        )
    if name == _FIXED and (model or data):
        raise RecipeError(
            f"the preset {name} is for its own model and data",
            where="--preset",
            remedy=f"take another: {', '.join(other for other in presets() if other != name)}",
        )
    if path.exists() and not overwrite:
        raise OutputExists(
            "this exists already; nothing was written",
            where=str(path),
            remedy="name another file, or pass --overwrite",
        )
    text = (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    if model or data:
        text = _filled(text, model, data)
    write_text(path, text)


def _filled(text: str, model: str | None, data: str | None) -> str:
    from mlxtune.recipe.edit import edited

    changes = {}
    if model:
        changes["model.path"] = model
    if data:
        called = name_from(Path(data.removeprefix("hub:")).stem)
        changes |= {"data.path": data, "name": called}
        text = text.replace("# the run goes to runs/shell", f"# the run goes to runs/{called}")
    return edited(text, changes)


def _folder() -> resources.abc.Traversable:
    return resources.files("mlxtune.recipe") / "templates"
