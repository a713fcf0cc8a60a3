"""Quantize whole matrices to the block types of GGUF: on the GPU, or on all cores.

`kquants` and `plain` have the types. NumPy's calls are short, so that threads get in each
other's way: two are 1.4 times as fast as one, two processes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache

import mlx.core as mx
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ExportError
from mlxtune.gguf.arithmetic import MLX, NUMPY, Arithmetic
from mlxtune.gguf.kquants import SEARCHED, WEIGHED_PLAIN, Bytes, Floats, Groups, grouped
from mlxtune.gguf.plain import PLAIN
from mlxtune.processes import GUARD, Processes, cores, started

# Weights that one thread works on at a time: all buffers of a search fit a core's cache.
_CHUNK = 1 << 16
# Several threads lose more by waiting for each other after short calls than by the cache.
_THREADS_CHUNK = 4 * _CHUNK
# A GPU wants more at a time.
_GPU_CHUNK = 1 << 22
# What another process is given at a time.
_TASK = 1 << 20
# Processes take a second to start, and some 80 MB each.
_WORTH_PROCESSES = 1 << 25
_MOST_PROCESSES = 8


def needs_search(type: Type, weighed: bool) -> bool:
    """Whether the scales of a type are searched for, which takes ten times as long."""
    return type in SEARCHED or (weighed and type in WEIGHED_PLAIN)


@contextmanager
def quantizers(searched: int) -> Iterator[Processes | None]:
    """Processes for `quantize`, until the end of the block.

    Args:
        searched: how many weights there are whose scales are searched for. There are no
            processes for few, and none where a GPU does the work.
    """
    count = min(cores(), _MOST_PROCESSES)
    if searched < _WORTH_PROCESSES or count == 1 or _gpu_serves():
        yield None
        return
    with started(count) as others:
        yield others


def quantize(
    values: Floats,
    type: Type,
    importance: Floats | None = None,
    *,
    threads: int | None = None,
    others: Processes | None = None,
) -> Bytes:
    """Quantize a matrix.

    Args:
        values: float32 (rows, width), width a multiple of the type's block.
        type: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K.
        importance: float32 (width,), or None. Q8_0 makes no use of it.
        threads: how many to work with; as many as there are cores, if None.
        others: processes that search in place of threads.

    Returns:
        uint8 (rows, bytes of a row).

    Raises:
        ExportError: a weight or an importance is not finite, or weights are too large
            for the type.
    """
    values = np.ascontiguousarray(values, np.float32)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if not np.isfinite(importance).all():
            raise ExportError("the importance matrix has a value that is not finite")
    if others is not None and needs_search(type, importance is not None):
        return _by_others(values, type, importance, others)
    xp = _arithmetic(type)
    # A GPU is busy with one chunk at a time, and MLX wants one thread.
    return _quantize(values, type, importance, xp, (threads or cores()) if xp is NUMPY else 1)


def _by_others(values: Floats, type: Type, importance: Floats | None, others: Processes) -> Bytes:
    rows, width = values.shape
    block, size = GGML_QUANT_SIZES[type]
    result = np.empty((rows, width // block * size), np.uint8)
    step = max(1, _TASK // width)
    starts = range(0, rows, step)
    tasks = ((values[start : start + step], type, importance) for start in starts)
    try:
        for start, packed in zip(starts, others.map(_alone, tasks), strict=True):
            result[start : start + step] = packed
    except BrokenProcessPool:
        raise ExportError("a process that was quantizing has ended unasked", remedy=GUARD) from None
    return result


def _alone(values: Floats, type: Type, importance: Floats | None) -> Bytes:
    """In this process, one of several: on one core."""
    return _quantize(values, type, importance, NUMPY, threads=1)


def _quantize(
    values: Floats, type: Type, importance: Floats | None, xp: Arithmetic, threads: int
) -> Bytes:
    rows, width = values.shape
    block, size = GGML_QUANT_SIZES[type]
    result = np.empty((rows * width // block, size), np.uint8)
    work = _worker(values, type, importance, result, xp)
    small = _CHUNK if threads == 1 else _THREADS_CHUNK
    chunk = (small if xp is NUMPY else _GPU_CHUNK) // block
    starts = range(0, len(result), chunk)
    if threads == 1 or len(starts) == 1:
        for start in starts:
            work(slice(start, start + chunk))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda start: work(slice(start, start + chunk)), starts))
    return result.reshape(rows, -1)


def dequantize(packed: Bytes, type: Type) -> Floats:
    """The float32 (rows, width) that uint8 (rows, bytes) stand for."""
    return np.asarray(quants.dequantize(packed, type), np.float32)


def _worker(
    values: Floats, type: Type, importance: Floats | None, result: Bytes, xp: Arithmetic
) -> Callable[[slice], None]:
    """A function that quantizes some of the blocks into `result`."""
    block, _ = GGML_QUANT_SIZES[type]
    blocks = values.reshape(-1, block)
    per_row = values.shape[1] // block
    if type in PLAIN and (importance is None or type not in WEIGHED_PLAIN):

        def plain(part: slice) -> None:
            with np.errstate(all="ignore"):
                result[part] = PLAIN[type](grouped(_finite(blocks[part]), block))

        return plain

    form = (SEARCHED | WEIGHED_PLAIN)[type]
    of_rows = _mean_squares(values) if importance is not None and block == 32 else None

    def searched(part: slice) -> None:
        with np.errstate(all="ignore"):
            chunk = _finite(blocks[part])
            weights = variance = None
            if importance is not None:
                index = np.arange(part.start, part.start + len(chunk))
                weights = grouped(importance.reshape(-1, block)[index % per_row], form.group)
                if of_rows is None:
                    variance = _mean_squares(chunk, form.variance)
                else:
                    variance = of_rows[index // per_row]
                variance = np.tile(variance, block // form.group)
            x = grouped(chunk, form.group)
            result[part] = form.function(Groups(x, len(chunk), weights, variance, xp))

    return searched


def _mean_squares(rows: Floats, factor: float = 1.0) -> Floats:
    """`factor` times those of each row, summed in the order of its elements."""
    total = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), 64):
        columns = np.ascontiguousarray(rows[start : start + 64].T)
        total[start : start + 64] = NUMPY.sum_rows(columns * columns)
    return np.float32(factor) * total / np.float32(rows.shape[1])


def _finite(chunk: Floats) -> Floats:
    if not (np.isfinite(chunk.max()) and np.isfinite(chunk.min())):
        raise ExportError("a weight is not a finite number")
    return chunk


def _arithmetic(type: Type) -> Arithmetic:
    """What to search with."""
    return MLX if type in SEARCHED and _gpu_serves() else NUMPY


def _gpu_serves() -> bool:
    """Whether there is a GPU that computes as a CPU does."""
    return mx.default_device() == mx.gpu and gives_the_same(MLX)


# A sample's blocks of weights as they mostly are, and those of all sizes there are.
_USUAL, _TINY = 1024, 512


@cache
def gives_the_same(xp: Arithmetic) -> bool:
    """Whether another arithmetic gives NumPy's bytes for a sample of blocks of each type.

    A GPU may fuse products with sums or divide less exactly. That Apple's flush tiny numbers
    to zero is no matter: groups in which there may be any are left to NumPy. Types of few bits
    seldom show a difference, so all are tried together, with an importance too.
    """
    rng = np.random.default_rng(0)
    values = rng.standard_normal((_USUAL + _TINY, 256), np.float32)
    values[_USUAL:] *= (10.0 ** rng.uniform(-46, 2, (_TINY, 1))).astype(np.float32)
    importance = (rng.random(256) ** 4).astype(np.float32)
    for type in SEARCHED:
        for weights in (None, importance):
            ours, theirs = (_of_sample(values, type, weights, library) for library in (NUMPY, xp))
            if not np.array_equal(ours, theirs):
                return False
    return True


def _of_sample(values: Floats, type: Type, weights: Floats | None, xp: Arithmetic) -> Bytes:
    result = np.empty((len(values), GGML_QUANT_SIZES[type][1]), np.uint8)
    _worker(values, type, weights, result, xp)(slice(0, len(values)))
    return result
