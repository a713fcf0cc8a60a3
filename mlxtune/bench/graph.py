"""The graph of a computation, with the shape of everything in it, computed nowhere.

MLX is lazy: a training step called on arrays that nobody evaluates is a graph. `trace` reads
it out by `mx.export_function`. Functions with a gradient of their own (`custom_gradient`)
cannot be exported. In a trace each is called on stand-ins, its gradient too, and both
subgraphs are put where MLX's differentiation of a marker left a gap for them.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlxtune.arrays import intercept_gradients
from mlxtune.errors import NoPlan

Function = Callable[..., Any]

# What MLX calls the place of a function with a gradient of its own.
CUSTOM = "CustomTransforms"
# MLX lays its operations out breadth first, as long as no more than so many wait
# (MLX_BFS_MAX_WIDTH).
_WIDTH = 20


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions and type of an array.

    Attributes:
        dims: of each axis.
        dtype: of an element.
        size: elements.
        nbytes: bytes of all elements.
    """

    dims: tuple[int, ...]
    dtype: mx.Dtype
    size: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        size = math.prod(self.dims)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "nbytes", size * self.dtype.size)


@dataclass(frozen=True, slots=True)
class Operation:
    """A primitive of MLX, such as `Matmul`, with the names of what goes in and comes out."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Graph:
    """What a function computes.

    Attributes:
        operations: by the name of each array that comes out of one.
        inputs: names of the function's arguments, in their order.
        outputs: names of its results, in their order.
        shapes: of every array.
    """

    operations: dict[str, Operation]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: dict[str, Shape]

    @cached_property
    def order(self) -> tuple[Operation, ...]:
        """The operations in the order in which MLX computes them.

        From the results backwards, breadth first within limits, and that reversed
        (`eval_impl` in MLX's transforms.cpp).
        """
        uses: Counter[int] = Counter()
        seen: set[int] = set()
        root = Operation("Synchronizer", self.outputs, ())
        stack = [root]
        while stack:
            for name in stack.pop().inputs:
                if (before := self.operations.get(name)) is None:
                    continue
                uses[id(before)] += 1
                if id(before) not in seen:
                    seen.add(id(before))
                    stack.append(before)
        tape = [root]
        put_off: list[tuple[Operation, int]] = []
        at = 0
        while at < len(tape) or put_off:
            if at < len(tape):
                operation, first = tape[at], 0
                at += 1
            else:
                operation, first = put_off.pop()
            for index in range(first, len(operation.inputs)):
                if (before := self.operations.get(operation.inputs[index])) is None:
                    continue
                if len(tape) - at >= _WIDTH:
                    put_off.append((operation, index))
                    break
                uses[id(before)] -= 1
                if not uses[id(before)]:
                    tape.append(before)
        return tuple(tape[:0:-1])


@dataclass
class _Call:
    """One call of a function with a gradient of its own.

    All are numbers. Of stand-ins: `into` and `out_of` are what arguments and results are
    multiplied by, so that their gradients can be found; `arguments`, `results` and
    `cotangents` stand for the values themselves. Of additional results of the trace: what was
    given, the results as they were handed on, and what was computed from stand-ins.
    """

    into: list[int] = field(default_factory=list)
    out_of: list[int] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    cotangents: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    handed_on: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)


class _Tracer:
    """Computes functions with a gradient of their own from stand-ins, and marks their place.

    Args:
        given: the stand-ins, in the order in which they are asked for; None to make them.
    """

    def __init__(self, given: Sequence[mx.array] | None = None) -> None:
        self.given = given
        self.stand_ins: list[mx.array] = []
        self.extra: list[mx.array] = []
        self.calls: list[_Call] = []

    def __call__(self, function: Function, vjp: Function, args: tuple[mx.array, ...]) -> Any:
        call = _Call()
        self.calls.append(call)
        arguments = [self._stand_in(a, call.arguments) for a in args]
        value = function(*arguments)
        alone = isinstance(value, mx.array)
        results = _listed(value)
        given = [self._stand_in(r, call.results) for r in results]
        cotangents = [self._stand_in(r, call.cotangents) for r in results]
        gradients = vjp(
            arguments[0] if len(arguments) == 1 else arguments,
            cotangents[0] if alone else cotangents,
            given[0] if alone else given,
        )
        marked = self._marked(call, args, results)
        for arrays, numbers in (
            (args, call.given),
            (results, call.computed),
            (_listed(gradients), call.gradients),
            (marked, call.handed_on),
        ):
            for array in arrays:
                self._keep(array, numbers)
        return marked[0] if alone else tuple(marked)

    def _marked(
        self, call: _Call, args: Sequence[mx.array], results: Sequence[mx.array]
    ) -> list[mx.array]:
        """Stand-ins for results that are linear in all arguments, so that MLX knows a gradient."""
        rows = []
        for a in args:
            row = (a * self._stand_in(a, call.into)).reshape(1, -1)
            if mx.issubdtype(a.dtype, mx.floating):
                rows.append(row.astype(mx.float32))
        marked = []
        for result in results:
            zero = mx.array(0.0)
            total = sum((r @ mx.broadcast_to(zero, (r.size, result.size)) for r in rows), zero)
            shaped = mx.broadcast_to(total, (1, result.size)).reshape(result.shape)
            marked.append(shaped.astype(result.dtype) * self._stand_in(result, call.out_of))
        return marked

    def _stand_in(self, array: mx.array, numbers: list[int]) -> mx.array:
        number = len(self.stand_ins)
        numbers.append(number)
        new = mx.zeros(array.shape, array.dtype) if self.given is None else self.given[number]
        self.stand_ins.append(new)
        return new

    def _keep(self, array: mx.array, numbers: list[int]) -> None:
        numbers.append(len(self.extra))
        self.extra.append(array)


def trace(function: Callable[..., Sequence[mx.array]], *args: mx.array) -> Graph:
    """The graph of `function(*args)`, of whose arguments only the shapes are looked at.

    Raises:
        NoPlan: something in it cannot be exported by MLX.
    """
    with _without_collection():
        return _trace(function, args)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Where many thousand objects are made and kept, none of which is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _trace(function: Callable[..., Sequence[mx.array]], args: Sequence[mx.array]) -> Graph:
    first = _Tracer()
    with intercept_gradients(first):
        function(*args)
    stand_ins = [mx.zeros(a.shape, a.dtype) for a in first.stand_ins]
    # What it computed is not needed, and every array holds on to its graph.
    del first
    tracers: list[_Tracer] = []
    count = 0

    def everything(*arrays: mx.array) -> list[mx.array]:
        nonlocal count
        tracer = _Tracer(arrays[len(args) :])
        tracers.append(tracer)
        with intercept_gradients(tracer):
            results = list(function(*arrays[: len(args)]))
        count = len(results)
        return [*results, *tracer.extra]

    events: list[dict[str, Any]] = []
    try:
        mx.export_function(events.append, everything, *args, *stand_ins)
    except ValueError as error:
        raise NoPlan(
            f"MLX cannot write down a step of this architecture: {error}",
            remedy="no plan can be made of it; train it without",
        ) from None
    return _spliced(_read(events), tracers[-1].calls, len(args), count)


def _listed(value: Any) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else list(value)


def _read(events: list[dict[str, Any]]) -> Graph:
    shapes: dict[str, Shape] = {}
    alike: dict[Any, Shape] = {}
    operations: dict[str, Operation] = {}
    ends: dict[str, tuple[str, ...]] = {}

    def add(arrays: Sequence[tuple[str, Sequence[int], mx.Dtype]]) -> tuple[str, ...]:
        for name, dims, dtype in arrays:
            if name not in shapes:
                key = (tuple(dims), dtype)
                if key not in alike:
                    alike[key] = Shape(*key)
                shapes[name] = alike[key]
        return tuple(name for name, _, _ in arrays)

    for event in events:
        kind = event["type"]
        if kind in ("inputs", "outputs"):
            ends[kind] = add(event[kind])
        elif kind == "constants":
            shapes |= {name: Shape(tuple(a.shape), a.dtype) for name, a in event[kind]}
        elif kind == "primitive":
            read, made = add(event["inputs"]), add(event["outputs"])
            operation = Operation(event["name"], read, made, tuple(event["arguments"]))
            operations |= dict.fromkeys(made, operation)
    return Graph(operations, ends["inputs"], ends["outputs"], shapes)


def _spliced(whole: Graph, calls: list[_Call], argument_count: int, result_count: int) -> Graph:
    """What was computed from stand-ins, in the places that markers keep."""
    stand_in = whole.inputs[argument_count:]
    extra = whole.outputs[result_count:]
    gradient_of = _marked_gradients(whole, stand_in)
    operations, shapes = dict(whole.operations), dict(whole.shapes)
    same: dict[str, str] = {}
    for call in calls:
        for i, mark in enumerate(call.into):
            same[stand_in[call.arguments[i]]] = extra[call.given[i]]
            if (turned := gradient_of.get(stand_in[mark])) is not None:
                same[turned.outputs[0]] = extra[call.gradients[i]]
        for j, mark in enumerate(call.out_of):
            same[stand_in[call.results[j]]] = extra[call.handed_on[j]]
            turned = gradient_of.get(stand_in[mark])
            same[stand_in[call.cotangents[j]]] = turned.inputs[1] if turned else "nothing"
        node = Operation(
            CUSTOM,
            (*(stand_in[n] for n in call.arguments), *(extra[n] for n in call.computed)),
            tuple(extra[n] for n in call.handed_on),
        )
        operations |= dict.fromkeys(node.outputs, node)
    shapes["nothing"] = Shape((), mx.float32)

    def name_of(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    renamed: dict[int, Operation] = {}
    for operation in operations.values():
        if id(operation) not in renamed:
            inputs = tuple(map(name_of, operation.inputs))
            other = inputs != operation.inputs
            renamed[id(operation)] = replace(operation, inputs=inputs) if other else operation
    return Graph(
        {name: renamed[id(operation)] for name, operation in operations.items()},
        whole.inputs[:argument_count],
        tuple(map(name_of, whole.outputs[:result_count])),
        shapes,
    )


def _marked_gradients(whole: Graph, stand_ins: Sequence[str]) -> dict[str, Operation]:
    """The gradient's product with each marker.

    MLX differentiates `value * marker` into `marker * gradient`.
    """
    known = set(stand_ins)
    return {
        operation.inputs[0]: operation
        for operation in whole.operations.values()
        if operation.name == "Multiply" and operation.inputs[0] in known
    }
