"""A model's chat template: turns to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtune.data.records import ToolCall, Turn
from mlxtune.data.template_values import without_values
from mlxtune.errors import ModelError
from mlxtune.gguf.templates import applied

Tools = Sequence[Any]

# Where templates look for what the assistant thinks: a field of the message, a part of its
# content (`parts`), or tags inside its content (`inline`), which some templates split off.
FIELDS = ("reasoning_content", "reasoning", "thinking")
PARTS, INLINE = "parts", "inline"
INLINE_TAGS = ("<think>", "</think>")


class ChatTemplate:
    """Turns conversations into text with a tokenizer's template.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or mlx-lm's wrapper around one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = _unwrapped(tokenizer)

    @property
    def source(self) -> str:
        """The Jinja text, or all of them where there are several; empty if there is none."""
        return str(self._tokenizer.chat_template or "")

    def text(
        self,
        turns: Sequence[Turn],
        *,
        tools: Tools = (),
        ask: bool = False,
        form: str = FIELDS[0],
        **options: Any,
    ) -> str:
        """The turns as the template writes them.

        Args:
            turns: of the conversation.
            tools: JSON schemas of the functions that may be called.
            ask: end with the generation prompt.
            form: where reasoning is put: one of `FIELDS`, `PARTS` or `INLINE`.
            options: values for the template's own variables, instead of those at its top.

        Raises:
            ModelError: the model has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template, so conversations cannot be rendered",
                where="model.chat_template",
                remedy="name a .jinja file there, or use the instruct variant of the model",
            )
        if options and isinstance(self._tokenizer.chat_template, str):
            options["chat_template"] = without_values(self._tokenizer.chat_template)
        messages = [message(turn, form) for turn in turns]
        return applied(self._tokenizer, messages, tools, add_generation_prompt=ask, **options)


def message(turn: Turn, form: str = FIELDS[0]) -> dict[str, Any]:
    """A turn in the form that chat templates take, its reasoning where `form` says."""
    made: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        if form == PARTS:
            thinking = {"type": "thinking", "thinking": turn.reasoning}
            made["content"] = [thinking, {"type": "text", "text": turn.content}]
        elif form == INLINE:
            made["content"] = inlined(turn, INLINE_TAGS)
        else:
            made[form] = turn.reasoning
    if turn.tool_calls:
        made["tool_calls"] = [_call(call) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        made["tool_call_id"] = turn.tool_call_id
    if turn.name is not None:
        made["name"] = turn.name
    return made


def inlined(turn: Turn, tags: tuple[str, str]) -> str:
    """The content of a turn with its reasoning before it, between tags."""
    before, after = tags
    return f"{before}\n{turn.reasoning.strip()}\n{after}\n\n{turn.content}"


def _call(call: ToolCall) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    return made if call.id is None else {"id": call.id, **made}


def _unwrapped(tokenizer: Any) -> Any:
    """The tokenizer in mlx-lm's wrapper, unless the wrapper renders chats in its own way."""
    inner = vars(tokenizer).get("_tokenizer")
    if vars(tokenizer).get("_chat_template") is not None:
        return tokenizer
    return inner if hasattr(inner, "apply_chat_template") else tokenizer
