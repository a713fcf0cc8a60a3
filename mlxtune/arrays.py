"""Small things about arrays: MLX's trees and scalars with types, and a faster exp on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlxtune.device import on_cpu

Function = Callable[..., Any]
# Is told function, gradient and arguments of a call, and returns what the call gives.
Interceptor = Callable[[Function, Function, tuple[mx.array, ...]], Any]

_interceptor: ContextVar[Interceptor | None] = ContextVar("interceptor", default=None)


def scalar(array: mx.array) -> float:
    """The value of an array of one number."""
    return float(cast(float, array.item()))


def exp(x: mx.array) -> mx.array:
    """e to the x. On a CPU MLX takes powers three times as fast as exponentials."""
    return mx.power(math.e, x) if on_cpu() else mx.exp(x)


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


def custom_gradient(vjp: Function) -> Callable[[Function], Function]:
    """Give a function of arrays this gradient: `mx.custom_function` that can be looked into.

    What the gradient computes from the arguments again is computed again when MLX compiles,
    too: otherwise it would find the two alike and keep the first for the second.

    Args:
        vjp: as `mx.custom_function` takes it.
    """

    def backward(primals: Any, cotangents: Any, results: Any) -> Any:
        alone = isinstance(primals, mx.array)
        given = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
        primals = mx.depends([primals] if alone else list(primals), given)
        return vjp(primals[0] if alone else primals, cotangents, results)

    def decorated(function: Function) -> Function:
        own = mx.custom_function(function)
        own.vjp(backward)

        @wraps(function)
        def call(*args: mx.array) -> Any:
            interceptor = _interceptor.get()
            return own(*args) if interceptor is None else interceptor(function, backward, args)

        return call

    return decorated


def checkpoint(function: Function) -> Function:
    """Keep only the arguments, and compute again what the gradient needs.

    Not before the gradient gets there: `mx.checkpoint` waits for the function's result alone,
    so that MLX computes again, and keeps, what its turn has not come for yet.

    Args:
        function: of trees to a tree. Leaves that are no arrays are handed on as they are.
    """

    def call(*args: Any) -> Any:
        result: Any = None

        def of_arrays(*arrays: mx.array) -> mx.array | tuple[mx.array, ...]:
            nonlocal result
            result = function(*_with_arrays(args, arrays))
            found = tuple(flat([result]).values())
            return found[0] if len(found) == 1 else found

        def vjp(primals: Any, cotangents: Any, _outputs: Any) -> Any:
            of = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
            given = [primals] if isinstance(primals, mx.array) else list(primals)
            return mx.vjp(of_arrays, given, of)[1]

        found = custom_gradient(vjp)(of_arrays)(*flat(args).values())
        return _with_arrays(result, [found] if isinstance(found, mx.array) else found)

    return call


def _with_arrays(tree: Any, arrays: Iterable[mx.array]) -> Any:
    """A tree with other arrays, in the order of `flat`."""
    each = iter(arrays)
    return tree_map(lambda leaf: next(each) if isinstance(leaf, mx.array) else leaf, tree)


def intercepted() -> bool:
    """Whether gradients are being looked into rather than computed."""
    return _interceptor.get() is not None


@contextmanager
def intercept_gradients(interceptor: Interceptor) -> Iterator[None]:
    """Hand calls of what `custom_gradient` and `checkpoint` made to someone else."""
    token = _interceptor.set(interceptor)
    try:
        yield
    finally:
        _interceptor.reset(token)
