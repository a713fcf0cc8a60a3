"""Passes computed side by side on a CPU.

MLX runs all element-wise work of one CPU stream on one core, and that is half of a
training step there. With two passes on two streams, each with its share of the BLAS
threads, both cores are busy all the time. A GPU is full with one pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx

from mlxtune.device import on_cpu, set_blas_threads


def lanes_of_device() -> int:
    """As many lanes as pay on this device: two on a CPU with two cores or more."""
    return 2 if on_cpu() and _cores() > 1 and set_blas_threads(_cores()) else 1


class Lanes:
    """Computes up to `count` things at once, each on a stream of its own.

    Args:
        count: 1 for one after another.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        if count > 1:
            self._streams = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(count)]
            self._threads = ThreadPoolExecutor(count)

    def __call__(self, computations: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results, evaluated, of at most `count` computations."""
        if self.count == 1 or len(computations) == 1:
            results = [compute() for compute in computations]
            mx.eval(results)
            return results
        results = []
        for stream, compute in zip(self._streams, computations, strict=False):
            with mx.stream(stream):
                results.append(compute())
        # All graphs are made here, one after another, and each is evaluated by a thread of
        # its own. What they share has to be there before: weights are, random keys are not.
        mx.eval(mx.random.state)
        set_blas_threads(max(1, _cores() // len(results)))
        try:
            list(self._threads.map(mx.eval, results))
        finally:
            set_blas_threads(_cores())
        return results


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
