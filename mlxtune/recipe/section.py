"""What all tables of a recipe, and of files like it, have in common."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


def name_from(text: str) -> str:
    """A valid name that is as near to a text, such as a file's name, as can be."""
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._") or "run"


def _valid_name(text: str) -> str:
    other = re.search(r"[^A-Za-z0-9._-]", text)
    if other is not None:
        sign = "a space" if other[0] == " " else repr(other[0])
        raise ValueError(
            f"has {sign} in it: letters, digits, '.', '_' and '-' may be, as in {name_from(text)!r}"
        )
    if not text[:1].isalnum():
        raise ValueError("has to begin with a letter or a digit")
    return text


Name = Annotated[str, AfterValidator(_valid_name)]


class Section(BaseModel):
    """Base of all tables."""

    # Strict: a quoted number is a mistake to be told about, not to be guessed at.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, values: Any) -> Any:
        """A single text where a list of texts is wanted, as PEFT has "all-linear"."""
        if not isinstance(values, dict):
            return values
        single = {
            key: listed(value)
            for key, value in values.items()
            if isinstance(value, str) and key in cls.model_fields and _is_list(cls, key)
        }
        return values | single


def listed(text: str) -> object:
    """`a, b` as a list; what begins like a list, and is none, stays a text to be refused."""
    if text.lstrip().startswith("["):
        return text
    return tuple(part for piece in text.split(",") if (part := piece.strip()))


def _is_list(section: type[BaseModel], key: str) -> bool:
    """Whether a key wants a list of texts, and not one of tables."""
    annotation = section.model_fields[key].annotation
    if get_origin(annotation) is not tuple:
        return False
    inner = get_args(annotation)[0]
    return not (isinstance(inner, type) and issubclass(inner, BaseModel))
