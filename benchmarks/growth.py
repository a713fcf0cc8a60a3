"""How a step's time and memory grow with the length of a row and with the rank of the adapter.

    python -m mlxtune.device python benchmarks/growth.py PAIRS.jsonl [--lengths 256 512] [--ranks]
        [--turns 3]

SmolLM2-135M in float32, LoRA on all layers, one row of running text to a step, every token
of it trained, nothing computed twice. Each point is a process of its own; its time is the
median of its turns. Prints two tables and keeps them in benchmarks/results/, point by point:
the longest rows take minutes a step on a CPU, and points can be measured a few at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer
from training.driver import Worker
from training.models import make_models
from training.workloads import read_pairs, texts

from mlxtune.device import device_name

HERE = Path(__file__).parent
LENGTHS, AT_RANK = (256, 512, 1024, 2048, 4096, 8192), 8
RANKS, AT_LENGTH = (4, 8, 16, 32, 64, 128), 1024
TURNS = 3


def measure(model: Path, pairs: Path, length: int, rank: int, count: int) -> dict[str, Any]:
    """Seconds and peak memory of a step, after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        rows = texts(read_pairs(pairs), load_tokenizer(model), length, count + 1)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        for name in ("train", "valid", "test"):
            Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")
        job = Path(folder, "job.json")
        job.write_text(
            json.dumps(
                {
                    "model": str(model.absolute()),
                    "data": folder,
                    "steps": 1,
                    "batch_size": 1,
                    "max_seq_length": length,
                    "checkpointing": False,
                    "masked": False,
                    "rank": rank,
                    "alpha": 16.0,
                    "learning_rate": 2e-4,
                }
            )
        )
        worker = Worker("mlxtune", job)
        turns = [worker.turn() for _ in range(count)]
        worker.stop()
    point = {
        "tokens": length,
        "rank": rank,
        "turns": count,
        "seconds": statistics.median(turn["seconds"] for turn in turns),
        "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in turns),
    }
    print(point, file=sys.stderr)
    return point


def table(points: list[dict[str, Any]], key: str) -> str:
    lines = [f"| {key} | seconds a step | tokens/s | peak memory |", "|---|---|---|---|"]
    lines += [
        f"| {p[key]:,} | {p['seconds']:.2f} | {p['tokens'] / p['seconds']:,.0f} "
        f"| {p['peak_memory_bytes'] / 1e9:.2f} GB |"
        for p in points
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--models", type=Path, default=HERE.parent / ".cache" / "benchmarks")
    given = parser.parse_args()
    make_models(given.models)
    model = given.models / "smollm2"
    device = device_name()
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    path = HERE / "results" / f"growth-{name}.json"
    figures: dict[str, Any] = {"benchmark": "growth", "device": device, "length": [], "rank": []}
    if path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))
    wanted = [("length", "tokens", length, AT_RANK) for length in given.lengths]
    wanted += [("rank", "rank", AT_LENGTH, rank) for rank in given.ranks]
    for table_of, key, length, rank in wanted:
        point = measure(model, given.pairs, length, rank, given.turns)
        others = [p for p in figures[table_of] if p[key] != point[key]]
        figures[table_of] = sorted([*others, point], key=lambda p, key=key: p[key])
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(figures["length"], "tokens"), table(figures["rank"], "rank"), sep="\n\n")


if __name__ == "__main__":
    main()
