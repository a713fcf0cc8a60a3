"""Small things about arrays: MLX's trees and scalars with types, and a faster exp on CPUs."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten


def scalar(array: mx.array) -> float:
    """The value of an array of one number."""
    return float(cast(float, array.item()))


def exp(x: mx.array) -> mx.array:
    """e to the x. On a CPU MLX takes powers three times as fast as exponentials."""
    return mx.power(math.e, x) if mx.default_device() == mx.cpu else mx.exp(x)


def flat(tree: Any) -> dict[str, mx.array]:
    """Dotted path to array, for all arrays of a tree."""
    leaves = cast(list[tuple[str, Any]], tree_flatten(tree))
    return {path: leaf for path, leaf in leaves if isinstance(leaf, mx.array)}


def random_key() -> mx.array:
    """MLX's random state: uint32 (2,)."""
    return cast(list[mx.array], mx.random.state)[0]


def set_random_key(key: mx.array) -> None:
    """Put MLX's random state back to a value of `random_key`."""
    # The state itself cannot be assigned; a seed's two halves are its key.
    high, low = cast(list[int], key.tolist())
    mx.random.seed((high << 32) | low)
