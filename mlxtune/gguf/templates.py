"""A tokenizer's chat template, applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def applied(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), **options: Any
) -> str:
    """A conversation as the chat template writes it.

    Args:
        tokenizer: Hugging Face's, or mlx-lm's wrapper around one.
        messages: of the conversation.
        tools: JSON schemas of the functions that may be called.
        options: of `apply_chat_template`, and values for the template's own variables.

    Raises:
        Exception: the template refuses the conversation, in whatever way.
    """
    options = {"tokenize": False, **options}
    if tools:
        return str(tokenizer.apply_chat_template(list(messages), tools=list(tools), **options))
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except TypeError:  # a template for conversations with tools, which looks at each of them
        return str(tokenizer.apply_chat_template(list(messages), tools=[], **options))
