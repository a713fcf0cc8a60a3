"""How a run asks its model: the values of the chat template's variables, settled once.

transformers leaves such variables undefined, and llama.cpp, with it Ollama, asks every model to
think that can. A model that was tuned on plain answers would then meet a prompt that it never
saw. So a run asks for what its data has: it lets the model think if any record has reasoning,
and tells it not to if none has. The recipe that is kept with the run says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from mlxtune.data.answers import Answers
from mlxtune.data.chat import ChatTemplate
from mlxtune.data.records import Turn
from mlxtune.data.render import Renderer
from mlxtune.data.template_values import (
    SWITCHES,
    TemplateValues,
    dates_of_its_own,
    variables_of,
    without_values,
    writes_today,
)
from mlxtune.data.writing import Writing
from mlxtune.errors import DataError, RecipeError
from mlxtune.models.load import write_values
from mlxtune.models.resolve import ModelSource
from mlxtune.recipe.schema import ModelSection, Recipe
from mlxtune.train.corpus import source_of
from mlxtune.train.model import rows_of, template_values, tokenizer_of

_KWARGS = "model.chat_template_kwargs"
# Other ways to ask for thoughts and for none, of templates whose switch does not.
_EFFORT = "reasoning_effort"
_LEVELS = {True: ("high",), False: ("none", "no_think")}
# The publishers' defaults, which llama.cpp's server changes: it keeps the reasoning of earlier
# answers.
_HISTORY = {
    "clear_thinking": True,
    "drop_thinking": True,
    "truncate_history_thinking": True,
    "preserve_thinking": False,
}
_QUESTION = Turn("user", "a question")
_ANSWER = Turn("assistant", "an answer")


@dataclass(frozen=True)
class Asking:
    """A recipe that says how its model is asked.

    Attributes:
        recipe: with `model.chat_template_kwargs` and `model.chat_template_date`.
        tokenizer: of its model, mlx-lm's wrapper, with these values in its chat template.
        rows: how many tokens its model has rows for; None where its config says nothing.
        notes: what was chosen, and why.
    """

    recipe: Recipe
    tokenizer: Any
    rows: int | None
    notes: tuple[str, ...] = ()

    def renderer(self) -> Renderer:
        """What turns conversations into the model's tokens."""
        return Renderer(self.tokenizer, rows=self.rows)


def settled(recipe: Recipe, source: ModelSource | None = None) -> Asking:
    """The recipe with what it leaves open of the way in which the model is asked.

    Args:
        recipe: checked.
        source: where its model is, if that is known.

    Raises:
        RecipeError: the chat template does not use a key of `model.chat_template_kwargs`.
    """
    # First: what is no model has no tokenizer either.
    rows = rows_of(recipe.model, source)
    tokenizer = tokenizer_of(recipe.model, source)
    template = ChatTemplate(tokenizer)
    if not template.source:
        if recipe.model.chat_template_kwargs:
            raise RecipeError("the model has no chat template", where=_KWARGS)
        return Asking(recipe, tokenizer, rows)
    known = set().union(*(variables_of(text) for text in _texts(tokenizer)))
    _require_known(recipe.model, known)
    given = recipe.model.chat_template_kwargs
    chosen = {n: v for n, v in _defaults(tokenizer, known).items() if n not in given}
    notes = []
    if chosen:
        notes.append(
            f"the chat template is given {_toml(chosen)}: its publisher's defaults, which "
            f"llama.cpp's server would change ({_KWARGS})"
        )
    switches = known & {*SWITCHES, _EFFORT}
    if switches and not switches & given.keys():
        thinking = has_reasoning(recipe)
        if mode := _mode(tokenizer, known, thinking=thinking):
            why = "records have" if thinking else "no record has"
            notes.append(f"the model is asked with {_toml(mode)}, as {why} reasoning ({_KWARGS})")
        chosen |= mode
    day = recipe.model.chat_template_date
    if day is None and any(map(writes_today, _texts(tokenizer))):
        day = date.today().isoformat()
        notes.append(f"the chat template writes the date, here {day} (model.chat_template_date)")
    section = recipe.model.model_copy(
        update={
            "chat_template_kwargs": {**recipe.model.chat_template_kwargs, **chosen},
            "chat_template_date": day,
        }
    )
    if (values := template_values(section)) is not None:
        write_values(tokenizer, values)
    return Asking(recipe.model_copy(update={"model": section}), tokenizer, rows, tuple(notes))


