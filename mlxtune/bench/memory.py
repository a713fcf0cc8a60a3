"""How much memory a graph takes while MLX computes it: which buffers exist at the same time.

Nothing is computed: the operations are gone through in the order in which MLX takes them,
and only the account of buffers is kept. What shares a buffer, what is written over and when
buffers are freed follows MLX's CPU backend; on a GPU it is an estimate.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlxtune.bench.graph import CUSTOM, Graph, Operation, Shape
from mlxtune.device import on_cpu

# MLX hands work on ahead of time, and waits once more tasks than this are not done yet
# (MAX_ACTIVE_TASKS); what an operation reads is let go of when it has been computed. To the thread
# of a CPU a task is ten dispatches. To a GPU it is a command buffer, which is full with more
# kernels than this, or with more elements of the arrays that they read and write, each counted
# once (`CommandEncoder::needs_commit`; MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER of most
# Macs, the latter in millions of elements whatever its name says).
_TASKS = 10
_DISPATCHES = 10
_BUFFER_KERNELS, _BUFFER_ELEMENTS = 40, 40 << 20

_RESHAPES = {"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"}
_VIEWS = _RESHAPES | {"Broadcast", "Copy", "Slice", "StopGradient", "Transpose", "View"}
_ALIASES = {CUSTOM, "Depends"}
_COMPUTE_NOTHING = _VIEWS | _ALIASES
_ELEMENTWISE = {
    "Abs", "Add", "AddMM", "AsType", "BitwiseBinary", "Cos", "Divide", "Equal", "Erf", "Exp",
    "Floor", "Greater", "GreaterEqual", "Less", "LessEqual", "Log", "LogSumExp", "LogicalAnd",
    "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual",
    "Power", "Remainder", "Round", "Scatter", "ScatterAxis", "Select", "Sigmoid", "Sign",
    "Sin", "SliceUpdate", "Softmax", "Sqrt", "Square", "Subtract", "Tanh",
}  # fmt: skip

Strides = tuple[int, ...]


def peak_memory(graph: Graph, limit: float = math.inf) -> int:
    """Most bytes that exist at one time while the graph is computed, arguments included.

    Arguments are let go of, or written over, once nothing needs them and they are no
    results: as of a step that updates what it was given.

    Args:
        graph: of a step.
        limit: bytes; over it MLX hands on nothing more before something has been computed
            (`mx.set_memory_limit`). With 0 it is the least that the graph can be computed in.
    """
    return _Account(graph, limit)()


@dataclass(slots=True)
class _Array:
    """Where an array lies: in which buffer, with which strides, in elements."""

    buffer: int
    shape: Shape
    strides: Strides

    @property
    def elements(self) -> int:
        """How many there are in memory."""
        return math.prod(
            dim for dim, stride in zip(self.shape.dims, self.strides, strict=True) if stride
        )

    @property
    def in_order(self) -> bool:
        """Whether it lies as its axes go; how far apart a single row is does not matter."""
        return _in_order(self.strides, self.shape.dims)

    @property
    def dense(self) -> bool:
        """Whether it fills a stretch of memory, in whatever order of axes."""
        return _dense(self.strides, self.shape.dims)

    @property
    def multiplies(self) -> bool:
        """Whether BLAS takes its matrices as they lie."""
        rows, columns = self.shape.dims[-2:]
        down, right = self.strides[-2:]
        straight = right == 1 and (down == columns or rows == 1)
        return straight or (down == 1 and (right == rows or columns == 1))


class _Heap:
    """Buffers, who refers to them, and how large they all were together at most."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.references: list[int] = []
        self.active = 0
        self.peak = 0

    def allocate(self, size: int) -> int:
        """A new buffer that nobody refers to yet."""
        self.sizes.append(size)
        self.references.append(0)
        self.active += size
        self.peak = max(self.peak, self.active)
        return len(self.sizes) - 1

    def refer(self, buffer: int) -> None:
        """One more reference."""
        self.references[buffer] += 1

    def drop(self, buffer: int) -> None:
        """One reference less; the last frees the buffer."""
        self.references[buffer] -= 1
        if not self.references[buffer]:
            self.active -= self.sizes[buffer]


