"""Lay samples out as a grid of equal rows for one pass through the model.

Two layouts share one form. *Padded*: a row holds one sample, as everyone does it.
*Packed*: the tokens that all samples of the batch begin with (a system prompt, the
template's header) stand once at the front, and rows hold the rest, several short samples
to a row. What the samples of a group begin with beyond that, their prompt, stands once too,
before them in the same row: a tree of segments. Positions count as if each sample stood alone.
Attention in a packed grid costs rows x width x (prefix + width), not the square of all its
tokens, and half of that in rows full of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.data.groups import Group, grouped
from mlxtune.data.render import Sample

PADDING = -1
PREFIX = 0
NO_PARENT = -2

# Shapes are rounded up so that few of them occur: each new one is compiled anew.
WIDTH_STEP = 8
# Metal's attention has no backward pass for eight queries or fewer: MLX 0.32.4 ends with an error.
FEW_WIDTH_STEP = 16
TARGET_STEP = 32
PREFIX_STEP = 16
# A shorter common prefix is not worth its own rows.
SHORTEST_PREFIX = 8

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Samples laid out for the model.

    Attributes:
        tokens: int32 (rows, width).
        positions: int32 (rows, width), each token's position in its own sample.
        segments: int32 (rows, width): 0 for the shared prefix, 1, 2, … for samples and for what
            the samples of a group share, -1 for padding.
        prefix: tokens of the shared prefix, which stands at the front of the grid.
            Samples may begin in its last row.
        packed: whether the model must be told about positions and segments. A padded
            batch needs nothing: each row is a sample, and padding comes last.
        sources: int32 (m,), index into the flat grid of the hidden state that predicts
            each target.
        targets: int32 (m,), token ids.
        weights: float32 (m,), loss weights; 0 fills m up to one of few sizes.
        records: record numbers of the samples, as they lie in the grid.
        counts: targets of each of them, which follow each other in this order.
        token_count: tokens of all samples, as if each stood alone.
        supervised: targets that carry weight.
        owners: int32 (m,), whose each target is: `sides` times the number of its group in the
            batch, plus its side.
        references: float32 (m,), the reference's log-probability of each target, or zero.
        groups: how many there are; `filled_up` adds empty ones.
        sides: samples of the largest group.
        filled_groups: those of `groups` that are not empty.
        parents: int32 (rows, width), for tokens of a sample the segment of what its group
            shares, or -2 where there is none; None if no group of the batch shares anything.
    """

    tokens: Ints
    positions: Ints
    segments: Ints
    prefix: int
    packed: bool
    sources: Ints
    targets: Ints
    weights: npt.NDArray[np.float32]
    records: tuple[int, ...]
    counts: tuple[int, ...]
    token_count: int
    supervised: int
    owners: Ints
    references: npt.NDArray[np.float32]
    groups: int
    sides: int
    filled_groups: int
    parents: Ints | None = None

    @property
    def weight(self) -> float:
        """Sum of the loss weights."""
        return float(self.weights.sum(dtype=np.float64))

    def places(self) -> list[slice]:
        """Where among the targets those of each sample are, in the order of `records`."""
        ends = np.cumsum(self.counts).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]


@dataclass(frozen=True)
class Unit:
    """What is laid out in one piece: a sample, or a group with what its samples share before them.

    Attributes:
        samples: indices of its samples.
        shared: tokens that they share beyond the prefix of the pass.
        length: tokens that it takes.
    """

    samples: tuple[int, ...]
    shared: int
    length: int


@dataclass(frozen=True)
class Grid:
    """Where the samples of a pass stand.

    Attributes:
        prefix: tokens that all of them begin with, which stand once at the front.
        width: of a row, in tokens.
        units: what is laid out.
        rows: for each row, the units in it: (index, column it begins at).
        cost: of computing it, in tokens.
        few_shapes: whether sizes are rounded up to few.
    """

    prefix: int
    width: int
    units: list[Unit]
    rows: list[list[tuple[int, int]]]
    cost: float
    few_shapes: bool = False

    @property
    def causal(self) -> bool:
        """Whether each row holds one sample and nothing else."""
        alone = all(len(row) == 1 for row in self.rows)
        return alone and not self.prefix and not any(unit.shared for unit in self.units)


