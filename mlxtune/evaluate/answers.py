"""Answers to prompts, batched or streamed; generation and sampling are mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.sample_utils import make_sampler


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int = 64,
    batch_size: int = 128,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The greedy answer to each prompt, white space around it removed.

    Args:
        model: an mlx-lm model.
        tokenizer: mlx-lm's wrapper.
        prompts: token ids, ready for an answer.
        max_tokens: an answer is cut off there.
        batch_size: how many are generated at once.
        progress: called with the number of answers that are complete, as it grows.
    """
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=min(batch_size, 16),
    )
    numbers = generator.insert([list(prompt) for prompt in prompts], [max_tokens] * len(prompts))
    said: dict[int, list[int]] = {number: [] for number in numbers}
    complete = 0
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                said[response.uid].append(response.token)
            if response.finish_reason is not None:
                complete += 1
                progress(complete)
    generator.close()
    return [tokenizer.decode(said[number]).strip() for number in numbers]


def stream_answer(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Pieces of the answer to one prompt, as they come.

    Args:
        model: an mlx-lm model.
        tokenizer: mlx-lm's wrapper.
        prompt: token ids, ready for an answer.
        max_tokens: the answer is cut off there.
        temperature: 0 for the most likely token each time; else tokens are drawn by
            `mx.random`, whose seed decides them.
    """
    sampler = make_sampler(temp=temperature)
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler
    ):
        yield response.text
