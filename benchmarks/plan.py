"""How far plans are from what training steps take on this machine.

    python -m mlxtune.device python benchmarks/plan.py

Each set-up is planned from the model's sizes alone and then run: random weights, a few steps.
The peak is MLX's own count. Prints a table and keeps it in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxtune.bench.depth import StepEstimator, shallow
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.machine import this_machine
from mlxtune.bench.results import slug
from mlxtune.bench.step import StepModel
from mlxtune.data.pack import pack, pad
from mlxtune.device import device_name, on_cpu
from mlxtune.models.known import known_config
from mlxtune.recipe.load import parse_recipe

HERE = Path(__file__).parent
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN3 = "Qwen/Qwen3-0.6B"
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
GEMMA3 = "google/gemma-3-1b-it"
MOE = "mlx-community/Qwen3-30B-A3B-4bit"
PAIRS = (100, 80, 60, 120, 90, 70, 150, 40)


@dataclass(frozen=True)
class SetUp:
    """A model, the lengths of a pass's samples, and what the recipe says otherwise."""

    name: str
    model: str
    lengths: tuple[int, ...] = PAIRS
    blocks: int | None = None
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)


def _train(**keys: Any) -> dict[str, dict[str, Any]]:
    return {"train": keys}


SET_UPS = (
    SetUp("SmolLM2-135M, 8 short pairs", SMOLLM2),
    SetUp("… checkpointing", SMOLLM2, recipe=_train(gradient_checkpointing=True)),
    SetUp("… every second block", SMOLLM2, recipe=_train(gradient_checkpointing=2)),
    SetUp("… rank 4", SMOLLM2, recipe={"lora": {"rank": 4}}),
    SetUp("… rank 128", SMOLLM2, recipe={"lora": {"rank": 128}}),
    SetUp(
        "… rank 64, 8-bit AdamW",
        SMOLLM2,
        recipe={"lora": {"rank": 64}} | _train(optimizer="adamw_8bit"),
    ),
    SetUp("… Adafactor", SMOLLM2, recipe=_train(optimizer="adafactor")),
    SetUp("… Muon", SMOLLM2, recipe=_train(optimizer="muon")),
    SetUp("… 4 bits", SMOLLM2, recipe={"model": {"quantize": 4}}),
    SetUp("… 8 bits", SMOLLM2, recipe={"model": {"quantize": 8}}),
    SetUp("… NF4", SMOLLM2, recipe={"model": {"quantize": "nf4"}}),
    SetUp("… NF4, DoRA", SMOLLM2, recipe={"model": {"quantize": "nf4"}, "lora": {"dora": True}}),
    SetUp(
        "… dropout 0.1, padded", SMOLLM2, recipe={"lora": {"dropout": 0.1}} | _train(packing=False)
    ),
    SetUp("… last 8 blocks", SMOLLM2, recipe={"lora": {"layers": 8}}),
    SetUp("SmolLM2-135M, 1 × 1,024", SMOLLM2, (1024,)),
    SetUp(
        "SmolLM2-135M, 1 × 2,048, checkpointing",
        SMOLLM2,
        (2048,),
        recipe=_train(gradient_checkpointing=True),
    ),
    SetUp("Qwen3-0.6B, 8 short pairs", QWEN3),
    SetUp(
        "Qwen3-0.6B, 4 bits, 2 × 512, checkpointing",
        QWEN3,
        (512, 480),
        recipe={"model": {"quantize": 4}} | _train(gradient_checkpointing=True),
    ),
    SetUp("Llama-3.2-1B's first 8 blocks, 4 × 128", LLAMA, (128,) * 4, 8),
    SetUp("Gemma-3-1B's first 12 blocks, 2 × 256", GEMMA3, (256, 256), 12),
    SetUp("Qwen3-30B-A3B's first 2 blocks, 4 × 64", MOE, (64,) * 4, 2),
)


def compare(set_up: SetUp) -> dict[str, Any]:
    """A set-up's plan beside what it took."""
    config = known_config(set_up.model)
    assert config is not None
    config = config if set_up.blocks is None else shallow(config, set_up.blocks)
    given = {"name": "plan", "model": {"path": set_up.model}, "data": [{"path": "none"}]}
    for section, keys in set_up.recipe.items():
        given[section] = given.get(section, {}) | keys  # type: ignore[operator]
    recipe = parse_recipe(given, where=set_up.name)
    dtype = "float32" if on_cpu() else "bfloat16"
    # Measured anew: what a shared machine does may have changed since the last set-up.
    rates = this_machine().rates
    estimator = StepEstimator(recipe, config, None, dtype, rates)
    batch = (pack if estimator.packing else pad)(samples_of(set_up.lengths))
    wish = recipe.train.gradient_checkpointing
    twice = range(0, estimator.blocks, int(wish)) if wish not in (False, "auto") else range(0)
    planned = estimator.step(batch, len(twice))
    assert planned.seconds is not None
    model = StepModel(recipe, config, None, dtype)
    model.materialize()
    measured = model.measure(batch, twice, steps=3)
    return {
        "set_up": set_up.name,
        "planned_peak_bytes": round(planned.peak),
        "measured_peak_bytes": measured.peak,
        "peak_error": planned.peak / measured.peak - 1,
        "planned_seconds": planned.seconds,
        "measured_seconds": measured.seconds,
        "seconds_error": planned.seconds / measured.seconds - 1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| set-up | planned peak | measured | error | planned step | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peaks = [
            f"{row[key] / 1e9:.2f} GB" for key in ("planned_peak_bytes", "measured_peak_bytes")
        ]
        times = [f"{row[key]:.2f} s" for key in ("planned_seconds", "measured_seconds")]
        lines.append(
            f"| {row['set_up']} | {peaks[0]} | {peaks[1]} | {row['peak_error']:+.1%} "
            f"| {times[0]} | {times[1]} | {row['seconds_error']:+.0%} |"
        )
    for what, key in (("peak", "peak_error"), ("step", "seconds_error")):
        errors = [abs(row[key]) for row in rows]
        lines.append(
            f"\n{what}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="Set-ups with this in their name; others stay as they were.")
    arguments = parser.parse_args()
    path = HERE / "results" / f"plan-{slug(device_name())}.json"
    rows: dict[str, dict[str, Any]] = {}
    if arguments.only and path.exists():
        rows = {row["set_up"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    for set_up in SET_UPS:
        if arguments.only and arguments.only not in set_up.name:
            continue
        rows[set_up.name] = compare(set_up)
        print(json.dumps(rows[set_up.name]), file=sys.stderr, flush=True)
        # A model refers to itself: until it is collected its weights count for the next.
        gc.collect()
        mx.clear_cache()
    print(table(list(rows.values())))
    kept = {"device": device_name(), "rows": list(rows.values())}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
