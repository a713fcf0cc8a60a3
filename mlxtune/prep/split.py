"""Training and held-out rows: which goes where, and how evenly a tag is spread over both."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from mlxtune.data.records import Conversation
from mlxtune.errors import DataError
from mlxtune.prep.dedup import root, unite


def tie(clusters: Sequence[int], groups: Sequence[Hashable | None]) -> list[int]:
    """Clusters of rows that must stay together: near-duplicates, and those of one group.

    Args:
        clusters: for each row the first of its cluster of duplicates.
        groups: for each row the key of its group; None: it has none.

    Returns:
        For each row the first row that it is tied to.
    """
    parent = list(clusters)
    first: dict[Hashable, int] = {}
    for row, group in enumerate(groups):
        if group is not None:
            unite(parent, row, first.setdefault(group, row))
    return [root(parent, row) for row in range(len(parent))]


def hold_out(ties: Sequence[int], val_size: float, seed: int) -> list[bool]:
    """For each row whether it is held out; rows that are tied never part.

    Bundles of tied rows are drawn at random and taken while they fit, so that fewer rows
    than asked for may be held out, and never more.

    Args:
        ties: for each row the first row that it is tied to.
        val_size: a share below 1, or a number of rows.
        seed: of the draw.

    Raises:
        DataError: there are too few rows, or no bundle is small enough.
    """
    target = round(val_size * len(ties)) if val_size < 1 else int(val_size)
    target = max(target, 1)
    if target >= len(ties):
        raise DataError(
            f"{target} of {len(ties)} rows cannot be held out: none would be left to train on",
            where="val_size",
            remedy="make it smaller",
        )
    bundles: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(ties):
        bundles[first].append(row)
    drawn = list(bundles.values())
    random.Random(seed).shuffle(drawn)
    held = [False] * len(ties)
    left = target
    for bundle in drawn:
        if len(bundle) <= left:
            left -= len(bundle)
            for row in bundle:
                held[row] = True
    if left == target:
        smallest = min(map(len, drawn))
        raise DataError(
            f"no rows can be held out: the smallest group has {smallest}, more than the {target} "
            "asked for",
            where="val_size",
            remedy="make val_size larger, or group by a tag with smaller groups",
        )
    return held


def group_key(conversation: Conversation, tag: str) -> Hashable | None:
    """The value of a tag, as it can be compared; None where the row doesn't have it."""
    value = conversation.tags.get(tag)
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def require_tag(groups: Iterable[Any], tag: str) -> None:
    """Make sure that rows have the tag that they are grouped by.

    Raises:
        DataError: none has it, so that its name is a slip of the pen.
    """
    if all(group is None for group in groups):
        raise DataError(
            f"no record has the field {tag!r}",
            where="group_by",
            remedy="name a field that records have beside the conversation",
        )


def balance(
    categories: Sequence[Hashable | None], held: Sequence[bool]
) -> Mapping[str, Mapping[str, int]]:
    """Per split the number of rows of each category; empty when no row has one."""
    if all(category is None for category in categories):
        return {}
    counts: dict[str, Counter[str]] = {"train": Counter()}
    for category, out in zip(categories, held, strict=True):
        name = "(none)" if category is None else str(category)
        counts.setdefault("heldout" if out else "train", Counter())[name] += 1
    return counts