class _CPUClock:
    """Tasks that were handed to the thread of a CPU.

    Attributes:
        ahead: how many there are at most that are not done.
    """

    ahead = _TASKS

    def __init__(self) -> None:
        self._dispatches = 0

    def begin(self, computes: bool) -> float:
        """The time of the next operation: how many tasks came before its own."""
        # One dispatch lets go of what was read, and one computes.
        self._dispatches += 2 if computes else 1
        return self._dispatches / _DISPATCHES

    def end(self, kernels: int, bound: dict[int, int]) -> None:
        """What the operation was: how often it computes, and elements of the buffers it uses."""


class _GPUClock:
    """Command buffers that were handed to a GPU."""

    ahead = _TASKS + 1  # the one that is being filled too

    def __init__(self) -> None:
        self._buffers = self._kernels = self._elements = 0
        self._bound: set[int] = set()

    def begin(self, _computes: bool) -> float:
        return self._buffers

    def end(self, kernels: int, bound: dict[int, int]) -> None:
        self._kernels += kernels
        self._elements += sum(n for buffer, n in bound.items() if buffer not in self._bound)
        self._bound |= bound.keys()
        # By whole millions, as there: a buffer takes up to a million more.
        full = _BUFFER_ELEMENTS + (1 << 20) - 1
        if self._kernels > _BUFFER_KERNELS or self._elements > full:
            self._buffers += 1
            self._kernels = self._elements = 0
            self._bound.clear()


class _Account:
    """Goes through the operations of a graph and keeps account of buffers."""

    def __init__(self, graph: Graph, limit: float) -> None:
        self._graph = graph
        self._limit = limit
        self._clock = _CPUClock() if on_cpu() else _GPUClock()
        self._order = graph.order
        self._heap = _Heap()
        self._arrays: dict[str, _Array] = {}
        # How often each array is still needed, and buffers that are let go of at a time.
        self._uses = Counter(name for operation in self._order for name in operation.inputs)
        self._uses.update(graph.outputs)
        self._leaving: deque[tuple[float, list[int]]] = deque()
        given = {name for name in self._uses if name not in graph.operations}
        for name in given | set(graph.inputs):
            self._place(name, self._heap.allocate(graph.shapes[name].nbytes))

    def __call__(self) -> int:
        for operation in self._order:
            computes = operation.name not in _COMPUTE_NOTHING
            time = self._clock.begin(computes)
            while self._leaving and (
                self._leaving[0][0] <= time or self._heap.active > self._limit
            ):
                for buffer in self._leaving.popleft()[1]:
                    self._heap.drop(buffer)
            read = self._compute(operation)
            if computes:
                names = (*operation.inputs, *operation.outputs)
                bound = {self._arrays[name].buffer: self._arrays[name].elements for name in names}
                self._clock.end(1 + len(read), bound)
            own = {self._arrays[name].buffer for name in operation.outputs}
            read += [self._arrays[name].buffer for name in operation.inputs]
            read = [buffer for buffer in read if buffer not in own]
            for buffer in read:
                self._heap.refer(buffer)
            self._leaving.append((time + self._clock.ahead, read))
            for name in operation.inputs:
                self._uses[name] -= 1
                if not self._uses[name]:
                    self._heap.drop(self._arrays[name].buffer)
            for name in operation.outputs:
                if not self._uses[name]:
                    self._heap.drop(self._arrays[name].buffer)
        return self._heap.peak

    def _place(self, name: str, buffer: int, strides: Strides | None = None) -> None:
        shape = self._graph.shapes[name]
        self._heap.refer(buffer)
        self._arrays[name] = _Array(buffer, shape, strides or _row_major(shape.dims))

    def _compute(self, operation: Operation) -> list[int]:
        """Give the results their place; returns buffers that the operation needs for itself."""
        kind, inputs = operation.name, [self._arrays[name] for name in operation.inputs]
        if kind in _ALIASES or kind == "Split":
            # The last inputs of a custom function are its results.
            sources = inputs[-len(operation.outputs) :] if kind == CUSTOM else inputs
            sources *= len(operation.outputs) if kind == "Split" else 1
            for name, source in zip(operation.outputs, sources, strict=False):
                self._place(name, source.buffer, source.strides)
            return []
        first = operation.outputs[0]
        if kind in _VIEWS:
            strides = _view(kind, inputs[0], self._graph.shapes[first].dims, operation.arguments)
            if strides is not None:
                self._place(first, inputs[0].buffer, strides)
                return []
        copies = inputs[:2] if kind in ("Matmul", "AddMM") else []
        sizes = [source.shape.nbytes for source in copies if not source.multiplies]
        temporary = [self._heap.allocate(size) for size in sizes]
        if kind in _ELEMENTWISE and (donor := self._donor(operation, inputs)) is not None:
            self._place(first, donor.buffer, donor.strides)
            return temporary
        for name in operation.outputs:
            shape = self._graph.shapes[name]
            alike = [a.strides for a in inputs if a.shape.dims == shape.dims and a.dense]
            strides = alike[0] if kind in _ELEMENTWISE and alike else None
            self._place(name, self._heap.allocate(shape.nbytes), strides)
        return temporary

    def _donor(self, operation: Operation, inputs: list[_Array]) -> _Array | None:
        """An input that nobody else needs, in whose buffer the result has room."""
        shape = self._graph.shapes[operation.outputs[0]]
        # Where inputs lie differently, only one that lies in order is written over.
        mixed = not all(a.dense for a in inputs)
        for name, source in zip(operation.inputs, inputs, strict=True):
            alone = self._uses[name] == 1 and self._heap.references[source.buffer] == 1
            fits = (
                source.shape.dims == shape.dims
                and self._heap.sizes[source.buffer] == source.shape.nbytes == shape.nbytes
            )
            if alone and fits and (source.in_order if mixed else source.dense):
                return source
        return None


