"""The model that an objective compares with: the one that training begins with.

It is no second model. Without adapters, or with those that training began with, the model itself
gives the log-probabilities of all that is trained on, once; they are kept beside the tokens under
a name of all that they depend on, so that later epochs and runs take them from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlxtune.adapters.saved import SavedAdapter
from mlxtune.adapters.store import adapter_arrays, fitted, set_adapter_arrays, start_from
from mlxtune.data.groups import tokens_of
from mlxtune.data.passes import Layout
from mlxtune.data.store import Groups, TokenStore, lengths_of
from mlxtune.layers.adapter import without_adapters
from mlxtune.train.heldout import token_losses

# Raise it with what the values depend on beside what `Reference.key` has.
_LAYOUT = 1
# Tokens that are looked through at a time: their samples are sorted by length.
_AT_ONCE = 1 << 18

# Is given how many tokens have been computed, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """The model before training, as the model that is trained can be it for a while.

    Attributes:
        model: with adapters in place.
        initial: gives the adapter that training began with; it is called where that is needed.
            None for the model without adapters.
        facts: what the values depend on beside the tokens: the model's files and type, and the
            adapter's. JSON.
    """

    model: nn.Module
    initial: Callable[[], SavedAdapter] | None
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        """A hash of all that the values depend on beside the tokens."""
        text = json.dumps([_LAYOUT, self.facts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference for a while.

        Raises:
            RunError: the adapter that training began with is gone, or no longer what it was.
        """
        if self.initial is None:
            with without_adapters(self.model):
                yield
            return
        now, adapter = adapter_arrays(self.model), fitted(self.initial(), self.model)
        try:
            start_from(adapter, self.model)
            # Those that it does not have were fresh, and changed nothing.
            with without_adapters(self.model, but=adapter.targets):
                yield
        finally:
            set_adapter_arrays(self.model, now, where=adapter.where)

    def known_to(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        layout: Layout,
        progress: Progress = lambda _done, _all: None,
    ) -> bool:
        """Give a store's samples the reference's log-probabilities of their trained tokens.

        Args:
            store: of tokens; groups of samples share what they begin with.
            batch_size: groups to a pass, at most.
            layout: of passes.
            progress: called now and then.

        Returns:
            Whether they were computed now, and not taken from the cache.

        Raises:
            StorageError: the cache takes no files.
        """

        def compute(path: Path) -> None:
            with self.in_place():
                _write(path, self.model, store, batch_size, layout, progress)

        return store.with_references(f"reference-{self.key}.f32", compute)


def _write(
    path: Path,
    model: nn.Module,
    store: TokenStore,
    batch_size: int,
    layout: Layout,
    progress: Progress,
) -> None:
    """Write the log-probabilities of a store's trained tokens; those of others are zero."""
    offsets, lengths = store.offsets(), lengths_of(store)
    total = int(lengths.sum())
    values = np.memmap(path, np.float32, "w+", shape=(total,))
    groups, at, done = Groups(store), 0, 0
    while at < len(groups):
        some = []
        size = 0
        while at < len(groups) and size < _AT_ONCE:
            some += groups[at]
            size += tokens_of(groups[at])
            at += 1
        first = done
        found = token_losses(model, some, batch_size, layout)
        for number, (sample, losses) in enumerate(zip(some, found, strict=True), start=first):
            trained = np.flatnonzero(sample.weights[1:]) + 1
            values[offsets[number] + trained] = -losses
        done += len(some)
        progress(int(lengths[:done].sum()), total)
    values.flush()
    del values
