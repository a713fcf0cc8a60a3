"""One model on records: its loss, its answers, and its loss on plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxtune.data.records import Conversation, Segment
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.tokens import tokenize
from mlxtune.errors import DataError, ModelError
from mlxtune.evaluate.answers import answers
from mlxtune.evaluate.text import bits_per_byte
from mlxtune.models.load import LoadedModel
from mlxtune.models.packed import enable_packs
from mlxtune.recipe.schema import DataSource, Recipe
from mlxtune.train.corpus import conversations_of, read_held_out, rules_of, source_of
from mlxtune.train.heldout import held_out_loss
from mlxtune.train.model import layout_for

# Plain text is measured in pieces of so many tokens.
_WINDOW = 1024
# What an answer may be longer than the longest expected one, in tokens: a longer one is
# wrong however it ends.
_SLACK = 8


@dataclass(frozen=True)
class Records:
    """Held-out records, as they are and in one model's tokens."""

    samples: Sequence[Sample]
    conversations: list[Conversation]

    def first(self, limit: int | None) -> Records:
        """The first so many; a record may be of several samples."""
        if limit is None or limit >= len(self.conversations):
            return self
        last = sorted({sample.record for sample in self.samples})[limit - 1]
        kept = [sample for sample in self.samples if sample.record <= last]
        return Records(kept, self.conversations[:limit])


@dataclass(frozen=True)
class Measured:
    """What one model did.

    Attributes:
        loss: nats a supervised token.
        tokens: supervised tokens.
        bits_per_byte: of the supervised text; None where it is empty.
        general_loss: nats a token of the plain text; None without one.
        answers: to each conversation that has turns.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None
    general_loss: float | None
    answers: list[str]


def read_records(recipe: Recipe, sources: Sequence[DataSource], renderer: Renderer) -> Records:
    """The records of the sources, or without any those that the recipe holds out.

    Raises:
        DataError: a file is missing or wrong, or there are no records.
    """
    if not sources:
        samples = read_held_out(recipe, renderer)
        if not samples:
            raise DataError(
                "the recipe holds no records out",
                where="eval",
                remedy="name a file of records with --data",
            )
        return Records(samples, conversations_of(recipe, samples))
    made: list[Sample] = []
    conversations: list[Conversation] = []
    first = 0
    for section in sources:
        rules = rules_of(recipe.data[0], recipe.train.max_seq_length)
        source = source_of(section)
        store = tokenize(source, renderer, rules, first=first)
        kept = {sample.record - first for sample in store}
        rows = enumerate(source.rows(), start=1)
        conversations += [source.parse(row) for number, row in rows if number in kept]
        made += store
        first += store.tally.rows
    return Records(made, conversations)


def measure(
    loaded: LoadedModel,
    renderer: Renderer,
    records: Records,
    *,
    max_tokens: int | None,
    general_text: Path | None,
    progress: Callable[[str], None],
) -> Measured:
    """Loss on the records and the text, and the greedy answers.

    Args:
        loaded: the model, in evaluation mode.
        renderer: of its tokenizer.
        records: in its tokens.
        max_tokens: answers are cut off there.
        general_text: a text file.
        progress: is told what is being done.

    Raises:
        DataError: the text file cannot be read.
    """
    model, samples = loaded.model, records.samples
    general = plain_samples(general_text, renderer) if general_text is not None else []
    packing = False
    with suppress(ModelError):
        enable_packs(model)
        packing = True
    layout = layout_for(packing)
    progress("held-out loss")
    loss = held_out_loss(model, samples, batch_size=16, layout=layout)
    tokens = sum(int(np.count_nonzero(sample.weights[1:])) for sample in samples)
    size = sum(_bytes(sample, renderer) for sample in samples)
    general_loss = None
    if general:
        progress("loss on general text")
        general_loss = held_out_loss(model, general, batch_size=4, layout=layout)
    # Plain text has no answer: its loss is all there is to measure.
    chats = [c for c in records.conversations if c.turns]
    said: list[str] = []
    if chats:
        progress(f"{len(chats)} answers")
        longest = max(len(renderer.encode(c.answer())) for c in chats)
        prompts = [renderer.prompt(conversation) for conversation in chats]
        limit = max_tokens or longest + _SLACK
        said = answers(model, loaded.tokenizer, prompts, max_tokens=limit)
    return Measured(loss, tokens, bits_per_byte(loss, tokens, size), general_loss, said)


def plain_samples(path: Path, renderer: Renderer) -> list[Sample]:
    """A text file as samples in which every token counts, a window each.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text cannot be read: {error}", where=str(path)) from None
    if not text:
        raise DataError("the text is empty", where=str(path))
    whole = Conversation(segments=(Segment(text, train=True),), closed=True, where=str(path))
    return [
        Sample(sample.tokens[at : at + _WINDOW], sample.weights[at : at + _WINDOW], 0, sample.where)
        for sample in renderer.samples(whole)
        for at in range(0, len(sample.tokens), _WINDOW)
        if len(sample.tokens) - at > 1
    ]


def _bytes(sample: Sample, renderer: Renderer) -> int:
    """UTF-8 bytes of what is supervised; the marks that end a turn are no text."""
    supervised = sample.tokens[np.flatnonzero(sample.weights)]
    return len(renderer.decode(supervised, special=False).encode())
