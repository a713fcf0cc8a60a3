"""Read a recipe: TOML, `--set` overrides, and every error at once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mlxtune.errors import MlxtuneError, RecipeError
from mlxtune.recipe.foreign import FOREIGN_NAMES, FOREIGN_VALUES, of_another_program
from mlxtune.recipe.schema import PrepSection, Recipe
from mlxtune.recipe.section import name_from

Table = TypeVar("Table", bound=BaseModel)


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a TOML file. Without a `name` the run is called after the file.
        overrides: `section.key=value`, the value as TOML or, failing that, as text.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    values = read_toml(path, "recipe", remedy="`mlxtune init` writes one")
    values.setdefault("name", name_from(path.stem))
    for override in overrides:
        override_value(values, override)
    return parse_recipe(values, where=str(path))


def read_toml(path: Path, kind: str, *, remedy: str) -> dict[str, Any]:
    """The values of a TOML file.

    Args:
        path: the file.
        kind: what it is, for messages.
        remedy: what to do where it does not exist.

    Raises:
        RecipeError: it is missing, cannot be read or is no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no such {kind}", where=str(path), remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        if kind == "recipe" and path.is_file() and (other := of_another_program(None, path)):
            raise other from None
        raise RecipeError(f"the {kind} cannot be read: {error}", where=str(path)) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        if kind == "recipe" and (other := of_another_program(text, path)) is not None:
            raise other from None
        raise RecipeError(f"this is not valid TOML: {error}", where=str(path)) from None


def load_prep(
    path: Path | None, overrides: Iterable[str], values: dict[str, Any]
) -> tuple[PrepSection, int]:
    """The `[prep]` table and the seed of a recipe, or of none.

    Args:
        path: a recipe.
        overrides: `key=value` in that table.
        values: what overrides both.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    recipe = load_recipe(path) if path is not None else None
    table = {"prep": recipe.prep.model_dump(exclude_none=True) if recipe is not None else {}}
    for override in overrides:
        override_value(table, f"prep.{override.removeprefix('prep.')}")
    table["prep"] |= values
    # A recipe around it, so that its errors are told as those of any recipe.
    around = {"name": "prep", "model": {"path": "-"}, "data": [{"path": "-"}]}
    where = str(path) if path is not None else "--set"
    return parse_recipe(around | table, where=where).prep, recipe.seed if recipe else 0


def parse_recipe(values: dict[str, Any], *, where: str) -> Recipe:
    """Check decoded values against the schema.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    return validated(Recipe, values, "recipe", where=where)


