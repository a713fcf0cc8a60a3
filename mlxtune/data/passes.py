"""How a step's samples are divided into passes through the model.

The loss of a step is a sum over its samples, so how they are divided changes nothing but
time and memory: the window in which samples are put together is the whole step, whatever
order the shuffle gave them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlxtune.data.pack import Batch, Grid, grid_of, pack, pad
from mlxtune.data.render import Sample

Group = list[Sample]


@dataclass(frozen=True)
class Layout:
    """What pays on a device.

    Attributes:
        packing: pack the samples of a pass instead of padding them.
        few_shapes: round sizes up coarsely, since each new shape is compiled anew.
        pass_cost: what a pass costs beside its tokens, in tokens.
        causal_rows: give a pass whose rows hold one sample each, with no shared prefix, to the
            model's own attention, which needs no more than a causal mask for it.
    """

    packing: bool = True
    few_shapes: bool = False
    pass_cost: int = 32
    causal_rows: bool = False


def passes(samples: Sequence[Sample], batch_size: int, layout: Layout) -> list[Batch]:
    """The passes that compute these samples soonest, `batch_size` samples at most to each.

    More and smaller passes waste less on unequal lengths and keep fewer activations; fewer
    ones compute a shared prefix less often.
    """
    if not samples:
        return []
    fewest = -(-len(samples) // batch_size)
    if not layout.packing:
        # Equal lengths together, to pad little.
        ordered = sorted(samples, key=lambda s: len(s.tokens))
        return [
            pad(ordered[at : at + batch_size], few_shapes=layout.few_shapes)
            for at in range(0, len(ordered), batch_size)
        ]
    wanted = (fewest * factor for factor in (1, 2, 4, 8))
    counts = sorted({min(c, len(samples)) for c in wanted})
    best = min(
        (plan for count in counts for plan in _plans(samples, count, batch_size, layout)),
        key=lambda plan: _cost([grid for _, grid in plan], layout),
    )
    return [_laid_out(group, grid, layout) for group, grid in best]


def _laid_out(group: Group, grid: Grid, layout: Layout) -> Batch:
    batch = pack(group, grid)
    alone = not grid.prefix and all(len(row) == 1 for row in grid.rows)
    return replace(batch, packed=False) if layout.causal_rows and alone else batch


_Plan = list[tuple[Group, Grid]]


def _plans(
    samples: Sequence[Sample], count: int, batch_size: int, layout: Layout
) -> Iterator[_Plan]:
    """Divisions worth comparing: by equal size, and by what samples begin with."""
    for groups in (_balanced(samples, count, batch_size), _alike(samples, count, batch_size)):
        yield [(group, grid_of(group, few_shapes=layout.few_shapes)) for group in groups]


def _cost(grids: list[Grid], layout: Layout) -> float:
    """Time of passes, in tokens."""
    return sum(grid.cost + layout.pass_cost for grid in grids)


def _balanced(samples: Sequence[Sample], count: int, batch_size: int) -> list[Group]:
    """Longest first, each to the group with the fewest tokens (Graham 1969)."""
    groups: list[Group] = [[] for _ in range(count)]
    sizes = [0] * count
    for sample in sorted(samples, key=lambda s: -len(s.tokens)):
        at = min((i for i in range(count) if len(groups[i]) < batch_size), key=sizes.__getitem__)
        groups[at].append(sample)
        sizes[at] += len(sample.tokens)
    return [group for group in groups if group]


def _alike(samples: Sequence[Sample], count: int, batch_size: int) -> list[Group]:
    """Neighbours in dictionary order, which share the most of their beginnings."""
    ordered = sorted(samples, key=lambda s: s.tokens.astype(">i4").tobytes())
    size = min(batch_size, -(-len(ordered) // count))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]
