"""The graph of a computation, with the shape of everything in it, computed nowhere.

MLX is lazy: a training step called on arrays that nobody evaluates is a graph. `trace` reads
it out by `mx.export_function`. Functions with a gradient of their own (`custom_gradient`)
cannot be exported. In a trace each is called on stand-ins, its gradient too, and both
subgraphs are put where MLX's differentiation of a marker left a gap for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlxtune.arrays import intercept_gradients
from mlxtune.errors import ModelError

Function = Callable[..., Any]

# What MLX calls the place of a function with a gradient of its own.
CUSTOM = "CustomTransforms"


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions and type of an array."""

    dims: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def size(self) -> int:
        """Elements."""
        size = 1
        for dim in self.dims:
            size *= dim
        return size

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.size


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
        ModelError: something in it cannot be exported by MLX.
    """
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
        raise ModelError(
            f"its step cannot be traced: {error}",
            remedy="no plan can be made of this architecture; train it without",
        ) from None
    return _spliced(_read(events), tracers[-1].calls, len(args), count)


def _listed(value: Any) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else list(value)


def _read(events: list[dict[str, Any]]) -> Graph:
    shapes: dict[str, Shape] = {}
    operations: dict[str, Operation] = {}
    ends: dict[str, tuple[str, ...]] = {}
    for event in events:
        kind = event["type"]
        if kind in ("inputs", "outputs"):
            shapes |= {name: Shape(tuple(dims), dtype) for name, dims, dtype in event[kind]}
            ends[kind] = tuple(name for name, _, _ in event[kind])
        elif kind == "constants":
            shapes |= {name: Shape(tuple(a.shape), a.dtype) for name, a in event[kind]}
        elif kind == "primitive":
            for name, dims, dtype in (*event["inputs"], *event["outputs"]):
                shapes[name] = Shape(tuple(dims), dtype)
            operation = Operation(
                event["name"],
                tuple(name for name, _, _ in event["inputs"]),
                tuple(name for name, _, _ in event["outputs"]),
                tuple(event["arguments"]),
            )
            operations |= dict.fromkeys(operation.outputs, operation)
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
            renamed[id(operation)] = replace(operation, inputs=inputs)
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
