"""One model on records: its loss, its answers, and its loss on plain text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mlxtune.data.records import Conversation, Segment
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.tokens import tokenize
from mlxtune.errors import DataError, ModelError
from mlxtune.evaluate.answers import answers
from mlxtune.memory import memory_budget, sequences_within
from mlxtune.models.enable import enable_packs_by
from mlxtune.models.load import LoadedModel
from mlxtune.recipe.schema import DataSource, Recipe
from mlxtune.train.corpus import rules_of, source_of
from mlxtune.train.heldout import held_out_loss, sample_losses
from mlxtune.train.model import layout_for

# Plain text is measured in pieces of so many tokens.
_WINDOW = 1024
# What an answer may be longer than the longest expected one, in tokens: a longer one is
# wrong however it ends.
_SLACK = 8
# Answers generated at once, where memory allows.
_AT_ONCE = 128


@dataclass(frozen=True)
class Records:
    """Held-out records by their numbers, as they are and in one model's tokens.

    Attributes:
        samples: a record may be of several; of a preference pair, the chosen side.
        conversations: number to record, in order.
        rejected: the rejected sides of pairs.
    """

    samples: Sequence[Sample]
    conversations: dict[int, Conversation]
    rejected: Sequence[Sample] = ()

    def first(self, limit: int | None) -> Records:
        """The first so many."""
        return self.only(list(self.conversations)[:limit])

    def only(self, numbers: Collection[int]) -> Records:
        """Those that are among the numbers."""
        kept = {n: c for n, c in self.conversations.items() if n in set(numbers)}
        chosen, rejected = (
            [sample for sample in side if sample.record in kept]
            for side in (self.samples, self.rejected)
        )
        return Records(chosen, kept, rejected)


@dataclass(frozen=True)
class RecordLoss:
    """What one record has in losses.

    Attributes:
        total: nats, weighted.
        weight: of its supervised tokens.
        tokens: how many these are.
        size: UTF-8 bytes of the text they spell.
    """

    total: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    size: int = 0

    def __add__(self, other: RecordLoss) -> RecordLoss:
        return RecordLoss(
            self.total + other.total,
            self.weight + other.weight,
            self.tokens + other.tokens,
            self.size + other.size,
        )


@dataclass(frozen=True)
class Measured:
    """What one model did, record by record: two models may not have the same ones.

    Attributes:
        losses: record's number to its loss.
        general_loss: nats a token of the plain text; None without one.
        answers: record's number to the answer, of those that have turns.
        margins: of preference pairs, record's number to the log-probability of the chosen side
            less that of the rejected one, nats.
    """

    losses: dict[int, RecordLoss]
    general_loss: float | None
    answers: dict[int, str]
    margins: dict[int, float] = field(default_factory=dict)


def read_records(recipe: Recipe, sources: Sequence[DataSource], renderer: Renderer) -> Records:
    """The records of the sources.

    Raises:
        DataError: a file is missing or wrong, or there are no records.
    """
    made: list[Sample] = []
    conversations: list[Conversation] = []
    first = 0
    for section in sources:
        rules = rules_of(recipe, recipe.data[0])
        # Asked as it was trained: under the system prompt of the run.
        system = section.system or recipe.system_prompt
        source = replace(source_of(section), held_out=True, system=system)
        store = tokenize(source, renderer, rules, first=first)
        kept = {sample.record - first for sample in store}
        rows = enumerate(source.rows(), start=1)
        conversations += [source.parse(row) for number, row in rows if number in kept]
        made += store
        first += store.tally.rows
    return _numbered(made, conversations)


def _numbered(samples: Sequence[Sample], conversations: list[Conversation]) -> Records:
    numbers = sorted({sample.record for sample in samples})
    chosen = [sample for sample in samples if not sample.side]
    # Each by itself: what has another side than 0 would belong to the sample before it.
    rejected = [replace(sample, side=0) for sample in samples if sample.side]
    return Records(chosen, dict(zip(numbers, conversations, strict=True)), rejected)


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
        enable_packs_by(model, loaded.config)
        packing = True
    layout = layout_for(packing, loaded.config)
    progress("held-out loss")
    totals = sample_losses(model, samples, batch_size=16, layout=layout)
    losses: dict[int, RecordLoss] = {}
    for sample, total in zip(samples, totals.tolist(), strict=True):
        more = _loss(sample, total, renderer)
        losses[sample.record] = losses.get(sample.record, RecordLoss()) + more
    margins: dict[int, float] = {}
    if records.rejected:
        lost = sample_losses(model, records.rejected, batch_size=16, layout=layout)
        for sample, total in zip(records.rejected, lost.tolist(), strict=True):
            margins[sample.record] = total - losses[sample.record].total
    general_loss = None
    if general:
        progress("loss on general text")
        general_loss = held_out_loss(model, general, batch_size=4, layout=layout)
    # Plain text has no answer: its loss is all there is to measure.
    chats = {n: c for n, c in records.conversations.items() if c.turns}
    said: list[str] = []
    if chats:
        progress(f"{len(chats)} answers")
        longest = max(len(renderer.encode(c.answer())) for c in chats.values())
        longest = max(longest, *map(_length_of_answer, samples))
        prompts = [renderer.prompt(conversation) for conversation in chats.values()]
        limit = max_tokens or longest + _SLACK
        said = answers(
            model,
            loaded.tokenizer,
            prompts,
            max_tokens=limit,
            batch_size=sequences_within(
                model, max(map(len, prompts)) + limit, memory_budget(), most=_AT_ONCE
            ),
            progress=lambda done: progress(f"{done} of {len(chats)} answers"),
        )
        said = [renderer.answers.read(text).content for text in said]
    return Measured(losses, general_loss, dict(zip(chats, said, strict=True)), margins)


def _length_of_answer(sample: Sample) -> int:
    """Tokens of the last answer with its reasoning; 0 where it cannot be told from its prompt."""
    trained = np.flatnonzero(sample.weights)
    if trained[0] == 0:
        return 0
    return len(np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)[-1])


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


def _loss(sample: Sample, total: float, renderer: Renderer) -> RecordLoss:
    weights = sample.weights[1:]  # nothing predicts the first token
    # The marks that end a turn are no text.
    supervised = sample.tokens[np.flatnonzero(sample.weights)]
    text = renderer.decode(supervised, special=False)
    weight = float(weights.sum(dtype=np.float64))
    return RecordLoss(total, weight, int(np.count_nonzero(weights)), len(text.encode()))
