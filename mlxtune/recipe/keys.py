"""All keys that a recipe may have, and the values of those that are a choice."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from mlxtune.recipe.schema import Recipe


@cache
def keys() -> dict[str, tuple[str, ...]]:
    """Dotted keys as `--set` takes them, to the values there are; () where any may be."""
    found: dict[str, tuple[str, ...]] = {}
    for name, field in Recipe.model_fields.items():
        table = table_in(field.annotation)
        if table is None:
            found[name] = values_of(field.annotation)
            continue
        for key, inner in table.model_fields.items():
            found[f"{name}.{key}"] = values_of(inner.annotation)
    return found


def table_in(annotation: Any) -> type[BaseModel] | None:
    """The schema of a table, of a list of tables or of one that may be left out."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (table_in(part) for part in get_args(annotation))
    return next((table for table in inner if table is not None), None)


def values_of(annotation: Any) -> tuple[str, ...]:
    """The words, numbers and truth values that a key takes, if these are all it takes."""
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    return tuple(value for part in get_args(annotation) for value in values_of(part))
