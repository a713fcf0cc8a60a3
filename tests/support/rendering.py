"""Short conversations, and what a renderer makes of them."""

from __future__ import annotations

import numpy as np

from mlxtune.data.records import Conversation, Turn
from mlxtune.data.render import Renderer, Sample

END = "<|im_end|>"


def conversation(*turns: tuple[str, str], where: str = "data.jsonl:7") -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in turns), where)


PAIR = conversation(("user", "list all files"), ("assistant", "ls -la /tmp"))

TWO_ROUNDS = conversation(
    ("system", "Be brief."),
    ("user", "list files"),
    ("assistant", "ls"),
    ("user", "hidden ones too"),
    ("assistant", "ls -a"),
)


def trained_texts(tokenizer, sample: Sample) -> list[str]:
    """Text of each unbroken stretch of tokens that carry weight."""
    weighted = np.flatnonzero(sample.weights)
    stretches = np.split(weighted, np.flatnonzero(np.diff(weighted) > 1) + 1)
    return [tokenizer.decode(sample.tokens[stretch].tolist()) for stretch in stretches]


def only_sample(renderer: Renderer, conversation: Conversation, record: int = 0) -> Sample:
    [sample] = renderer.samples(conversation, record)
    return sample
