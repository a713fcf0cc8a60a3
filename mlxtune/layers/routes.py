"""Choose by measurement whether a packed weight is expanded to be multiplied.

Which is faster depends on the device, on the shape of the weight and how it is packed, on
the number of rows and on the direction. The two round differently, so one run has to go
one way: routes are chosen before the first step, kept with the run and taken from there
when it is resumed. What has been measured on an idle device is remembered in the cache
folder.

A GPU has finished such a product before its launch has been paid for, and runs at a lower
clock until it has been busy for a while. So there many products are timed together, after
others that warm it up, and expanding has to win clearly.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.device import device_name, on_cpu
from mlxtune.errors import StorageError
from mlxtune.files import cache_folder, write_json
from mlxtune.layers.quantized import PackedLayer, QuantizedLinear, Route
from mlxtune.layers.switch import QuantizedSwitchLinear

CACHE = "quantized_matmul.json"

Product = Callable[[], mx.array]
# Class of shapes to the rows from which it expands: forward, backward.
Routes = dict[str, tuple[int | None, int | None]]

# Rows that are tried, in this order, until expanding wins. A CPU multiplies packed weights
# so slowly that it does soon; more rows than that would take long to measure.
_CPU_ROWS = (1, 4, 16, 64, 256)
_GPU_ROWS = (16, 64, 256, 1024, 4096)
# Weights of the part that is measured. Both ways cost in proportion to the outputs; a GPU
# needs enough of them to be busy.
_CPU_WEIGHTS, _GPU_WEIGHTS = 1 << 18, 1 << 22
_EXPERTS = 4
# Seconds that the products take which a GPU is given at once, unless their results take more
# bytes than this; and the share of the time that expanding may take to be chosen there.
_GPU_MOMENT = 0.01
_GPU_RESULTS = 256 << 20
_GPU_WIN = 0.9
# On a machine that is busy with other things, shapes not measured by then go by `Route.prior`.
_AT_MOST = 2.0


def fix_routes(model: nn.Module, expand: bool) -> None:
    """Make every packed layer expand for every product, or for none that can do without."""
    for layer in _packed(model):
        layer.route = Route(0, 0) if expand else Route(None, None)


def choose_routes(model: nn.Module, dtype: mx.Dtype, recorded: Any = None) -> Routes:
    """Give every packed layer of a model the faster route for each direction.

    Evaluates arrays, so it must not be called in a function that MLX transforms.

    Args:
        model: its packed layers are ours.
        dtype: of the activations.
        recorded: what this function returned for a run that is to be continued.
            Nothing in it is measured again.

    Returns:
        The routes taken, by class of shapes; also those of `recorded`, unchanged.
    """
    file, device = cache_folder() / CACHE, device_key()
    cached = _read(file)
    known = _valid(cached.get(device)) | _valid(recorded)
    routes: Routes = {}
    measured: Routes = {}
    begun = time.perf_counter()
    for layer in _packed(model):
        name = _class_of(layer, dtype)
        if name not in routes:
            if name in known:
                routes[name] = known[name]
            elif time.perf_counter() - begun < _AT_MOST:
                routes[name] = measured[name] = measure(layer, dtype)
            else:  # kept with the run, and measured another time
                prior = Route.prior()
                routes[name] = prior.forward, prior.backward
        layer.route = Route(*routes[name])
    if measured and not busy():
        _remember(file, device, measured)
    return routes


def measure(layer: PackedLayer, dtype: mx.Dtype) -> tuple[int | None, int | None]:
    """The rows from which a layer like this one expands faster, forward and backward.

    Rows of experts are counted for each expert.
    """
    sample = _sample(layer)
    return _crossing(sample, dtype, forward=True), _crossing(sample, dtype, forward=False)


def _crossing(sample: PackedLayer, dtype: mx.Dtype, *, forward: bool) -> int | None:
    width = sample.shape[-1 if forward else -2]

    def wins(rows: int) -> bool:
        packed, expanded = (
            _product(sample, rows, width, dtype, forward=forward, expand=expand)
            for expand in (False, True)
        )
        return _wins(expanded, packed)

    if on_cpu():
        return next((rows for rows in _CPU_ROWS if wins(rows)), None)
    # Where it does not pay for most rows it pays for none, which is soon known.
    if not wins(_GPU_ROWS[-1]):
        return None
    return next((rows for rows in _GPU_ROWS[:-1] if wins(rows)), _GPU_ROWS[-1])


def _wins(expanded: Product, packed: Product) -> bool:
    """Whether the first is so much faster that it is to be taken."""
    if on_cpu():
        times = _seconds((expanded, packed), 1)
        return times[0] < times[1]
    times = _seconds((expanded, packed), _warmed_up(packed))
    return times[0] < _GPU_WIN * times[1]


def _warmed_up(product: Product) -> int:
    """Keep a GPU busy with a product, and return how many of them fill a moment."""
    most = max(1, _GPU_RESULTS // max(1, product().nbytes))
    count = 1
    while (taken := _time(product, count)) < _GPU_MOMENT and count < most:
        enough = math.ceil(count * _GPU_MOMENT / taken) if taken > 0 else most
        count = min(most, max(2 * count, enough))
    return count


def _product(
    sample: PackedLayer, rows: int, width: int, dtype: mx.Dtype, *, forward: bool, expand: bool
) -> Product:
    if isinstance(sample, QuantizedSwitchLinear):
        experts = sample.num_experts
        indices = mx.repeat(mx.arange(experts), rows)
        x = mx.ones((experts * rows, 1, width), dtype)
        mx.eval(x, indices)
        return lambda: sample.product(x, indices, ordered=True, forward=forward, expand=expand)
    assert isinstance(sample, QuantizedLinear)
    x = mx.ones((rows, width), dtype)
    mx.eval(x)
    return lambda: sample.product(x, forward=forward, expand=expand)


def _seconds(products: Sequence[Product], count: int) -> list[float]:
    """The best time of `count` calls of each product, in turns; the first turn warms up."""
    _, *turns = ([_time(product, count) for product in products] for _ in range(4))
    return [min(times) for times in zip(*turns, strict=True)]


def _time(product: Product, count: int) -> float:
    """How long `count` of them take together, in seconds."""
    products = [product() for _ in range(count)]  # which takes Python longer than a GPU
    begun = time.perf_counter()
    mx.eval(products)
    return time.perf_counter() - begun


def _sample(layer: PackedLayer) -> PackedLayer:
    """A layer of the same kind with fewer outputs and experts."""
    *outer, outputs, inputs = layer.shape
    weights = _CPU_WEIGHTS if on_cpu() else _GPU_WEIGHTS
    experts = min(_EXPERTS, *outer) if outer else 1
    some = max(1, min(outputs, weights // (inputs * experts)))
    index = (slice(experts), slice(some)) if outer else (slice(some),)
    arrays = {name: mx.contiguous(array[index]) for name, array in layer.arrays.items()}
    mx.eval(arrays)
    kind = QuantizedSwitchLinear if outer else QuantizedLinear
    return kind(layer.packing, arrays, dtype=layer.dtype)


def _packed(model: nn.Module) -> list[PackedLayer]:
    """Layers that have a choice."""
    layers = (m for m in model.modules() if isinstance(m, PackedLayer))
    return [layer for layer in layers if layer.packing.has_product]


def _class_of(layer: PackedLayer, dtype: mx.Dtype) -> str:
    shape = "x".join(map(str, layer.shape))
    return f"{layer.packing} {shape} {str(dtype).rpartition('.')[2]}"


def device_key() -> str:
    """What figures hold for: the device, MLX's version and, on a CPU, its BLAS."""
    key = f"{device_name()}, mlx {version('mlx')}"
    if on_cpu():
        blas = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split()]
        key += f", preloaded: {' '.join(blas) or 'nothing'}"
    return key


def _read(file: Path) -> dict[str, Any]:
    """The cache; nothing, if it is not there or is no longer what was written."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _valid(entries: Any) -> Routes:
    """Entries of the form of `Routes`; others are left out."""

    def right(pair: Any) -> bool:
        return (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(n is None or (type(n) is int and n > 0) for n in pair)
        )

    found = entries.items() if isinstance(entries, dict) else ()
    return {name: (pair[0], pair[1]) for name, pair in found if right(pair)}


def busy() -> bool:
    """Whether other programs want the processors, so that figures are not to be kept.

    A product on several threads then waits for the one that has none (measured: 1 ms
    becomes 20).
    """
    return os.getloadavg()[0] > 2 * (os.cpu_count() or 1)


def _remember(file: Path, device: str, measured: Routes) -> None:
    entries = _read(file)  # again: another run may have written meanwhile
    entries[device] = _valid(entries.get(device)) | measured
    try:
        write_json(file, entries)
    except StorageError:
        return  # it is measured again next time
