"""How a chat template writes what the assistant thinks before it answers.

Found by rendering answers with a mark in the place of the reasoning. Some templates write the
reasoning of an answer only if it calls a tool (Gemma 4), and some never do (DeepSeek R1),
though the model is to think: then the tags are those of an empty thought, or the one that the
generation prompt opens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.chat import FIELDS, INLINE, INLINE_TAGS, PARTS, ChatTemplate
from mlxtune.data.records import ToolCall, Turn
from mlxtune.data.template_values import SWITCHES

# Marks that no template holds.
THOUGHT, WORDS = "\u2042thought\u2042", "\u2042words\u2042"

QUESTION = Turn("user", "a question")
_ANSWER = Turn("assistant", WORDS, reasoning=THOUGHT)
_CALL = replace(_ANSWER, content="", tool_calls=(ToolCall("probe", {"a": "b"}, "probe0001"),))
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
_TAG = r"<[^<>\n]*think[^<>\n]*>"
_ANGLE_TAG, _SQUARE_TAG = re.compile(r"<[^<>\s]*>"), re.compile(r"\[[^\[\]<>\s]*\]")
TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
_EMPTY = re.compile(rf"({_TAG})(\s*)({_TAG})", re.IGNORECASE)
_OPEN_END = re.compile(rf"({_TAG})(\s*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Thoughts:
    """How a template writes reasoning.

    Attributes:
        form: where it looks for it, see `ChatTemplate`.
        written: whether it writes that of an answer in words; otherwise `before` and `after`
            are what is to stand around it.
        before, after: tags around reasoning, white space included.
        between: all that stands between reasoning and words, where that is more than `after`.
    """

    form: str
    written: bool
    before: str = ""
    after: str = ""
    between: str = ""

    def closes(self, text: str) -> bool:
        """Whether a text begins with the tag after reasoning."""
        return bool(self.after) and text.lstrip().startswith(self.after.strip())


def find_thoughts(template: ChatTemplate) -> Thoughts | None:
    """How this template writes reasoning; None if it has no place for it."""
    ways = list(_ways(template))
    for options in ways:
        for form in _forms(template.source):
            if (found := _written(template, form, options)) is not None:
                return found
    for options in ways:
        for form in _forms(template.source):
            if (found := _beside_a_call(template, form, options)) is not None:
                return found
    texts = list(_asked_and_answered(template, ways))
    for text in texts:
        if empty := _EMPTY.search(text):
            return _by_tags(empty[1], empty[2], empty[3])
    for text in texts:
        if opened := _OPEN_END.search(text):
            closing = opened[1].replace("<", "</", 1)
            if closing in template.source:
                return _by_tags(opened[1], opened[2], closing)
    return None


def _ways(template: ChatTemplate) -> Iterator[dict[str, Any]]:
    """The options with which a template is tried: none, and each switch both ways."""
    yield {}
    for switch in SWITCHES:
        if switch in template.source:
            yield {switch: True}
            yield {switch: False}


def _forms(source: str) -> Iterator[str]:
    yield from FIELDS
    yield PARTS
    if INLINE_TAGS[1] in source:
        yield INLINE


def _render(template: ChatTemplate, *turns: Turn, **options: Any) -> str:
    """A conversation as the template writes it; empty where it refuses."""
    try:
        return template.text([QUESTION, *turns], **options)
    except Exception:  # a template may refuse any conversation, in any way
        return ""


def _written(template: ChatTemplate, form: str, options: dict[str, Any]) -> Thoughts | None:
    """How it writes the reasoning of an answer in words, if it is put there."""
    text = _render(template, _ANSWER, form=form, **options)
    thought, words = text.find(THOUGHT), text.find(WORDS)
    if not 0 <= thought < words:
        return None
    if form == PARTS and re.search("['\"]thinking['\"]: *['\"]$", text[:thought]):
        return None  # the parts are written as what they are, not read
    opened = text[:thought].rstrip().removesuffix(INLINE_TAGS[0])
    if form == INLINE and opened.rstrip().endswith(INLINE_TAGS):
        return None  # a second tag after the one that the template opens
    between = text[thought + len(THOUGHT) : words]
    return Thoughts(form, True, last_mark(text[:thought]), first_mark(between), between)


def _beside_a_call(template: ChatTemplate, form: str, options: dict[str, Any]) -> Thoughts | None:
    """The tags around the reasoning of an answer that calls a tool."""
    text = _render(template, _CALL, form=form, tools=(_TOOL,), **options)
    bare = _render(template, replace(_CALL, reasoning=""), tools=(_TOOL,), **options)
    thought = text.find(THOUGHT)
    if form in (PARTS, INLINE) or thought < 0 or not bare:
        return None
    start = common(text[:thought], bare)
    after = text[thought + len(THOUGHT) :]
    if not after.endswith(bare[start:]):
        return None
    before, closing = text[start:thought], after.removesuffix(bare[start:])
    if not before and not closing:  # it writes an empty thought where there is none
        before, closing = last_mark(text[:thought]), first_mark(after)
    return Thoughts(form, False, before, closing)


def _asked_and_answered(template: ChatTemplate, ways: list[dict[str, Any]]) -> Iterator[str]:
    """Generation prompts, and an answer in words after a question."""
    for options in ways:
        yield _render(template, ask=True, **options)
        answered = _render(template, replace(_ANSWER, reasoning=""), **options)
        yield answered[: answered.find(WORDS)]


def _by_tags(before: str, between: str, after: str) -> Thoughts:
    """Lines of their own for tags that stand on lines of their own in the template."""
    lines = "\n" in between
    before, after = (f"{before}\n", f"\n{after}\n\n") if lines else (before, after)
    return Thoughts(FIELDS[0], False, before, after)


def first_mark(text: str) -> str:
    """The tag, or else the word, that a text begins with."""
    found = re.match(r"\s*(<[^<>]*>|\[[^\[\]]*\]|\S+)", text)
    return found[1] if found else text


def last_mark(text: str) -> str:
    """The tag, or else the word, that a text ends with, with the white space after it."""
    found = re.search(r"(<[^<>]*>|\[[^\[\]]*\])\s*$", text) or re.search(r"\S+\s*$", text)
    return found[0] if found else text


def common(one: str, other: str) -> int:
    """How many characters two texts begin with alike, not ending inside of a tag.

    A bracket that is not closed as in a tag is said: `[0, 1)`.
    """
    shorter = min(len(one), len(other))
    length = next((n for n in range(shorter) if one[n] != other[n]), shorter)
    for tag in (_ANGLE_TAG, _SQUARE_TAG):
        start = max(0, length - 40)
        begun = (tag.match(text, at) for text in (one, other) for at in range(start, length))
        length = min(
            (found.start() for found in begun if found and found.end() > length), default=length
        )
    return length
