"""Preference pairs as samples: both sides behind the same prompt tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlxtune.data.groups import Group
from mlxtune.data.records import Conversation
from mlxtune.data.render import Renderer
from mlxtune.data.writing import Note, Writing
from mlxtune.errors import DataError


def pair_samples(
    renderer: Renderer,
    conversation: Conversation,
    record: int = 0,
    writing: Writing | None = None,
    note: Note = lambda _: None,
) -> Group:
    """Tokens and weights of both sides of a preference pair.

    Args:
        renderer: of the model's tokenizer.
        conversation: a record with a chosen and a rejected side.
        record, writing, note: as of `Renderer.samples`.

    Returns:
        The chosen side and the rejected one, with `side` 0 and 1.

    Raises:
        DataError: it is no pair, or its sides do not begin with the same tokens, or one of
            them is no single sample; and as `Renderer.samples`.
    """
    where = conversation.where
    conversation.require_pair()
    said, made = conversation.fingerprint(), []
    for name, side in zip(("chosen", "rejected"), conversation.sides(), strict=True):
        own = renderer.samples(side, record, writing=writing, note=note)
        if len(own) > 1:
            raise DataError(
                f"the chat template rewrites earlier turns of the {name} side, so its answers "
                "are no single text",
                where=where,
                remedy="give each side one answer, and put earlier turns into 'prompt'",
            )
        made += own
    prompts = [sample.tokens[: np.flatnonzero(sample.weights)[0]] for sample in made]
    if not np.array_equal(prompts[0], prompts[1]):
        raise DataError(
            "the chat template writes different prompts for the chosen and the rejected side",
            where=where,
            remedy="see them with `mlxtune data inspect`; often one side has reasoning, and "
            'the other has none: reasoning = "drop" leaves it out of both',
        )
    return [replace(s, side=side, fingerprint=said) for side, s in enumerate(made)]
