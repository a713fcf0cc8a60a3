"""A recipe's records looked through without a tokenizer: which of them cannot be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from mlxtune.data.rules import Rules, reason_of
from mlxtune.data.sources import Source
from mlxtune.errors import DataError
from mlxtune.recipe.schema import Recipe
from mlxtune.train.corpus import Overlap, held_out_source, rules_of, source_of

# Problems that are kept of a source; the others are counted.
SHOWN = 10


@dataclass
class CheckedSource:
    """What was found in a source.

    Attributes:
        name: its path, and the split where it has several.
        held_out: whether its records are held out.
        records: how many there are.
        problems: what is wrong, the first ten.
        faulty: how many records something is wrong with.
        skipped: reason to number of the records that are left out (`unusable = "skip"`).
    """

    name: str
    held_out: bool = False
    records: int = 0
    problems: list[DataError] = field(default_factory=list)
    faulty: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, error: DataError) -> None:
        """One record more that cannot be used, and may not be left out."""
        self.faulty += 1
        if len(self.problems) < SHOWN:
            self.problems.append(error)


@dataclass(frozen=True)
class Check:
    """What was found in all sources of a recipe.

    Attributes:
        sources: in the recipe's order; the held-out file is the last.
        overlap: held-out records that are trained on as well; of `val_size` it is not known
            before they are chosen.
    """

    sources: tuple[CheckedSource, ...]
    overlap: Overlap

    def require_usable(self) -> None:
        """See that each record can be used.

        Raises:
            DataError: the first one that cannot.
        """
        for problem in (problem for source in self.sources for problem in source.problems):
            raise problem


def check_sources(recipe: Recipe, *, rows: int | None = None) -> Check:
    """Read every record, or the first ones of each source, without a tokenizer.

    Args:
        recipe: checked.
        rows: how many of each source; all by default.
    """
    found = []
    trained: set[int] = set()
    shared = held = 0
    first = ""
    for source, rules in _sources(recipe):
        checked = CheckedSource(source.path, source.held_out)
        found.append(checked)
        for fingerprint, where in _usable(source, rules, checked, rows):
            if not source.held_out:
                trained.add(fingerprint)
                continue
            held += 1
            if fingerprint in trained:
                shared += 1
                first = first or where
    return Check(tuple(found), Overlap(shared, held, first))


def _sources(recipe: Recipe) -> Iterator[tuple[Source, Rules]]:
    for section in recipe.data:
        yield source_of(section), rules_of(recipe, section)
    if (held_out := held_out_source(recipe)) is not None:
        yield held_out, rules_of(recipe, recipe.data[0])


def _usable(
    source: Source, rules: Rules, checked: CheckedSource, rows: int | None
) -> Iterator[tuple[int, str]]:
    """Fingerprint and place of the records that can be trained on; `checked` counts all."""
    usable, strict = 0, rules.unusable == "error"
    try:
        checked.name = source.name
        for row in islice(source.rows(), rows):
            checked.records += 1
            try:
                conversation = source.parse(row)
                if rules.form == "pairs":
                    conversation.require_pair()
                else:
                    rules.masking.require_target(conversation)
            except DataError as error:
                if strict:
                    checked.add(error)
                else:
                    checked.skipped[reason_of(error)] += 1
                continue
            usable += 1
            yield conversation.fingerprint(), conversation.where
    except DataError as error:
        checked.problems.append(error)  # of the file: what comes after it cannot be read
        return
    if not checked.records:
        checked.problems.append(DataError("it has no records", where=checked.name))
    elif not usable and not strict:
        reason, count = checked.skipped.most_common(1)[0]
        what = f"none of its {checked.records} records can be trained on: of {count}, {reason}"
        checked.problems.append(DataError(what, where=checked.name))
