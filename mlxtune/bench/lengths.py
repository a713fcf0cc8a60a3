"""How long a recipe's records are, from as much as is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np

from mlxtune.data.batches import Part
from mlxtune.data.records import Conversation
from mlxtune.data.render import Sample
from mlxtune.data.sources import HUB
from mlxtune.errors import DataError, MlxtuneError
from mlxtune.models.resolve import ModelSource
from mlxtune.objectives import objective_of
from mlxtune.recipe.schema import DataSource, Recipe
from mlxtune.train.asking import settled
from mlxtune.train.corpus import read_corpus, source_of

# English text and code: a token is three to four characters in most vocabularies.
_CHARACTERS_TO_TOKEN = 3.3
# A role, its name and its marks.
_TOKENS_TO_TURN = 6
# Tokens that every vocabulary has: MLX does not check what it looks up.
_TOKENS = 1 << 12
# So many records of a source say how long the others are.
_LOOKED_AT = 5000


@dataclass(frozen=True)
class Lengths:
    """Samples as long as a recipe's, and how that is known.

    Attributes:
        parts: what is trained on.
        basis: `tokenized`, `estimated` from characters, or `worst case`: every record as long
            as `train.max_seq_length`.
        note: the same in a sentence.
        problem: for which training would refuse the records.
        notes: remarks on them.
    """

    parts: tuple[Part, ...]
    basis: str
    note: str
    problem: DataError | None = None
    notes: tuple[str, ...] = ()


def lengths_of_recipe(recipe: Recipe, source: ModelSource | None) -> Lengths:
    """The samples of a recipe, or some like them.

    Args:
        recipe: checked.
        source: of the tokenizer; None if it is not on this machine.
    """
    problem: DataError | None = None
    if source is not None:
        try:
            asking = settled(recipe, source)
            parts = read_corpus(asking.recipe, asking.renderer()).parts
            count = sum(len(part.groups) for part in parts)
            return Lengths(parts, "tokenized", f"{count} records, tokenized")
        except DataError as error:
            problem = error
        except MlxtuneError:
            pass  # it has no tokenizer here, or none that can be read
    try:
        found = _estimated(recipe)
        return found if problem is None else replace(found, problem=problem, notes=())
    except DataError as error:
        count = recipe.train.batch_size * recipe.train.gradient_accumulation_steps
        limit = recipe.train.max_seq_length
        # Of a pair each side, with no prompt to share.
        sides = 2 if objective_of(recipe).form == "pairs" else 1
        part = Part([_sample(i, limit, limit, i % sides) for i in range(sides * count)])
        note = f"every record taken for {limit} tokens long ({error.what})"
        # What is not there yet may come; what is there and wrong stays so.
        there = all(Path(section.path).expanduser().exists() for section in recipe.data)
        return Lengths((part,), "worst case", note, problem=error if there else None)


def _estimated(recipe: Recipe) -> Lengths:
    parts: list[Part] = []
    whole, limit, longer = True, recipe.train.max_seq_length, 0
    pairs = objective_of(recipe).form == "pairs"
    for section in recipe.data:
        records = iter(source_of(section))
        first = list(islice(records, _LOOKED_AT))
        records_of = [c.sides() if pairs else (c,) for c in first if c.rejected or not pairs]
        sizes = [
            [(_size(c, section, trained=False), _size(c, section, trained=True)) for c in sides]
            for sides in records_of
        ]
        sizes = [sides for sides in sizes if all(total and trained for total, trained in sides)]
        if not sizes:
            raise DataError("it has no records", where=section.path)
        groups = [
            [_sample(i, min(size, limit), own, side) for side, (size, own) in enumerate(sides)]
            for i, sides in enumerate(sizes)
        ]
        if section.truncate == "error":
            longer += sum(any(size > limit for size, _ in sides) for sides in sizes)
        if section.path.startswith(HUB):  # which would be downloaded to be counted
            whole = whole and len(first) < _LOOKED_AT
        else:
            others = round(sum(1 for _ in records) * len(groups) / len(first))
            groups = list(chain(groups, islice(cycle(groups), others)))
        samples = [sample for group in groups for sample in group]
        parts.append(Part(samples, section.epochs or 1.0))
    count = sum(len(part.groups) for part in parts)
    least = "" if whole else "at least "
    note = f"{least}{count} records, their lengths estimated from characters"
    notes = [
        f"about {longer} records are longer than train.max_seq_length = {limit}, for which "
        "`mlxtune lora` refuses them unless truncate says what becomes of them"
    ]
    return Lengths(tuple(parts), "estimated", note, notes=tuple(notes if longer else ()))


def _size(conversation: Conversation, section: DataSource, *, trained: bool) -> int:
    """Tokens of a conversation, about; or of what is trained of it."""
    texts = [s.text for s in conversation.segments if s.train or not trained]
    texts += [
        turn.content + turn.reasoning
        for turn in conversation.turns
        if not trained
        or section.train_on_inputs
        or (turn.role in section.roles_to_train and turn.train is not False)
    ]
    return sum(_TOKENS_TO_TURN + round(len(text) / _CHARACTERS_TO_TOKEN) for text in texts)


def _sample(number: int, length: int, trained: int, side: int = 0) -> Sample:
    """A sample of nobody's words: no two begin alike, unless they have one number."""
    length = max(2, length)
    tokens = np.random.default_rng(number).integers(0, _TOKENS, length).astype(np.int32)
    weights = np.zeros(length, np.float32)
    weights[-max(1, min(trained, length - 1)) :] = 1
    return Sample(tokens, weights, number + 1, side=side)


def samples_of(lengths: Sequence[int], trained: float = 0.5) -> list[Sample]:
    """Samples of these lengths, the last so large a part of which is trained."""
    return [_sample(i, n, round(n * trained)) for i, n in enumerate(lengths)]
