"""Parameters of one shape, joined to one array for the update of the optimizer.

An adapter has hundreds of small matrices of a few shapes, and an optimizer has some twenty
operations for each. On a GPU each operation is a kernel launch, which takes longer than the
operation itself; joined, hundreds of updates are one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

Arrays = dict[str, mx.array]

# Weights of one joined array at most, 64 MiB of float32: joining copies the gradients and the
# parameters, and this bounds what the copies take beside them. Larger parameters gain nothing.
MOST = 1 << 24


@dataclass(frozen=True)
class Stack:
    """Some parameters that are updated together.

    Attributes:
        name: of the joined array; of the parameter itself where it is alone.
        paths: dotted, of the parameters, in order.
    """

    name: str
    paths: tuple[str, ...]

    def join(self, arrays: Arrays) -> mx.array:
        """The arrays of these paths one after another along their first axis."""
        own = [arrays[path] for path in self.paths]
        return own[0] if len(own) == 1 else mx.concatenate(own)

    def split(self, array: mx.array) -> Arrays:
        """The inverse of `join`."""
        count = len(self.paths)
        parts = [array] if count == 1 else mx.split(array, count)
        return dict(zip(self.paths, parts, strict=True))


def stacks_of(parameters: Arrays, joins: Callable[[mx.array], bool]) -> tuple[Stack, ...]:
    """Which parameters are updated together: those of one name, shape and type.

    Args:
        parameters: by dotted path.
        joins: whether the optimizer does the same with a parameter when it is a part of a
            larger array.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for path, array in parameters.items():
        leaf = path.rpartition(".")[2]
        alone = array.ndim == 0 or not joins(array)
        alike[path if alone else leaf, array.shape, array.dtype].append(path)
    made: list[Stack] = []
    for paths in alike.values():
        first = parameters[paths[0]]
        size = max(1, MOST // max(1, first.size))
        for start in range(0, len(paths), size):
            made.append(_stack(paths[start : start + size], first, len(made)))
    return tuple(made)


def _stack(paths: list[str], first: mx.array, number: int) -> Stack:
    if len(paths) == 1:
        name = paths[0]
    else:
        leaf, dims = paths[0].rpartition(".")[2], "x".join(map(str, first.shape))
        name = f"{number:03d}-{leaf}-{dims}-{len(paths)}"
    return Stack(name, tuple(paths))


def joined(stacks: Iterable[Stack], arrays: Arrays) -> Arrays:
    """Each stack's array by its name."""
    return {stack.name: stack.join(arrays) for stack in stacks}


def split(stacks: Iterable[Stack], arrays: Arrays) -> Arrays:
    """Each parameter by its path; the inverse of `joined`."""
    parts: Arrays = {}
    for stack in stacks:
        parts |= stack.split(arrays[stack.name])
    return parts
