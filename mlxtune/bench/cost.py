"""How long a graph takes: its operations counted, at the rates of a device.

A roofline (Williams et al. 2009): a product takes as long as its operations at the rate of
products of its size, as it was measured; where only the rate of large ones is known, at least
as long as its bytes at the memory's rate. All else moves bytes, or takes powers. Operations
run one after another, each with its overhead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from mlxtune.arrays import exp
from mlxtune.bench.graph import CUSTOM, Graph, Operation
from mlxtune.device import on_cpu

_FREE = {
    "Broadcast", "Copy", "Depends", "ExpandDims", "Flatten", "Slice", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten", "View", CUSTOM,
}  # fmt: skip
_PRODUCTS = {"Matmul", "AddMM", "GatherMM"}
_PACKED_PRODUCTS = {"QuantizedMatmul", "GatherQMM"}
_POWERS = {"Cos", "Erf", "Exp", "Log", "LogSumExp", "Power", "Sigmoid", "Sin", "Softmax", "Tanh"}


# Seconds that go into one rate, and sides of the products that are measured.
_MOMENT = 0.25
_SIDES = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        products: (multiply-adds of one matrix product, FLOP/s), from small to large.
        packed: FLOP/s of products with packed weights.
        bytes: moved by operations on each element.
        powers: elements of exponentials and the like.
        overhead: seconds that an operation takes however small it is.
        efficiency: what a training step reaches of all this: each rate was measured by itself,
            with its data at hand.
    """

    products: tuple[tuple[float, float], ...]
    packed: float
    bytes: float
    powers: float
    overhead: float
    efficiency: float = 1.0

    def product_rate(self, size: float) -> float:
        """FLOP/s of a matrix product of so many multiply-adds, between those known."""
        below = [point for point in self.products if point[0] <= size]
        above = [point for point in self.products if point[0] > size]
        if not below or not above:
            return (below or above)[-1 if below else 0][1]
        (x0, y0), (x1, y1) = below[-1], above[0]
        share = math.log(size / x0) / math.log(x1 / x0)
        return float(y0 * (y1 / y0) ** share)


@dataclass(frozen=True)
class Cost:
    """What a graph takes.

    Attributes:
        flops: of its products.
        bytes: read and written by all else.
        seconds: of all together.
    """

    flops: float
    bytes: float
    seconds: float


def cost_of(graph: Graph, rates: Rates) -> Cost:
    """What computing the graph takes at these rates."""
    total = _sum(_cost(graph, operation, rates) for operation in graph.order)
    return replace(total, seconds=total.seconds / rates.efficiency)


def launches_of(graph: Graph) -> int:
    """How many kernels a GPU is given for the graph, before MLX fuses any by compiling.

    Views launch none; what is concatenated is copied, one array after another.
    """
    computing = (op for op in graph.order if op.name not in _FREE and op.name != "Reshape")
    return sum(len(op.inputs) if op.name == "Concatenate" else 1 for op in computing)


def flops_of(graph: Graph) -> float:
    """Floating-point operations of the graph's products, two for a multiply-add."""
    return sum(_flops(graph, operation) for operation in graph.order)


def _cost(graph: Graph, operation: Operation, rates: Rates) -> Cost:
    if operation.name in _FREE:
        return Cost(0, 0, 0)
    moved = sum(graph.shapes[name].nbytes for name in operation.outputs)
    moved += sum(graph.shapes[name].nbytes for name in operation.inputs)
    seconds = moved / rates.bytes
    flops = _flops(graph, operation)
    if flops:
        rows, columns = graph.shapes[operation.outputs[0]].dims[-2:]
        width = graph.shapes[operation.inputs[0]].dims[-1]
        packed = operation.name in _PACKED_PRODUCTS
        rate = rates.packed if packed else rates.product_rate(rows * columns * width)
        # Rates of several sizes have in them what a product moves; that of large ones has not.
        seconds = max(flops / rate, 0 if len(rates.products) > 1 else seconds)
    elif operation.name in _POWERS:
        size = sum(graph.shapes[name].size for name in operation.outputs)
        seconds = max(seconds, size / rates.powers)
    return Cost(flops, 0 if flops else moved, seconds + rates.overhead)


def _flops(graph: Graph, operation: Operation) -> float:
    if operation.name not in _PRODUCTS and operation.name not in _PACKED_PRODUCTS:
        return 0.0
    width = graph.shapes[operation.inputs[0]].dims[-1]
    return 2.0 * graph.shapes[operation.outputs[0]].size * width


def _sum(costs: Iterable[Cost]) -> Cost:
    flops = moved = seconds = 0.0
    for cost in costs:
        flops, moved, seconds = flops + cost.flops, moved + cost.bytes, seconds + cost.seconds
    return Cost(flops, moved, seconds)


def training_dtype() -> mx.Dtype:
    """What training computes in on the device at hand, unless a recipe says otherwise."""
    return mx.float32 if on_cpu() else mx.bfloat16


def measure_rates() -> Rates:
    """The rates of the device at hand, in about two seconds; `efficiency` is left at 1."""
    dtype = training_dtype()
    products = tuple(_product_rates(dtype))
    big = mx.ones((1 << 21,), dtype)
    x, w = mx.ones((64, 1024), dtype), mx.random.normal((1024, 1024)).astype(dtype)
    packed = mx.quantize(w, group_size=64, bits=4)
    mx.eval(big, x, packed)
    packed_seconds = seconds_of(
        lambda: mx.quantized_matmul(x, *packed, transpose=True, group_size=64, bits=4)
    )
    chain = 200
    return Rates(
        products=products,
        packed=2 * 64 * 1024 * 1024 / packed_seconds,
        bytes=3 * big.nbytes / seconds_of(lambda: big + big),
        powers=big.size / seconds_of(lambda: exp(big)),
        overhead=seconds_of(lambda: _chain(chain)) / chain,
    )


def _product_rates(dtype: mx.Dtype) -> Iterator[tuple[float, float]]:
    """(multiply-adds, FLOP/s) of products of growing size, while each takes a moment."""
    for n in _SIDES:
        yield float(n**3), (rate := _product_rate(n, dtype))
        if 2 * (2 * n) ** 3 / rate > _MOMENT:  # on reference BLAS the largest takes six seconds
            return


def _product_rate(n: int, dtype: mx.Dtype) -> float:
    # Small products come many at a time, as attention's do.
    count = max(1, (256 // n) ** 2)
    a, b = mx.ones((count, n, n), dtype), mx.ones((count, n, n), dtype)
    mx.eval(a, b)
    return 2 * count * n**3 / seconds_of(lambda: a @ b)


def _chain(length: int) -> mx.array:
    x = mx.array(0.0)
    for _ in range(length):
        x = x + 1
    return x


def seconds_of(function: Callable[[], mx.array]) -> float:
    """The best of the times in a quarter of a second."""
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < _MOMENT or best == math.inf:
        start = time.perf_counter()
        mx.eval(function())
        best = min(best, time.perf_counter() - start)
    return best