def grid_of(samples: Sequence[Sample], *, few_shapes: bool = False) -> Grid:
    """The grid of least cost.

    Projections cost by the token and attention by token times visible keys; a key costs
    about a thousandth of a token's projections for models of common width.
    """
    prefix = common_prefix(samples)
    if few_shapes:
        prefix -= prefix % PREFIX_STEP
        prefix = prefix if prefix >= SHORTEST_PREFIX else 0
    units = _units(grouped(samples), prefix)
    lengths = [unit.length for unit in units]
    longest = _round_up(max(lengths), FEW_WIDTH_STEP if few_shapes else WIDTH_STEP)
    best: Grid | None = None
    tokens = prefix + sum(lengths)
    width = longest
    while width <= 4 * longest:
        rounded = _rounded_width(width, few_shapes)
        # What it would cost if no token of a row were left empty.
        if best is None or _cost(-(-tokens // rounded), rounded, prefix) < best.cost:
            rows = _best_fit(lengths, rounded, prefix)
            cost = _cost(len(rows), rounded, prefix)
            if best is None or cost < best.cost:
                best = Grid(prefix, rounded, units, rows, cost, few_shapes)
        width += max(WIDTH_STEP, _round_up(width // 32, WIDTH_STEP))
    assert best is not None
    return best


def _units(groups: Sequence[Group], prefix: int) -> list[Unit]:
    units: list[Unit] = []
    first = 0
    for group in groups:
        numbers = range(first, first + len(group))
        first += len(group)
        shared = max(0, common_prefix(group) - prefix)
        # The last few tokens of a lone group's prompt, which are no whole step of a prefix.
        shared = shared if shared >= SHORTEST_PREFIX else 0
        own = [len(sample.tokens) - prefix - shared for sample in group]
        if shared:
            units.append(Unit(tuple(numbers), shared, shared + sum(own)))
        else:
            units += [Unit((n,), 0, length) for n, length in zip(numbers, own, strict=True)]
    return units


def _cost(rows: int, width: int, prefix: int) -> float:
    """Of a grid, in tokens."""
    return width * (rows + _keys_seen(rows, width, prefix) / 1000)


def _keys_seen(rows: int, width: int, prefix: int) -> int:
    """Keys that a token of each row may see: in rows full of the prefix, none after it."""
    full = prefix // width
    return width * full * (full + 1) // 2 + (rows - full) * (prefix + width)


def pad(samples: Sequence[Sample], *, few_shapes: bool = False) -> Batch:
    """One sample to a row, padded at the right to a common width."""
    width = _rounded_width(max(len(s.tokens) for s in samples), few_shapes)
    units = [Unit((i,), 0, len(sample.tokens)) for i, sample in enumerate(samples)]
    rows = [[(index, 0)] for index in range(len(samples))]
    grid = Grid(0, width, units, rows, float(width * len(rows)), few_shapes)
    return _batch(samples, grid, packed=False)


def pack(samples: Sequence[Sample], grid: Grid | None = None) -> Batch:
    """The common prefix once, and the rest of the samples packed into rows."""
    return _batch(samples, grid or grid_of(samples), packed=True)


def common_prefix(samples: Sequence[Sample], *, shortest: int = SHORTEST_PREFIX) -> int:
    """Tokens that all samples begin with and none of them is trained on.

    At least one token of each sample is left over; fewer than `shortest`, which would not pay,
    count as none.
    """
    if len(samples) < 2:
        return 0
    limit = min(int(min([len(s.tokens) - 1, *np.flatnonzero(s.weights)[:1]])) for s in samples)
    first = samples[0].tokens[:limit]
    same = np.ones(limit, bool)
    for sample in samples[1:]:
        same &= sample.tokens[:limit] == first
    prefix = limit if same.all() else int(np.argmin(same))
    return prefix if prefix >= shortest else 0


def _best_fit(lengths: Sequence[int], width: int, prefix: int) -> list[list[tuple[int, int]]]:
    """Best-fit decreasing: each sample goes to the fullest row that still takes it.

    The prefix comes first; its last row takes samples like any other.
    """
    used = [width] * (prefix // width) + ([prefix % width] if prefix % width else [])
    rows: list[list[tuple[int, int]]] = [[] for _ in used]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r, u in enumerate(used) if u + lengths[index] <= width]
        row = max(fitting, key=lambda r: used[r]) if fitting else len(rows)
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append((index, used[row]))
        used[row] += lengths[index]
    return rows


def _batch(samples: Sequence[Sample], grid: Grid, *, packed: bool) -> Batch:
    prefix, rows, width = grid.prefix, len(grid.rows), grid.width
    tokens = np.zeros(rows * width, np.int32)
    positions = np.zeros(rows * width, np.int32)
    segments = np.full(rows * width, PADDING, np.int32)
    parents = np.full(rows * width, NO_PARENT, np.int32)
    slots, groups, sides = _slots(samples)
    sources, targets, weights, owners, references, records = [], [], [], [], [], []
    number = 0

    def put(sample: Sample, begin: int, end: int, place: int, segment: int) -> None:
        """Tokens from `begin` to `end` of a sample, from `place` of the grid on."""
        here = slice(place, place + end - begin)
        tokens[here] = sample.tokens[begin:end]
        positions[here] = np.arange(begin, end)
        segments[here] = segment

    if prefix:
        put(samples[0], 0, prefix, 0, PREFIX)
    for row, items in enumerate(grid.rows):
        for index, column in items:
            unit = grid.units[index]
            shared, own = row * width + column, prefix + unit.shared
            parent = NO_PARENT
            if unit.shared:
                number += 1
                parent = number
                put(samples[unit.samples[0]], prefix, own, shared, parent)
            start = shared + unit.shared
            for sample_number in unit.samples:
                sample = samples[sample_number]
                number += 1
                put(sample, own, len(sample.tokens), start, number)
                parents[start : start + len(sample.tokens) - own] = parent
                # The token at index t of the sample is predicted by the one before it, which may
                # be the last of what is shared.
                trained = np.flatnonzero(sample.weights[1:]) + 1
                before = trained - 1
                where = np.where(before >= prefix, shared + before - prefix, before)
                sources.append(np.where(before >= own, start + before - own, where))
                targets.append(sample.tokens[trained])
                weights.append(sample.weights[trained])
                owners.append(np.full(len(trained), slots[sample_number]))
                known = sample.references
                references.append(np.zeros(len(trained)) if known is None else known[trained])
                records.append(sample.record)
                start += len(sample.tokens) - own
    supervised = sum(len(t) for t in targets)
    size = _rounded(max(supervised, 1), TARGET_STEP, grid.few_shapes)

    def filled(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.pad(np.concatenate(parts), (0, size - supervised))

    return Batch(
        tokens=tokens.reshape(rows, width),
        positions=positions.reshape(rows, width),
        segments=segments.reshape(rows, width),
        prefix=prefix,
        packed=packed,
        sources=filled(sources).astype(np.int32),
        targets=filled(targets),
        weights=filled(weights),
        records=tuple(records),
        counts=tuple(map(len, targets)),
        token_count=sum(len(sample.tokens) for sample in samples),
        supervised=supervised,
        owners=filled(owners).astype(np.int32),
        references=filled(references).astype(np.float32),
        groups=groups,
        sides=sides,
        filled_groups=groups,
        parents=parents.reshape(rows, width) if (parents != NO_PARENT).any() else None,
    )


def _slots(samples: Sequence[Sample]) -> tuple[list[int], int, int]:
    """The number of each sample among `groups` x `sides`, and these two."""
    groups = grouped(samples)
    sides = max(len(group) for group in groups)
    slots = [
        number * sides + side for number, group in enumerate(groups) for side in range(len(group))
    ]
    return slots, len(groups), sides


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _rounded_width(width: int, few_shapes: bool) -> int:
    return _rounded(width, FEW_WIDTH_STEP if few_shapes else WIDTH_STEP, few_shapes)


def _rounded(value: int, step: int, few_shapes: bool) -> int:
    """Up to a multiple of `step`; if shapes are to be few, to one of three sizes an octave."""
    if few_shapes:
        octave = 1 << max(0, (value - 1).bit_length() - 1)
        step = max(step, _round_up(octave // 3, step))
    return _round_up(value, step)


def filled_up(batch: Batch, rows: int, width: int, targets: int, groups: int = 0) -> Batch:
    """A batch of the same samples with more padding.

    Args:
        batch: to be filled up.
        rows, width: of the larger grid. The width is the batch's own where its prefix is longer
            than a row.
        targets: how many; those added have no weight.
        groups: how many, if they are more; those added are empty.
    """
    below, right = rows - batch.tokens.shape[0], width - batch.tokens.shape[1]
    more = targets - len(batch.targets)
    if below < 0 or right < 0 or more < 0 or (right and batch.prefix > batch.tokens.shape[1]):
        raise ValueError(f"a batch of {batch.tokens.shape} cannot be filled up to {rows, width}")

    def grid(array: Ints, value: int = 0) -> Ints:
        return np.pad(array, ((0, below), (0, right)), constant_values=value)

    row, column = np.divmod(batch.sources, batch.tokens.shape[1])
    return replace(
        batch,
        tokens=grid(batch.tokens),
        positions=grid(batch.positions),
        segments=grid(batch.segments, PADDING),
        parents=None if batch.parents is None else grid(batch.parents, NO_PARENT),
        sources=np.pad(row * width + column, (0, more)).astype(np.int32),
        targets=np.pad(batch.targets, (0, more)),
        weights=np.pad(batch.weights, (0, more)),
        owners=np.pad(batch.owners, (0, more)),
        references=np.pad(batch.references, (0, more)),
        groups=max(groups, batch.groups),
    )
