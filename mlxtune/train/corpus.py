"""What a recipe trains on and holds out: its sources as samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.data.batches import Part
from mlxtune.data.masking import Masking
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.rules import Rules, Tally
from mlxtune.data.sources import HUB, Source
from mlxtune.data.splits import TRAIN
from mlxtune.data.store import (
    Groups,
    Joined,
    Progress,
    Subset,
    TokenStore,
    fingerprints_of,
    records_of,
)
from mlxtune.data.tokens import tokenize
from mlxtune.data.writing import Writing
from mlxtune.errors import DataError
from mlxtune.objectives import objective_of
from mlxtune.recipe.schema import DataSource, EvalSection, Recipe


@dataclass(frozen=True)
class Corpus:
    """Samples of a recipe.

    Attributes:
        parts: what is trained on, a part a source.
        held_out: what is not.
        tallies: the path of each source, and what became of its records.
        unread: remarks on files beside those that were read.
        stores: where all of these samples are kept, a store a file or source.
    """

    parts: tuple[Part, ...]
    held_out: Sequence[Sample]
    tallies: tuple[tuple[str, Tally], ...]
    unread: tuple[str, ...] = ()
    stores: tuple[TokenStore, ...] = ()

    @property
    def size(self) -> int:
        """Samples, or groups of them, that are trained on."""
        return sum(len(part.groups) for part in self.parts)

    @property
    def held_out_size(self) -> int:
        """Samples, or groups of them, that are not."""
        return len(Groups(self.held_out))

    def trained_fingerprints(self) -> npt.NDArray[np.uint64]:
        """The fingerprints of all records that are trained on, in order, each once."""
        return np.unique(np.concatenate([fingerprints_of(part.samples) for part in self.parts]))

    def overlap(self) -> Overlap:
        """The held-out records that are trained on as well."""
        if not len(self.held_out):
            return Overlap(0, 0)
        records = records_of(self.held_out)
        both = np.isin(fingerprints_of(self.held_out), self.trained_fingerprints())
        first = self.held_out[int(np.argmax(both))].where if both.any() else ""
        return Overlap(len(np.unique(records[both])), len(np.unique(records)), first)

    def notes(self) -> Iterator[str]:
        """What became of records otherwise than that they are trained on as they are."""
        yield from self.unread
        if overlap := self.overlap():
            yield str(overlap)
        for path, tally in self.tallies:
            for reason, count in tally.dropped.items():
                yield f"{path}: {count} of {tally.rows} records left out: {reason}"
            for remark, count in tally.noted.items():
                yield f"{path}: {count} of {tally.rows} records: {remark}"
            if tally.truncated:
                yield f"{path}: {tally.truncated} records cut off at max_seq_length"
            if extra := tally.samples + sum(tally.dropped.values()) - tally.rows:
                yield (
                    f"{path}: the chat template rewrites earlier turns, so each answer is a "
                    f"sample of its own: {extra} more than records"
                )


@dataclass(frozen=True)
class Overlap:
    """Held-out records that are trained on as well, which makes a held-out loss too low.

    Attributes:
        shared: how many of them say the same as a record that is trained on.
        held_out: how many there are.
        example: where one of them stands.
    """

    shared: int
    held_out: int
    example: str = ""

    def __bool__(self) -> bool:
        return self.shared > 0

    def __str__(self) -> str:
        example = f", such as {self.example}" if self.example else ""
        return (
            f"{self.shared} of {self.held_out} held-out records are also among those that are "
            f"trained on{example}"
        )

    def require_below(self, share: float, *, chosen: bool = False) -> None:
        """Refuse records whose loss would say nothing about new ones.

        Args:
            share: of the held-out records that may be trained on as well.
            chosen: the held-out records were chosen among all (`val_size`), so those that are
                shared have copies in the data.

        Raises:
            DataError: there are more.
        """
        if self.shared <= share * self.held_out:
            return
        remove = "`mlxtune data prep` removes copies"
        if not chosen:
            remove = "`mlxtune data prep --against` removes them from the training data"
        allowed = math.ceil(100 * self.shared / self.held_out) / 100
        raise DataError(
            str(self),
            where="eval",
            remedy=f"{remove}; eval.max_overlap = {allowed:g} allows them",
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
        rules = rules_of(recipe, section)
        source = source_of(section)
        stores.append(tokenize(source, renderer, rules, first=first, progress=progress))
        first += stores[-1].tally.rows
    sources = [source_of(section) for section in recipe.data]
    tallies = [(s.name, store.tally) for s, store in zip(sources, stores, strict=True)]
    held_out: Sequence[Sample] = ()
    trained: list[Sequence[Sample]] = list(stores)
    if (store := _held_out_store(recipe, renderer, progress)) is not None:
        held_out = store
        stores.append(store)
        given = held_out_source(recipe)
        tallies.append((given.name if given is not None else "", store.tally))
    elif recipe.eval.val_size:
        chosen = _held_out_numbers(recipe, first)
        out = [np.isin(store.records(), chosen) for store in stores]
        held_out = Joined([_where(store, o) for store, o in zip(stores, out, strict=True)])
        trained = [_where(store, ~o) for store, o in zip(stores, out, strict=True)]
    unread = tuple(unread_files(recipe))
    parts = _parts(recipe.data, trained)
    return Corpus(parts, held_out, tuple(tallies), unread, tuple(stores))


def _held_out_store(recipe: Recipe, renderer: Renderer, progress: Progress) -> TokenStore | None:
    source = held_out_source(recipe)
    if source is None:
        return None
    rules = rules_of(recipe, recipe.data[0])
    return tokenize(source, renderer, rules, progress=progress)


def unread_files(recipe: Recipe) -> Iterator[str]:
    """Remarks on files in a source's folder that are not trained on."""
    for section in recipe.data:
        if section.path.startswith(HUB):
            continue
        split = source_of(section).local_split()
        strays = split.others.get("", ())
        others = [name for name in split.others if name]
        if others:
            use = ""
            if recipe.eval.path is None and not recipe.eval.val_size and split.name == TRAIN:
                use = f'; [eval] path = "{section.path}" measures on what is held out there'
            yield (
                f"{section.path}: its {split.name or 'other'} files are trained on, not its "
                f"{' and '.join(others)} split{'s' if len(others) > 1 else ''}{use}"
            )
        if strays:
            some = ", ".join(file.name for file in strays[:3])
            more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
            yield (
                f"{section.path}: not trained on: {some}{more}, named after no split, unlike the "
                f"files of the {split.name} split"
            )


def source_of(section: DataSource) -> Source:
    """The records that `[[data]]` names."""
    return _source(section, section.system)


def held_out_source(recipe: Recipe) -> Source | None:
    """The records that `[eval]` names, if it names a file of them."""
    section = recipe.eval
    return None if section.path is None else _source(section, recipe.data[0].system, held_out=True)


def _source(
    section: DataSource | EvalSection, system: str | None, *, held_out: bool = False
) -> Source:
    return Source(
        str(section.path),
        section.format,
        section.columns,
        section.split,
        section.subset,
        section.max_samples,
        system,
        held_out,
    )


def masking_of(section: DataSource) -> Masking:
    """What of a source's records is trained."""
    return Masking(section.roles_to_train, section.train_on_inputs)


def rules_of(recipe: Recipe, section: DataSource) -> Rules:
    """What becomes of the records of a recipe's source."""
    before, after = section.reasoning_tags
    writing = Writing(
        section.missing_reasoning, section.reasoning, (before, after), section.left_out
    )
    return Rules(
        masking_of(section),
        recipe.train.max_seq_length,
        section.truncate,
        section.unusable,
        writing,
        objective_of(recipe).form,
    )


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