def asked_as(recipe: Recipe, before: Recipe) -> Recipe:
    """A recipe that asks as a run does, where it says nothing else.

    Args:
        recipe: that the run is to go on with.
        before: of the run.
    """
    section = recipe.model
    kept = before.model.chat_template_kwargs
    section = section.model_copy(
        update={
            "chat_template_kwargs": {**kept, **section.chat_template_kwargs},
            "chat_template_date": section.chat_template_date or before.model.chat_template_date,
        }
    )
    return recipe.model_copy(update={"model": section})


def has_reasoning(recipe: Recipe) -> bool:
    """Whether any record that is trained on has reasoning in an answer."""
    return any(_reasons(turn, tag) for turn, tag in _answers(recipe))


def _answers(recipe: Recipe) -> Iterator[tuple[Turn, str]]:
    for section in recipe.data:
        if section.reasoning == "drop":
            continue
        source = source_of(section)
        for row in source.rows():
            try:
                turns = source.parse(row).turns
            except DataError:  # which is said where the record is tokenized
                continue
            yield from ((t, section.reasoning_tags[0]) for t in turns if t.role == "assistant")


def _reasons(turn: Turn, tag: str) -> bool:
    return bool(turn.reasoning.strip()) or turn.content.lstrip().startswith(tag)


def _texts(tokenizer: Any) -> list[str]:
    own = tokenizer.chat_template
    texts = own.values() if isinstance(own, dict) else [own]
    return [without_values(str(text)) for text in texts if text]


def _require_known(section: ModelSection, known: set[str]) -> None:
    for name in section.chat_template_kwargs:
        if name not in known:
            uses = f"it uses {', '.join(sorted(known))}" if known else "it uses none"
            raise RecipeError(f"the chat template has no variable {name!r}: {uses}", where=_KWARGS)


def values_for(tokenizer: Any, *, thinking: bool) -> dict[str, Any]:
    """Values with which a tokenizer's chat template is asked for thoughts, or for none."""
    known = set().union(*(variables_of(text) for text in _texts(tokenizer)))
    return _mode(tokenizer, known, thinking=thinking) | _defaults(tokenizer, known)


def _defaults(tokenizer: Any, known: set[str]) -> dict[str, Any]:
    """The template's own defaults of variables that llama.cpp's server sets to other values."""
    dates = (dates_of_its_own(text) for text in _texts(tokenizer))
    history = {name: value for name, value in _HISTORY.items() if name in known}
    return history | {name: day for found in dates for name, day in found.items()}


def _mode(tokenizer: Any, known: set[str], *, thinking: bool) -> dict[str, Any]:
    """Values with which the template lets the model think, or does not."""
    # Where there is no place for reasoning, it is written into the answer.
    thinking = thinking and Answers(ChatTemplate(tokenizer)).thoughts is not None
    switches: dict[str, Any] = {name: thinking for name in SWITCHES if name in known}
    switches = dict([*switches.items()][:1])
    if _EFFORT not in known or _fits(tokenizer, switches, thinking):
        return switches
    for level in _LEVELS[thinking]:
        tried = {**switches, _EFFORT: level}
        if _fits(tokenizer, tried, thinking):
            return tried
    return switches


def _fits(tokenizer: Any, values: dict[str, Any], thinking: bool) -> bool:
    """Whether an answer with reasoning, or one without, is what a template so asks for."""
    own = tokenizer.chat_template
    if not isinstance(own, str):
        return True
    noted: list[str] = []
    answer = replace(_ANSWER, reasoning="a thought") if thinking else _ANSWER
    try:
        tokenizer.chat_template = TemplateValues(values).written_into(own)
        answers = Answers(ChatTemplate(tokenizer))
        answers.of([_QUESTION, answer], 1, (), Writing(), noted.append)
    except Exception:  # a template may refuse any conversation, in any way
        return False
    finally:
        tokenizer.chat_template = own
    return not noted


def _toml(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} = {str(value).lower() if isinstance(value, bool) else json.dumps(value)}"
        for name, value in values.items()
    )
