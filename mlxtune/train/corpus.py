"""What a recipe trains on and holds out: its sources as samples, and as conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from mlxtune.data.batches import Part
from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.records import Conversation
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.rules import Rules, Tally
from mlxtune.data.sources import Source
from mlxtune.data.store import Progress, Subset, TokenStore
from mlxtune.data.tokens import tokenize
from mlxtune.errors import DataError
from mlxtune.recipe.schema import DataSource, EvalSection, Recipe


@dataclass(frozen=True)
class Corpus:
    """Samples of a recipe.

    Attributes:
        parts: what is trained on, a part a source.
        held_out: what is not.
        tallies: the path of each source, and what became of its records.
    """

    parts: tuple[Part, ...]
    held_out: Sequence[Sample]
    tallies: tuple[tuple[str, Tally], ...]

    @property
    def size(self) -> int:
        """Samples that are trained on."""
        return sum(len(part.samples) for part in self.parts)

    def notes(self) -> Iterator[str]:
        """What became of records otherwise than that they are trained on as they are."""
        for path, tally in self.tallies:
            for reason, count in tally.dropped.items():
                yield f"{path}: {count} of {tally.rows} records left out: {reason}"
            if tally.truncated:
                yield f"{path}: {tally.truncated} records cut off at max_seq_length"
            if extra := tally.samples + sum(tally.dropped.values()) - tally.rows:
                yield (
                    f"{path}: the chat template rewrites earlier turns, so each answer is a "
                    f"sample of its own: {extra} more than records"
                )


def read_corpus(
    recipe: Recipe, renderer: Renderer, progress: Progress = lambda _path, _rows: None
) -> Corpus:
    """All samples of a recipe, split into trained and held out.

    Args:
        recipe: checked.
        renderer: of the model's tokenizer.
        progress: is told, now and then, a source's path and how many of its rows are done.

    Raises:
        DataError: a file is missing or wrong, or nothing is left to train on.
    """
    stores: list[TokenStore] = []
    first = 0
    for section in recipe.data:
        rules = rules_of(section, recipe.train.max_seq_length)
        source = source_of(section)
        stores.append(tokenize(source, renderer, rules, first=first, progress=progress))
        first += stores[-1].tally.rows
    tallies = [(s.path, store.tally) for s, store in zip(recipe.data, stores, strict=True)]
    held_out: Sequence[Sample] = ()
    trained: list[Sequence[Sample]] = list(stores)
    if (store := _held_out_store(recipe, renderer, progress)) is not None:
        held_out = store
        tallies.append((str(recipe.eval.path), store.tally))
    elif recipe.eval.val_size:
        chosen = _held_out_numbers(recipe, first)
        out = [np.isin(store.records(), chosen) for store in stores]
        held_out = [s for store, o in zip(stores, out, strict=True) for s in _where(store, o)]
        trained = [_where(store, ~o) for store, o in zip(stores, out, strict=True)]
    return Corpus(_parts(recipe.data, trained), held_out, tuple(tallies))


def read_held_out(recipe: Recipe, renderer: Renderer) -> Sequence[Sample]:
    """The samples that a recipe holds out; none if it holds out none.

    Raises:
        DataError: a file is missing or wrong.
    """
    store = _held_out_store(recipe, renderer, lambda _path, _rows: None)
    if store is not None or not recipe.eval.val_size:
        return store or ()
    return read_corpus(recipe, renderer).held_out


def _held_out_store(recipe: Recipe, renderer: Renderer, progress: Progress) -> TokenStore | None:
    source = held_out_source(recipe.eval)
    if source is None:
        return None
    rules = rules_of(recipe.data[0], recipe.train.max_seq_length)
    return tokenize(source, renderer, rules, progress=progress)


def check_sources(recipe: Recipe, *, rows: int | None = None) -> list[tuple[str, int]]:
    """Read every record, or the first so many of each source, without a tokenizer.

    Returns:
        The path of each source and how many records it has; the held-out file is the last.

    Raises:
        DataError: a file is missing or wrong, or a record can train nothing.
    """
    sources = [(source_of(s), masking_of(s), s.on_empty == "error") for s in recipe.data]
    if (held_out := held_out_source(recipe.eval)) is not None:
        first = recipe.data[0]
        sources.append((held_out, masking_of(first), first.on_empty == "error"))
    counts = []
    for source, masking, strict in sources:
        count = 0
        for conversation in islice(source, rows):
            count += 1
            try:
                masking.require_target(conversation)
            except NothingTrained:
                if strict:
                    raise
        counts.append((source.path, count))
    return counts


def conversations_of(recipe: Recipe, samples: Sequence[Sample]) -> list[Conversation]:
    """The records that held-out samples were made of, as they are.

    Raises:
        DataError: a file is missing or wrong.
    """
    numbers = {sample.record for sample in samples}
    given = held_out_source(recipe.eval)
    sources = [given] if given is not None else [source_of(section) for section in recipe.data]
    rows = ((source, row) for source in sources for row in source.rows())
    return [s.parse(row) for number, (s, row) in enumerate(rows, start=1) if number in numbers]


def source_of(section: DataSource | EvalSection) -> Source:
    """The records that a table names."""
    return Source(
        str(section.path),
        section.format,
        section.columns,
        section.split,
        section.subset,
        section.max_samples,
    )


def held_out_source(section: EvalSection) -> Source | None:
    """The records of `[eval]`, if it names a file of them."""
    return None if section.path is None else source_of(section)


def masking_of(section: DataSource) -> Masking:
    """What of a source's records is trained."""
    return Masking(section.roles_to_train, section.train_on_inputs)


def rules_of(section: DataSource, max_seq_length: int) -> Rules:
    """What becomes of a source's records."""
    return Rules(masking_of(section), max_seq_length, section.truncate, section.on_empty)


def _held_out_numbers(recipe: Recipe, total: int) -> npt.NDArray[np.int64]:
    """Numbers, from 1 over all sources, of the records that are held out."""
    size = recipe.eval.val_size
    count = round(size * total) if size < 1 else int(size)
    if not count:
        raise DataError(
            f"a share of {size:g} of {total} records is none",
            where="eval.val_size",
            remedy="raise it, or leave it out",
        )
    if count >= total:
        raise DataError(
            f"{count} records were to be held out, and there are {total}",
            where="eval.val_size",
        )
    order = np.random.default_rng(recipe.seed).permutation(total)
    return 1 + np.sort(order[:count])


def _where(samples: Sequence[Sample], chosen: npt.NDArray[np.bool_]) -> Sequence[Sample]:
    return Subset(samples, np.flatnonzero(chosen))


def _parts(sections: Sequence[DataSource], samples: Sequence[Sequence[Sample]]) -> tuple[Part, ...]:
    """Parts with as many epochs as the recipe says; weights are shares of one epoch."""
    total = sum(map(len, samples))
    weight = sum(section.weight or 0 for section in sections)
    parts = []
    for section, own in zip(sections, samples, strict=True):
        if not own:
            raise DataError("all its records were held out", where=section.path)
        epochs = section.epochs or 1.0
        if section.weight is not None:
            epochs = section.weight / weight * total / len(own)
        parts.append(Part(own, epochs))
    return tuple(parts)
