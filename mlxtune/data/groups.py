"""Groups: samples that an objective compares, so that they stay in one pass.

The chosen and the rejected answer to a prompt are a group, as are several answers drawn for one.
The samples of a group follow each other; the first of them has side 0. Where an objective
compares nothing, all samples have side 0, and each is a group of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlxtune.data.render import Sample

Group = list[Sample]


def grouped(samples: Iterable[Sample]) -> list[Group]:
    """Samples that follow each other, by group."""
    groups: list[Group] = []
    for sample in samples:
        if sample.side == 0 or not groups:
            groups.append([])
        groups[-1].append(sample)
    return groups


def samples_of(groups: Iterable[Group]) -> list[Sample]:
    """The samples of groups, one after another."""
    return [sample for group in groups for sample in group]


def tokens_of(group: Group) -> int:
    """The tokens of all samples of a group."""
    return sum(len(sample.tokens) for sample in group)