# A step has some ten thousand arrays, and a few dozen kinds of them.


@lru_cache(maxsize=4096)
def _in_order(strides: Strides, dims: tuple[int, ...]) -> bool:
    axes = zip(strides, _row_major(dims), dims, strict=True)
    return all(stride == plain for stride, plain, dim in axes if dim > 1)


@lru_cache(maxsize=4096)
def _dense(strides: Strides, dims: tuple[int, ...]) -> bool:
    axes, expected = zip(strides, dims, strict=True), 1
    for stride, dim in sorted(axis for axis in axes if axis[1] > 1):
        if stride != expected:
            return False
        expected *= dim
    return True


@lru_cache(maxsize=4096)
def _row_major(dims: tuple[int, ...]) -> Strides:
    strides, step = [], 1
    for dim in reversed(dims):
        strides.append(step)
        step *= dim
    return tuple(reversed(strides))


def _view(
    kind: str, source: _Array, dims: tuple[int, ...], arguments: tuple[Any, ...]
) -> Strides | None:
    """Strides of a view of the source; None where it has to be copied."""
    if kind in ("Copy", "StopGradient"):
        return source.strides
    if kind == "Transpose":
        return tuple(source.strides[axis] for axis in arguments[0])
    if kind == "Broadcast":
        missing = len(dims) - len(source.shape.dims)
        strides = (0,) * missing + source.strides
        have = (1,) * missing + source.shape.dims
        pairs = zip(strides, have, dims, strict=True)
        return tuple(0 if had == 1 != dim else stride for stride, had, dim in pairs)
    if kind == "Slice":
        return tuple(s * step for s, step in zip(source.strides, arguments[2], strict=True))
    if kind == "View":
        return _row_major(dims) if source.in_order else None
    return _reshaped(source, dims)


def _reshaped(source: _Array, dims: tuple[int, ...]) -> Strides | None:
    """Strides of the same elements under other dimensions, where there are such."""
    if not source.shape.size:  # as the keys that rows full of a prefix have of their own
        return _row_major(dims)
    merged: list[tuple[int, int]] = []  # axes that lie one behind another, as one
    for dim, stride in zip(source.shape.dims, source.strides, strict=True):
        if merged and merged[-1][1] == dim * stride:
            merged[-1] = (merged[-1][0] * dim, stride)
        elif dim != 1:
            merged.append((dim, stride))
    strides: list[int] = []
    left, step = 1, 1
    for dim in dims:
        if dim == 1:
            strides.append(1)
            continue
        if left == 1:
            if not merged:
                return None
            left, step = merged.pop(0)
        if left % dim:
            return None
        left //= dim
        strides.append(left * step)
    return tuple(strides)
