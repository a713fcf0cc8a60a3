"""Few shapes of passes, since each is compiled anew and MLX keeps what it has compiled for good.

A compiled step takes a second or two, and some 20 MB of host memory, for each new shape of its
arrays (measured on 30 blocks), and MLX's cache of compiled functions never lets go of one
(ml-explore/mlx issue 4464). So a pass is filled up with padding to a shape that is compiled
already, where that costs little; when there are as many as there may be, it costs what it may,
and a pass that fits none is computed without being compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxtune.data.pack import Batch, filled_up

# Compiled at most.
MOST = 32
# How many times the work of a pass may become by padding: at first, and that much more when the
# last shape is about to be taken. Measured on chat-like lengths with batches of 1 to 32: 10 to 32
# shapes in 1,000 steps, at most 2 % of the passes not compiled, 4 to 23 % more tokens.
_AT_FIRST, _MORE = 1.1, 1.0
# A target costs about a quarter of a token in small models with large vocabularies.
_TARGET = 0.25


@dataclass(frozen=True)
class _Shape:
    """What a step is compiled for.

    Attributes:
        kind: which function is compiled.
        rows, width: of the grid.
        prefix, packed: as of `Batch`; they are constants of the compiled step.
        targets: how many there are.
        tree: whether groups share anything of their own.
        groups, sides: as of `Batch`; 0 where the loss does not look at them.
    """

    kind: str
    rows: int
    width: int
    prefix: int
    packed: bool
    targets: int
    tree: bool
    groups: int
    sides: int

    @classmethod
    def of(cls, batch: Batch, kind: str, grouped: bool) -> _Shape:
        rows, width = batch.tokens.shape
        tree, targets = batch.parents is not None, len(batch.targets)
        groups = (batch.groups, batch.sides) if grouped else (0, 0)
        return cls(kind, rows, width, batch.prefix, batch.packed, targets, tree, *groups)

    @property
    def cost(self) -> float:
        """In tokens."""
        return self.rows * self.width + _TARGET * self.targets

    def takes(self, other: _Shape) -> bool:
        """Whether a pass of the other shape can be filled up to this one."""
        # A prefix longer than a row would lie elsewhere in rows of another width.
        wide = self.width == other.width or self.width > other.width >= self.prefix
        alike = self._constants == other._constants
        large = self.rows >= other.rows and self.targets >= other.targets
        return alike and wide and large and self.groups >= other.groups

    @property
    def _constants(self) -> tuple[object, ...]:
        return self.kind, self.prefix, self.packed, self.tree, self.sides


class Shapes:
    """The shapes that a step has been compiled for.

    Args:
        most: how many there may be.
        grouped: whether the loss looks at groups of samples, so that their number counts.
    """

    def __init__(self, most: int = MOST, *, grouped: bool = False) -> None:
        self._most = most
        self._grouped = grouped
        self._known: list[_Shape] = []

    def __len__(self) -> int:
        return len(self._known)

    def fit(self, batch: Batch, kind: str) -> tuple[Batch, bool]:
        """The batch in a shape that is compiled, and whether there is one.

        Args:
            batch: of a pass.
            kind: name of the function that computes it.
        """
        own = _Shape.of(batch, kind, self._grouped)
        if own in self._known:
            return batch, True
        full = len(self._known) >= self._most
        allowed = own.cost * (_AT_FIRST + _MORE * len(self._known) / self._most)
        found = min(
            (shape for shape in self._known if shape.takes(own)),
            key=lambda shape: shape.cost,
            default=None,
        )
        if found is not None and (full or found.cost <= allowed):
            sizes = found.rows, found.width, found.targets, found.groups
            return filled_up(batch, *sizes), True
        if full:
            return batch, False
        self._known.append(own)
        return batch, True
