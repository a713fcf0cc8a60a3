"""How fast this machine is, and how long a step of a real size takes; all in random weights."""

from __future__ import annotations

import time
from typing import Any

from mlxtune.bench.cost import flops_of, measure_rates
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.measure import rates_figures
from mlxtune.bench.step import StepModel
from mlxtune.bench.workloads import SHORT
from mlxtune.data.pack import grid_of, pack
from mlxtune.device import on_cpu
from mlxtune.models.known import known_config
from mlxtune.recipe.load import parse_recipe
from mlxtune.selfcheck.check import Found

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Of its 30 blocks, on a CPU.
_FEW_BLOCKS = 2


def rates() -> Found:
    """The rates that plans are made with."""
    return Found(figures=rates_figures(measure_rates()))


def real_step() -> Found:
    """A step of SmolLM2-135M's sizes, in the type that its training computes in."""
    return Found(figures=_step({}))


def real_quantized_step() -> Found:
    """The same with 4-bit weights."""
    return Found(figures=_step({"model": {"quantize": 4}}))


def _step(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config = known_config(_MODEL)
    assert config is not None
    if on_cpu():
        config["num_hidden_layers"] = _FEW_BLOCKS
    values: dict[str, Any] = {
        "name": "step",
        "model": {"path": _MODEL} | sections.get("model", {}),
        "data": [{"path": "random"}],
    }
    recipe = parse_recipe(values, where="step")
    dtype = "float32" if on_cpu() else "bfloat16"
    model = StepModel(recipe, config, None, dtype)
    samples = samples_of(SHORT)
    batch = pack(samples, grid_of(samples, few_shapes=not on_cpu()))
    begun = time.perf_counter()
    graph = model.graph(batch)
    traced = time.perf_counter() - begun
    model.materialize()
    plain = model.measure(batch, steps=3 if on_cpu() else 6, compiled=False)
    figures: dict[str, Any] = {
        "sizes": f"{_MODEL}, {model.blocks} blocks",
        "dtype": dtype,
        "tokens": batch.token_count,
        "operations": len(graph.order),
        "flops": flops_of(graph),
        "seconds_to_trace": traced,
        "plain": _figures(plain.seconds, plain.first, plain.peak, batch.token_count),
    }
    if not on_cpu():
        compiled = model.measure(batch, steps=8, compiled=True)
        told = _figures(compiled.seconds, compiled.first, compiled.peak, batch.token_count)
        told["seconds_to_compile"] = compiled.first - compiled.seconds
        figures["compiled"] = told
    return figures


def _figures(seconds: float, first: float, peak: int, tokens: int) -> dict[str, float]:
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "first_step_seconds": first,
        "peak_bytes": peak,
    }
