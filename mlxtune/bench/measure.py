"""Measure a machine: what its device does, and what training reaches of it."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version

import mlx.core as mx

import mlxtune
from mlxtune.bench.cost import Rates, seconds_of, training_dtype
from mlxtune.bench.machine import Machine
from mlxtune.bench.results import Figures
from mlxtune.bench.workloads import WORKLOADS, Bench, Workload
from mlxtune.device import device_name, gpu_cores

Progress = Callable[[str], None]

# A workload whose steps are planned to take longer is left out, unless all are asked for.
_AT_MOST = 30.0


def measure_machine(
    machine: Machine, *, everything: bool = False, progress: Progress = lambda _: None
) -> Figures:
    """All figures of the machine at hand.

    Args:
        machine: with its rates.
        everything: run workloads too that take minutes a step.
        progress: is told what comes next.
    """
    assert machine.rates is not None
    progress("rates")
    return {
        "device": device_name(),
        "gpu_cores": gpu_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")}
        | {"mlxtune": mlxtune.__version__, "python": platform.python_version()},
        "budget_bytes": machine.budget,
        "rates": rates_figures(machine.rates),
        "workloads": list(_workloads(machine, WORKLOADS, everything, progress)),
    }


def _workloads(
    machine: Machine, workloads: Sequence[Workload], everything: bool, progress: Progress
) -> Iterator[Figures]:
    for workload in workloads:
        bench = Bench(workload, machine.rates)
        planned = bench.planned()
        assert planned.seconds is not None and machine.rates is not None
        figures: Figures = {
            "workload": workload.name,
            "planned_seconds": planned.seconds,
            "planned_peak_bytes": round(planned.peak),
        }
        if planned.peak_within(machine.budget) > machine.budget:
            yield figures | {"left_out": "more memory than there is"}
            continue
        if planned.seconds > _AT_MOST and not everything:
            yield figures | {"left_out": f"planned to take {planned.seconds:.0f} s a step"}
            continue
        progress(workload.name)
        measured = bench.measured()
        best = max(rate for _, rate in machine.rates.products)
        yield figures | {
            "seconds": measured.seconds,
            "peak_bytes": measured.peak,
            "tokens_per_second": workload.tokens / measured.seconds,
            "examples_per_second": len(workload.lengths) / measured.seconds,
            "model_flops_utilisation": bench.needed_flops() / measured.seconds / best,
        }
        # A model refers to itself: until it is collected its weights count for the next.
        gc.collect()
        mx.clear_cache()


def rates_figures(rates: Rates) -> Figures:
    """Rates, and what is measured beside them: products with 4-bit weights, and attention."""
    dtype = training_dtype()
    return {
        "products": {f"{round(size ** (1 / 3))}": rate for size, rate in rates.products},
        "packed_products": {str(rows): _packed(rows, dtype) for rows in (1, 64, 512)},
        "attention": _attention(dtype),
        "bytes": rates.bytes,
        "powers": rates.powers,
        "overhead": rates.overhead,
        "efficiency": rates.efficiency,
    }


def _packed(rows: int, dtype: mx.Dtype) -> float:
    """FLOP/s of a product of so many rows with a 4-bit weight of 1,024 x 1,024."""
    x, w = mx.ones((rows, 1024), dtype), mx.random.normal((1024, 1024)).astype(dtype)
    packed = mx.quantize(w, group_size=64, bits=4)
    mx.eval(x, packed)
    seconds = seconds_of(
        lambda: mx.quantized_matmul(x, *packed, transpose=True, group_size=64, bits=4)
    )
    return 2 * rows * 1024 * 1024 / seconds


def _attention(dtype: mx.Dtype) -> float:
    """FLOP/s of MLX's causal attention over 1,024 tokens, 8 heads of 64, all pairs counted."""
    q = mx.random.normal((1, 8, 1024, 64)).astype(dtype)
    mx.eval(q)
    seconds = seconds_of(
        lambda: mx.fast.scaled_dot_product_attention(q, q, q, scale=0.125, mask="causal")
    )
    return 4 * 8 * 1024 * 1024 * 64 / seconds
