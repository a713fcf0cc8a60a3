"""How a step's groups of samples are divided into passes through the model.

The loss of a step is a sum over its samples, so how they are divided changes nothing but
time and memory: the window in which samples are put together is the whole step, whatever
order the shuffle gave them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlxtune.data.groups import Group, grouped, samples_of, tokens_of
from mlxtune.data.pack import Batch, Grid, grid_of, pack, pad
from mlxtune.data.render import Sample


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
    """The passes that compute these samples soonest, `batch_size` groups at most to each.

    More and smaller passes waste less on unequal lengths and keep fewer activations; fewer
    ones compute a shared prefix less often. A group stays together.
    """
    groups = grouped(samples)
    if not groups:
        return []
    fewest = -(-len(groups) // batch_size)
    if not layout.packing:
        # Equal lengths together, to pad little.
        ordered = sorted(groups, key=_longest)
        return [
            pad(samples_of(ordered[at : at + batch_size]), few_shapes=layout.few_shapes)
            for at in range(0, len(ordered), batch_size)
        ]
    wanted = (fewest * factor for factor in (1, 2, 4, 8))
    counts = sorted({min(c, len(groups)) for c in wanted})
    best = min(
        (plan for count in counts for plan in _plans(groups, count, batch_size, layout)),
        key=lambda plan: _cost([grid for _, grid in plan], layout),
    )
    return [_laid_out(chosen, grid, layout) for chosen, grid in best]


def _laid_out(samples: list[Sample], grid: Grid, layout: Layout) -> Batch:
    batch = pack(samples, grid)
    return replace(batch, packed=False) if layout.causal_rows and grid.causal else batch


_Plan = list[tuple[list[Sample], Grid]]


def _plans(groups: Sequence[Group], count: int, batch_size: int, layout: Layout) -> Iterator[_Plan]:
    """Divisions worth comparing: by equal size, and by what samples begin with."""
    for parts in (_balanced(groups, count, batch_size), _alike(groups, count, batch_size)):
        each = [samples_of(part) for part in parts]
        yield [(samples, grid_of(samples, few_shapes=layout.few_shapes)) for samples in each]


def _cost(grids: list[Grid], layout: Layout) -> float:
    """Time of passes, in tokens."""
    return sum(grid.cost + layout.pass_cost for grid in grids)


def _balanced(groups: Sequence[Group], count: int, batch_size: int) -> list[list[Group]]:
    """Longest first, each to the pass with the fewest tokens (Graham 1969)."""
    parts: list[list[Group]] = [[] for _ in range(count)]
    sizes = [0] * count
    for group in sorted(groups, key=lambda group: -tokens_of(group)):
        at = min((i for i in range(count) if len(parts[i]) < batch_size), key=sizes.__getitem__)
        parts[at].append(group)
        sizes[at] += tokens_of(group)
    return [part for part in parts if part]


def _alike(groups: Sequence[Group], count: int, batch_size: int) -> list[list[Group]]:
    """Neighbours in dictionary order, which share the most of their beginnings."""
    ordered = sorted(groups, key=lambda group: group[0].tokens.astype(">i4").tobytes())
    size = min(batch_size, -(-len(ordered) // count))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def _longest(group: Group) -> int:
    return max(len(sample.tokens) for sample in group)
