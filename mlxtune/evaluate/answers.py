"""Greedy answers to prompts, batched or streamed; generation is mlx-lm's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import batch_generate, stream_generate


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int = 64,
    batch_size: int = 128,
) -> list[str]:
    """The greedy answer to each prompt, white space around it removed.

    Args:
        model: an mlx-lm model.
        tokenizer: mlx-lm's wrapper.
        prompts: token ids, ready for an answer.
        max_tokens: an answer is cut off there.
        batch_size: how many are generated at once.
    """
    response = batch_generate(
        model,
        tokenizer,
        [list(prompt) for prompt in prompts],
        max_tokens=max_tokens,
        completion_batch_size=batch_size,
        prefill_batch_size=min(batch_size, 16),
    )
    return [text.strip() for text in response.texts]


def stream_answer(
    model: nn.Module, tokenizer: Any, prompt: list[int], *, max_tokens: int
) -> Iterator[str]:
    """Pieces of the greedy answer to one prompt, as they come."""
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
        yield response.text
