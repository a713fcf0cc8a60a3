"""A recipe's records as they will be trained on, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from mlxtune.data.groups import Group, grouped
from mlxtune.data.inspect import Bin, SharedPrefix, histogram, shared_prefix, spread, stretches
from mlxtune.data.pack import common_prefix
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.rules import Tally, record_samples
from mlxtune.data.store import Progress, TokenStore
from mlxtune.data.tokens import tokenize
from mlxtune.errors import DataError
from mlxtune.models.load import model_config
from mlxtune.models.resolve import resolve_model
from mlxtune.objectives import objective_of
from mlxtune.recipe.schema import Recipe
from mlxtune.train.asking import settled
from mlxtune.train.corpus import read_corpus, rules_of, source_of
from mlxtune.train.notes import context_notes


@dataclass(frozen=True)
class Shown:
    """A sample as text: its tokens, and its stretches, trained or not.

    `side` is which of a pair it is, `chosen` or `rejected`, and `shared` how many tokens both
    begin with; "" and 0 for a sample by itself.
    """

    sample: Sample
    parts: tuple[tuple[bool, str], ...]
    side: str = ""
    shared: int = 0


@dataclass(frozen=True)
class Inspection:
    """All that `mlxtune data inspect` tells.

    `tallies` has each source and what became of its records, `notes` remarks on them,
    `left_out` the reasons of records that were to be shown and are not trained on, `unit` what
    samples are counted in.
    """

    tallies: tuple[tuple[str, Tally], ...]
    notes: tuple[str, ...]
    lengths: tuple[Bin, ...]
    prefix: SharedPrefix
    max_seq_length: int
    rows: tuple[Shown, ...]
    left_out: dict[int, str]
    unit: str = "samples"

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "sources": [{"path": path} | asdict(tally) for path, tally in self.tallies],
            "notes": list(self.notes),
            "max_seq_length": self.max_seq_length,
            "lengths": [asdict(bin) for bin in self.lengths],
            "shared_prefix": asdict(self.prefix),
            "rows": [
                {
                    "where": shown.sample.where,
                    "record": shown.sample.record,
                    **({"side": shown.side, "shared": shown.shared} if shown.side else {}),
                    "parts": [{"trained": trained, "text": text} for trained, text in shown.parts],
                    "tokens": shown.sample.tokens.tolist(),
                    "trained": np.flatnonzero(shown.sample.weights).tolist(),
                }
                for shown in self.rows
            ],
            "left_out": self.left_out,
        }


def inspect_recipe(
    recipe: Recipe,
    *,
    rows: int,
    chosen: int | None = None,
    progress: Progress = lambda _path, _rows: None,
) -> Inspection:
    """Tokenize what a recipe trains on and look at it; no model is loaded.

    Args:
        recipe: checked.
        rows: show so many records of each source, the first ones.
        chosen: show this record instead, counted over all sources.
        progress: is told, now and then, a source's path and how many of its rows are done.

    Raises:
        DataError: a record is wrong, or there is none of that number.
    """
    asking = settled(recipe)
    recipe, renderer = asking.recipe, asking.renderer()
    stores: list[TokenStore] = []
    samples: list[Sample] = []
    left_out: dict[int, str] = {}
    first = 0
    for section in recipe.data:
        source, rules = source_of(section), rules_of(recipe, section)
        stores.append(tokenize(source, renderer, rules, first=first, progress=progress))
        start, stop = (0, rows) if chosen is None else (chosen - first - 1, chosen - first)
        for number in range(max(0, start), min(stop, stores[-1].tally.rows)):
            [row] = islice(source.rows(), number, number + 1)
            tally = Tally()
            samples += record_samples(source, row, first + number + 1, renderer, rules, tally)
            if tally.dropped:
                left_out[first + number + 1] = ", ".join(tally.dropped)
        first += stores[-1].tally.rows
    if chosen is not None and chosen > first:
        raise DataError(f"there is no record {chosen}: there are {first}")
    corpus = read_corpus(recipe, renderer, progress)
    each = [store.lengths() for store in stores]
    lengths = np.concatenate(each)
    model = resolve_model(recipe.model.path, revision=recipe.model.revision, weights=False)
    beyond = context_notes(each, model_config(model))
    return Inspection(
        tallies=corpus.tallies,
        notes=(*asking.notes, *corpus.notes(), *beyond),
        lengths=tuple(histogram(lengths)),
        prefix=shared_prefix([sample for store in stores for sample in spread(store)]),
        max_seq_length=recipe.train.max_seq_length,
        rows=tuple(shown for group in grouped(samples) for shown in _shown(group, renderer)),
        left_out=left_out,
        unit="pairs" if objective_of(recipe).form == "pairs" else "samples",
    )


def _shown(group: Group, renderer: Renderer) -> Iterator[Shown]:
    shared = common_prefix(group, shortest=1)
    for sample in group:
        parts = tuple((kind, renderer.decode(ids)) for kind, ids in stretches(sample))
        side = ("chosen", "rejected")[sample.side] if len(group) == 2 else ""
        yield Shown(sample, parts, side, shared)
