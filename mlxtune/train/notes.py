"""Remarks on a run before it begins: they do not stop it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlxtune.data.batches import Part
from mlxtune.data.store import lengths_of
from mlxtune.recipe.schema import TrainSection

# What configs call the longest text that a model was made for.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens of the longest text that a model was made for, as its config says; None if not.

    A rotation that was stretched (YaRN, LongRoPE) reaches that many times the length that it
    was stretched from, where the config gives both.
    """
    if isinstance(text := config.get("text_config"), dict):
        config = text
    said = next((config[key] for key in _CONTEXT if isinstance(config.get(key), int)), None)
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return said
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if isinstance(original, int) and isinstance(factor, int | float):
        return max(said or 0, int(original * factor))
    return said


def context_notes(
    lengths: Sequence[np.ndarray[Any, Any]], config: dict[str, Any], *, about: bool = False
) -> Iterator[str]:
    """That records are longer than the model's context, if some are.

    Args:
        lengths: tokens of each sample, of each source.
        config: of the model.
        about: whether the lengths are estimates.
    """
    context = context_length(config)
    if context is None:
        return
    count = sum(int((each > context).sum()) for each in lengths)
    total = sum(len(each) for each in lengths)
    if count:
        yield (
            f"{'about ' * about}{count} of {total} records are longer than the {context} tokens "
            "that this model was made for (its context): it has not learned to read what lies "
            f"beyond; train.max_seq_length = {context} and truncate cut them or leave them out"
        )


def part_lengths(parts: Sequence[Part]) -> list[np.ndarray[Any, Any]]:
    """Tokens of each sample of each source."""
    return [lengths_of(part.samples) for part in parts]


def warmup_steps(train: TrainSection, total_steps: int) -> int:
    """Steps over which the learning rate rises, in a run of this many."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return round((train.warmup_ratio or 0.0) * total_steps)


def warmup_notes(train: TrainSection, total_steps: int) -> Iterator[str]:
    """That the run ends before its learning rate has risen, if it does."""
    warmup = warmup_steps(train, total_steps)
    if warmup <= total_steps:
        return
    highest = train.learning_rate * total_steps / warmup
    yield (
        f"the learning rate rises over {warmup} steps and the run has {total_steps}: it ends at "
        f"{highest:.2g} and never reaches {train.learning_rate:g}; lower train.warmup_steps"
    )