def validated(schema: type[Table], values: dict[str, Any], kind: str, *, where: str) -> Table:
    """Values checked against a schema; all that is wrong is told together.

    Args:
        schema: of the whole file.
        values: decoded.
        kind: what the file is, for messages.
        where: the file.

    Raises:
        RecipeError: with all that is wrong in `problems`.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        details = _causes(error.errors(include_url=False))
        problems = tuple(_problem(detail, schema) for detail in details)
    count = "one thing is" if len(problems) == 1 else f"{len(problems)} things are"
    raise RecipeError(f"{count} wrong in this {kind}", where=where, problems=problems)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, defaults written out; reading it gives an equal recipe."""
    values = recipe.model_dump(exclude_none=True)
    lines = [_assignment(k, v) for k, v in values.items() if not isinstance(v, dict | tuple)]
    for key, value in values.items():
        tables = [(f"[{key}]", value)] if isinstance(value, dict) else []
        if isinstance(value, tuple):
            tables = [(f"[[{key}]]", table) for table in value]
        for header, table in tables:
            lines += ["", header, *(_assignment(k, v) for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _assignment(key: str, value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{_plain(k)} = {_plain(v)}" for k, v in value.items())
        return f"{key} = {{{pairs}}}"
    return f"{key} = {_plain(list(value) if isinstance(value, tuple) else value)}"


def _plain(value: Any) -> str:
    # A JSON string, number, boolean or list of strings is the same in TOML, but that TOML
    # has no surrogate pairs and wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def override_value(values: dict[str, Any], override: str) -> None:
    """Put what `section.key=value` says into nested tables.

    Raises:
        RecipeError: it is of another form, or there is no such table.
    """
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(
            f"{override!r} is not of the form section.key=value",
            where="--set",
            remedy="for example --set train.learning_rate=1e-4",
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": text.strip()}
    if parsed.keys() != {"value"}:
        raise RecipeError(f"{override!r} sets more than one key", where="--set")
    table: Any = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if isinstance(table, list) and len(table) == 1:
            table = table[0]
        if not isinstance(table, dict):
            raise RecipeError(
                f"{part!r} is no single table, so {key!r} cannot be set", where="--set"
            )
    table[parts[-1]] = parsed["value"]


def _causes(details: list[Any]) -> list[Any]:
    """Errors without those that only follow: a wrong item makes its list too short."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if not any(
            place != detail["loc"] and place[: len(detail["loc"])] == detail["loc"]
            for place in places
        )
    ]


# What pydantic says in Python's words.
_IN_TOML_WORDS = {
    "model_type": "should be a table",
    "dict_type": "should be a table",
    "tuple_type": "should be a list",
    "too_short": "should not be empty",
}


def _problem(detail: Any, schema: type[BaseModel]) -> MlxtuneError:
    """One pydantic error as one of ours."""
    location: tuple[str | int, ...] = detail["loc"]
    where = ""
    for part in location:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    if detail["type"] == "extra_forbidden":
        return MlxtuneError("unknown key", where=where, remedy=_suggest(location, schema))
    if detail["type"] == "missing":
        return MlxtuneError("is missing", where=where)
    if location == ("data",) and isinstance(detail["input"], dict):
        return MlxtuneError("is a single table", where=where, remedy="write [[data]]")
    if location == ("data",) and isinstance(detail["input"], str):
        below = f"write [[data]] and below it path = {_plain(detail['input'])}"
        return MlxtuneError("should be a list of tables", where=where, remedy=below)
    message = _IN_TOML_WORDS.get(detail["type"], str(detail["msg"]).removeprefix("Value error, "))
    value = detail["input"]
    ours = FOREIGN_VALUES.get(where, {}).get(value) if isinstance(value, str) else None
    # Of a whole table the message says what is wrong in it.
    shown = "" if _is_table(location, schema) else f" (it is {value!r})"
    return MlxtuneError(
        f"{message[0].lower()}{message[1:]}{shown}",
        where=where or None,
        remedy=f"here it is called {ours}" if ours else None,
    )


def _is_table(location: tuple[str | int, ...], schema: type[BaseModel]) -> bool:
    """Whether it is the place of a whole table, or of the file."""
    names = [part for part in location if isinstance(part, str)]
    if len(names) > 1:
        return False
    return not names or bool(_models_in(schema.model_fields[names[0]].annotation))


def _suggest(location: tuple[str | int, ...], schema: type[BaseModel]) -> str:
    *path, key = location
    name = str(key)
    if schema is Recipe and name in FOREIGN_NAMES:
        return f"here it is called {FOREIGN_NAMES[name]}"
    keys = list(_section_at(path, schema).model_fields)
    if close := get_close_matches(name, keys, n=1, cutoff=0.6):
        return f"did you mean {close[0]}?"
    tables = {table: _section_at([table], schema) for table in schema.model_fields}
    elsewhere = [
        f"{table}.{name}"
        for table, section in tables.items()
        if section is not schema and name in section.model_fields
    ]
    if elsewhere:
        return f"it belongs to another table: {elsewhere[0]}"
    return f"keys here: {', '.join(keys)}"


def _section_at(path: list[str | int], schema: type[BaseModel]) -> type[BaseModel]:
    """The schema of the table at a path; that of the whole file for anything else."""
    section = schema
    for part in path:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        inner = _models_in(field.annotation) if field else []
        section = inner[0] if inner else schema
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is not None:
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []
