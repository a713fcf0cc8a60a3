"""Preference pairs made of requests and commands, and what the peer is given of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.data.groups import Group
from mlxtune.data.render import Sample
from mlxtune.data.store import Groups, TokenStore
from mlxtune.recipe.load import parse_recipe
from mlxtune.recipe.schema import Recipe
from mlxtune.train.asking import settled
from mlxtune.train.corpus import read_corpus

CONTEXT_TOKENS = 300

Row = dict[str, str]
Requests = list[tuple[str, str]]


@dataclass(frozen=True)
class Workload:
    """What both trainers are given.

    Attributes:
        name: its letter.
        what: in words.
        rows: from requests with their commands, a tokenizer and a number to so many pairs.
        pairs: how many there are.
        speed, memory: targets, as ratios to the peer.
    """

    name: str
    what: str
    rows: Callable[[Requests, Any, int], list[Row]]
    pairs: int
    speed: float
    memory: float


def shell_pairs(requests: Requests, _tokenizer: Any, count: int) -> list[Row]:
    """A request, its command, and the next other one of the list."""
    pairs = []
    for number, (prompt, command) in enumerate(requests[:count]):
        following = cycle(requests[number:] + requests[:number])
        rejected = next(other for _, other in following if other != command)
        pairs.append({"prompt": prompt, "chosen": command, "rejected": rejected})
    return pairs


def pairs_in_context(requests: Requests, tokenizer: Any, count: int) -> list[Row]:
    """Two requests behind a context of each pair's own, 300 tokens of others with commands."""
    source = cycle(requests)
    pairs = []
    for _ in range(count):
        context = ""
        while len(tokenizer.encode(longer := context + _example(*next(source)))) <= CONTEXT_TOKENS:
            context = longer
        (first, one), (second, two) = next(source), next(source)
        wrong = [other for _, other in (next(source), next(source))]
        pairs.append(
            {
                "prompt": f"{context}\n{first}. Then: {second}",
                "chosen": f"{one} && {two}",
                "rejected": " && ".join(wrong),
            }
        )
    return pairs


def _example(prompt: str, command: str) -> str:
    return f"{prompt} => {command}\n"


WORKLOADS = {
    w.name: w
    for w in (
        Workload("a", "shell pairs", shell_pairs, 64, 4.0, 0.35),
        Workload(
            "b",
            f"pairs with {CONTEXT_TOKENS} tokens of context each",
            pairs_in_context,
            20,
            4.5,
            0.25,
        ),
    )
}


def recipe_of(job: dict[str, Any]) -> Recipe:
    """What ours is told, so that it trains as the peer does."""
    return parse_recipe(
        {
            "name": "bench",
            "objective": "dpo",
            "model": {"path": job["model"]},
            "lora": {
                "rank": job["rank"],
                "alpha": job["alpha"],
                "target_modules": ["all-linear"],
            },
            "data": [{"path": job["data"]}],
            "dpo": {"beta": job["beta"]},
            "train": {
                "max_steps": 10**6,
                "batch_size": job["batch_size"],
                "learning_rate": job["learning_rate"],
                "lr_scheduler": "constant",
                "warmup_ratio": 0.0,
                "max_grad_norm": 0.0,
                # As MLX's AdamW has it by itself.
                "weight_decay": 0.01,
                "adam_bias_correction": False,
            },
            "checkpoint": {"steps": 10**6},
            "log": {"steps": 1},
        },
        where="worker",
    )


def store_of(recipe: Recipe) -> TokenStore:
    """The tokens of a recipe's pairs."""
    asking = settled(recipe)
    [store] = read_corpus(asking.recipe, asking.renderer()).stores
    return store


def groups_of(store: TokenStore) -> list[Group]:
    """Its pairs in their order, without what follows an answer's end.

    The peer trains the line break after it too, which no model has to write.
    """
    return [[_ended(sample) for sample in group] for group in Groups(store)]


def _ended(sample: Sample) -> Sample:
    end = int(np.flatnonzero(sample.weights)[-1]) + 1
    known = sample.references
    return replace(
        sample,
        tokens=sample.tokens[:end],
        weights=sample.weights[:end],
        references=None if known is None else known[:end],
    )


def steps_of(pairs: Sequence[Any], batch_size: int) -> Iterator[list[Any]]:
    """Pairs of each step, without end: the same for both trainers."""
    whole = len(pairs) - len(pairs) % batch_size
    for at in cycle(range(0, whole, batch_size)):
        yield list(pairs[at : at + batch_size])


def write_peer_rows(path: Path, groups: Sequence[Group]) -> None:
    """Write pairs as the peer's data set has them."""
    rows = []
    for chosen, rejected in groups:
        prompt = int(np.flatnonzero(chosen.weights)[0])
        rows.append(
            {
                "chosen": chosen.tokens.tolist(),
                "rejected": rejected.tokens.tolist(),
                "chosen_prompt_length": prompt,
                "rejected_prompt_length": prompt,
            }
        )
    path.write_text(json.dumps(rows), encoding="utf-8")
