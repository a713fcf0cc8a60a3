"""The rows that a run keeps: those held out, as they are, and fingerprints of those trained on.

A data file may be edited, moved or deleted after the training. What was held out of it stays
with the run, so that an evaluation is of the same records ever after, and it can be told of any
other records whether the run was trained on them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from mlxtune.data.convert import json_line, to_record
from mlxtune.data.records import Conversation
from mlxtune.data.render import Renderer, Sample
from mlxtune.data.rules import Tally, record_samples
from mlxtune.data.sources import Source
from mlxtune.errors import DataError, MlxtuneError
from mlxtune.files import storage_errors
from mlxtune.recipe.schema import Recipe
from mlxtune.train.corpus import Corpus, held_out_source, rules_of, source_of
from mlxtune.train.run import Run

HELD_OUT, TRAINED = "held-out.jsonl", "trained-rows.u64"


def keep_rows(folder: Path, recipe: Recipe, corpus: Corpus) -> None:
    """Write what is kept of the rows into the folder of a run.

    Args:
        folder: of the run, while it is being made.
        recipe: of the run.
        corpus: what it is trained on.

    Raises:
        DataError: a file has changed since it was tokenized.
        StorageError: the disk refuses the write.
    """
    with storage_errors(folder):
        corpus.trained_fingerprints().astype("<u8").tofile(folder / TRAINED)
        if len(corpus.held_out):
            with (folder / HELD_OUT).open("wb") as file:
                file.writelines(map(_line, conversations_of(recipe, corpus.held_out)))


def held_out_rows(run: Run) -> Path | None:
    """The file of the records that a run held out; None if it held out none."""
    path = run.path / HELD_OUT
    return path if path.is_file() else None


def trained_on(run: Run, conversations: Collection[Conversation]) -> int:
    """How many of these records a run was trained on.

    Args:
        run: finished or not.
        conversations: any records.
    """
    path = run.path / TRAINED
    if not path.is_file():
        return 0
    known = np.fromfile(path, "<u8")
    asked = np.array([c.fingerprint() for c in conversations], np.uint64)
    return int(np.isin(asked, known).sum())


def rows_to_try(run: Run, renderer: Renderer, count: int) -> list[Sample]:
    """Samples to try a run's model on: held-out records, else some that were trained on.

    Args:
        run: a run.
        renderer: of its tokenizer.
        count: at most this many.

    Returns:
        None at all where the data is gone: a run may outlive it.
    """
    recipe = run.recipe()
    rules = replace(rules_of(recipe, recipe.data[0]), unusable="skip")
    found: list[Sample] = []
    try:
        for source in _sources_to_try(run):
            for number, row in enumerate(source.rows(), start=1):
                made = record_samples(source, row, number, renderer, rules, Tally())
                found += [sample for sample in made if sample.side == 0]  # of a pair, the chosen
                if len(found) >= count:
                    return found[:count]
    except MlxtuneError:
        pass
    return found


def records_to_try(run: Run, count: int) -> list[Conversation]:
    """The first conversations that `rows_to_try` takes its samples of; none where data is gone."""
    chats = (each for source in _sources_to_try(run) for each in source if each.turns)
    try:
        return list(islice(chats, count))
    except MlxtuneError:
        return []


def _sources_to_try(run: Run) -> list[Source]:
    kept = held_out_rows(run)
    return [Source(str(kept))] if kept is not None else list(map(source_of, run.recipe().data))


def conversations_of(recipe: Recipe, samples: Sequence[Sample]) -> Iterator[Conversation]:
    """The records that held-out samples were made of, as they are.

    Args:
        recipe: that the samples are of.
        samples: held out.

    Raises:
        DataError: a file is missing or wrong.
    """
    numbers = {sample.record for sample in samples}
    given = held_out_source(recipe)
    sources = [given] if given is not None else [source_of(section) for section in recipe.data]
    rows = ((source, row) for source in sources for row in source.rows())
    last = max(numbers, default=0)
    for number, (source, row) in enumerate(islice(rows, last), start=1):
        if number in numbers:
            yield source.parse(row)


def _line(conversation: Conversation) -> bytes:
    """A record in the shape that holds all of it."""
    if conversation.turns:
        shape = "preference" if conversation.rejected else "messages"
    else:
        shape = "text" if conversation.closed else "input_output"
    try:
        return json_line(to_record(conversation, shape), conversation.where)
    except DataError:
        # A field beside the conversation, which the shape calls otherwise or JSON cannot hold.
        return json_line(to_record(replace(conversation, tags={}), shape), conversation.where)
