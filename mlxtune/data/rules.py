"""What becomes of a record: the samples it is trained as, cut, left out or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np

from mlxtune.data.files import Row
from mlxtune.data.formats import NothingSaid
from mlxtune.data.groups import Group, grouped
from mlxtune.data.masking import Masking, NothingTrained
from mlxtune.data.pairs import pair_samples
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.sources import Source
from mlxtune.data.writing import NoReasoning, Writing
from mlxtune.errors import DataError

NOT_THOUGHT = "no reasoning, which the chat template asks for"
TOO_LONG, UNTRAINED = "longer than max_seq_length", "no token trained"


@dataclass(frozen=True)
class Rules:
    """What becomes of a record.

    Attributes:
        masking: which of its tokens are trained.
        max_seq_length: the longest sample, in tokens; None for no limit.
        truncate: what is done with a longer one: `error`, `left` and `right` cut off
            its beginning or its end, `drop` leaves it out.
        unusable: a record that cannot be trained on is an `error`, or left out (`skip`): one
            that is damaged, of no known shape, refused by the chat template, or of which no
            token is trained.
        writing: how it is written where the chat template does not fit.
        form: what it becomes: `answers`, samples by themselves, or `pairs`, a group of a chosen
            and a rejected one.
    """

    masking: Masking = field(default_factory=Masking)
    max_seq_length: int | None = None
    truncate: str = "error"
    unusable: str = "error"
    writing: Writing = field(default_factory=Writing)
    form: str = "answers"


@dataclass
class Tally:
    """What became of the records of a source.

    Attributes:
        rows: records read.
        samples: samples, or pairs, made of them; more than `rows` where a template rewrites turns.
        tokens, trained: tokens of all samples, and those of them that carry weight.
        longest: tokens of the longest sample, before anything was cut off.
        truncated: samples that were cut.
        dropped: samples left out, by reason.
        noted: remarks on records that are trained on, and how many records each is about.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Count another one's records too."""
        for name in ("rows", "samples", "tokens", "trained", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        for remark, count in other.noted.items():
            self.noted[remark] = self.noted.get(remark, 0) + count

    def drop(self, reason: str, count: int = 1) -> None:
        """Count samples that were left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


def record_samples(
    source: Source, row: Row, number: int, renderer: Renderer, rules: Rules, tally: Tally
) -> list[Sample]:
    """The samples of one row, as they are trained on; `tally` counts them.

    Raises:
        DataError: the row is wrong, or too long or trains nothing and may not be.
    """
    tally.rows += 1
    remarks: list[str] = []
    try:
        conversation = source.parse(row)
        if rules.form == "pairs":
            made = pair_samples(renderer, conversation, number, rules.writing, remarks.append)
        else:
            made = renderer.samples(
                conversation, number, rules.masking, rules.writing, remarks.append
            )
    except NoReasoning:
        tally.drop(NOT_THOUGHT)
        return []
    except DataError as error:
        if rules.unusable == "error":
            raise
        tally.drop(reason_of(error))
        return []
    for remark in dict.fromkeys(remarks):
        tally.noted[remark] = tally.noted.get(remark, 0) + 1
    kept: list[Sample] = []
    for group in grouped(made):
        tally.longest = max(tally.longest, *(len(sample.tokens) for sample in group))
        fitted = _fitted(group, rules, tally)
        if fitted:
            kept += fitted
            tally.samples += 1
            tally.tokens += sum(len(sample.tokens) for sample in fitted)
            tally.trained += sum(sample.supervised for sample in fitted)
    return kept


def reason_of(error: DataError) -> str:
    """Why a record is left out, the same for all records with the same fault."""
    if isinstance(error, NothingSaid | NothingTrained):
        return UNTRAINED
    # What differs from one record to the next are numbers, and what is quoted of it.
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", error.what)[:120]


def _fitted(group: Group, rules: Rules, tally: Tally) -> Group:
    """A group within the limit: all of it, all of it cut alike, or none of it."""
    limit, longest = rules.max_seq_length, max(group, key=lambda sample: len(sample.tokens))
    if limit is None or len(longest.tokens) <= limit:
        return group
    excess = len(longest.tokens) - limit
    if rules.truncate == "error":
        raise DataError(
            f"this record has {len(longest.tokens)} tokens, more than train.max_seq_length = "
            f"{limit}",
            where=longest.where,
            remedy='raise it, or say what to do with such records: truncate = "left", "right" '
            'or "drop"',
        )
    if rules.truncate == "drop":
        tally.drop(TOO_LONG)
        return []
    tally.truncated += 1
    # As much is cut off the beginning of each, which is the prompt of all.
    kept = slice(excess, None) if rules.truncate == "left" else slice(limit)
    cut = [replace(s, tokens=s.tokens[kept], weights=s.weights[kept]) for s in group]
    # Of a pair some of the prompt has to be left, or its sides would not begin alike.
    begins = all(np.flatnonzero(sample.weights)[0] > excess for sample in group)
    asked = rules.truncate == "right" or len(group) == 1 or begins
    if asked and all(sample.weights[1:].any() for sample in cut):
        return cut
    if rules.unusable == "error":
        raise NothingTrained(
            f"nothing trained is left of this record, cut off at {limit} tokens",
            where=longest.where,
            remedy='raise train.max_seq_length, or leave such records out: unusable = "skip"',
        )
    tally.drop(UNTRAINED)
    return []
