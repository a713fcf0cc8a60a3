"""What training leaves on the screen when it ends: losses, a small curve of them, the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
# In columns: the longest curve, and the shortest one that shows anything.
_LONGEST, _SHORTEST = 40, 8


@dataclass
class History:
    """What was reported while a run trained.

    Attributes:
        losses: of each report, mean over the steps since the one before.
        held_out: step to the held-out loss after it.
        step: the last one that was done.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    step: int = 0

    def lines(
        self, first: int, total: int, seconds: float, width: int, *, plain: bool
    ) -> list[str]:
        """The summary at the end; nothing if no step was done.

        Args:
            first: the step that training began after.
            total: the step that it was to end at.
            seconds: that it took.
            width: of the terminal, in columns.
            plain: use no signs but ASCII.
        """
        if self.step <= first:
            return []
        steps = self.step - first
        count = f"{steps} {'step' if steps == 1 else 'steps'} in {duration(seconds)}"
        whole = self.step == total
        lines = [f"trained {count}" if whole else f"stopped at step {self.step}/{total}: {count}"]
        arrow = "->" if plain else "→"
        for name, values in (("loss", self.losses), ("held-out loss", [*self.held_out.values()])):
            if values:
                ends = dict.fromkeys((f"{values[0]:.4f}", f"{values[-1]:.4f}"))
                said = f"{name:<14} {f' {arrow} '.join(ends)}"
                room = min(_LONGEST, width - len(said) - 2)
                lines.append(f"{said}  {curve(values, room, plain=plain)}".rstrip())
        return lines


def curve(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """Values as a line of blocks, the lowest value the lowest block.

    Args:
        values: in order; of what is no number a gap is left.
        width: columns at most; where there are more values, each column is a mean of some.
        plain: use no signs but ASCII.

    Returns:
        Nothing where there are fewer than three values, or no room.
    """
    if len(values) < 3 or width < _SHORTEST:
        return ""
    levels = _ASCII_LEVELS if plain else _LEVELS
    columns = min(width, len(values))
    ends = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(levels) - 1)
    return "".join(
        levels[round((mean - low) / step) if step else 0] if math.isfinite(mean) else " "
        for mean in means
    )


def duration(seconds: float) -> str:
    """As people say it: 48 s, 4:51 min, 2:05:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
