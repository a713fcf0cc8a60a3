"""Training speed and memory against mlx-lm's own `mlx_lm.lora`.

    python -m mlxtune.device python benchmarks/train.py PAIRS.jsonl [A B C D E] [--rounds 5]

PAIRS.jsonl has one {"prompt", "expected_command"} a line. Both trainers run at the same
time in processes of their own and take turns, so that a noisy machine is noisy for both.
They load the same folder and train the same examples in the same batches, with the same
rank, scale, type and BLAS; medians over the rounds. Prints the table of
benchmarks/README.md and keeps all figures in benchmarks/results/, but for those of fewer
than five rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import deque
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer
from training.driver import TRAINERS, Worker
from training.flops import Flops, matmul_rate
from training.machine import machine
from training.models import make_models
from training.worker import MlxLmBatches, recipe_of
from training.workloads import WORKLOADS, Workload, read_pairs

from mlxtune.data.pack import Batch
from mlxtune.device import device_name, on_cpu
from mlxtune.models.load import DTYPES
from mlxtune.train.model import adapted_model, layout_for

HERE = Path(__file__).parent
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 2e-4
FEWEST_ROUNDS = 5  # to be kept
HEADER = (
    "| | mlx-lm ex/s | mlxtune ex/s | ratio | mlx-lm peak | mlxtune peak | ratio | rounds "
    "| of matmul rate |\n|---|---|---|---|---|---|---|---|---|"
)


def measure(
    workload: Workload, models: Path, pairs: Path, rounds: int, dtype: str
) -> dict[str, Any]:
    """Figures of both trainers on one workload."""
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(workload, models, pairs, Path(folder))
        workers = {trainer: Worker(trainer, job) for trainer in TRAINERS}
        turns: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in TRAINERS}
        rates = []
        for number in range(rounds):
            rates.append(matmul_rate(DTYPES[dtype]))
            for trainer in TRAINERS if number % 2 else reversed(TRAINERS):
                turns[trainer].append(workers[trainer].turn())
                print(workload.name, number, trainer, turns[trainer][-1], file=sys.stderr)
        for worker in workers.values():
            worker.stop()
    examples = workload.steps * workload.batch_size
    figures: dict[str, Any] = {"what": workload.what, "examples_per_turn": examples}
    # One workload may be measured again long after the others, and elsewhere.
    figures |= {"dtype": dtype, "machine": machine()}
    figures["versions"] = {p: version(p) for p in ("mlxtune", "mlx", "mlx-lm")}
    for trainer in TRAINERS:
        seconds = [turn["seconds"] for turn in turns[trainer]]
        figures[trainer] = {
            "examples_per_second": examples / statistics.median(seconds),
            "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in turns[trainer]),
            "seconds": seconds,
            "warm_up_seconds": workers[trainer].warm_up["seconds"],
        }
    theirs, ours = (figures[trainer] for trainer in TRAINERS)
    # The two take the same batches, so each round is a comparison of its own.
    ratios = [a / b for a, b in zip(theirs["seconds"], ours["seconds"], strict=True)]
    figures["speed_ratio"] = statistics.median(ratios)
    figures["speed_ratios"] = ratios
    figures["memory_ratio"] = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    # Of what the device's own product does in the same run.
    figures["matmul_flops_per_second"] = rate = statistics.median(rates)
    done = [t["flops"] / t["seconds"] / rate for t in turns["mlxtune"]]
    figures["matmul_fraction"] = statistics.median(done)
    figures["target"] = {"speed_ratio": workload.speed, "memory_ratio": workload.memory}
    return figures


def write_job(workload: Workload, models: Path, pairs: Path, folder: Path) -> Path:
    """Write rows and job to `folder`; the job's file."""
    model = models / workload.model
    rows = workload.rows(read_pairs(pairs), load_tokenizer(model))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    job = {
        "model": str(model.absolute()),
        "data": str(folder),
        "steps": workload.steps,
        "batch_size": workload.batch_size,
        "max_seq_length": workload.max_seq_length,
        "checkpointing": workload.checkpointing,
        "masked": workload.masked,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def count(workload: Workload, models: Path, pairs: Path, steps: int = 20) -> str:
    """A line of the table of products: of a step, in both trainers."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_job(workload, models, pairs, Path(folder))
        job = json.loads(path.read_text(encoding="utf-8"))
        adapted = adapted_model(recipe_of(job))
        flops = Flops(adapted.base.model, checkpointed=workload.checkpointing)
        theirs, ours = [], []

        def seen(batches: list[Batch], padded: tuple[int, int]) -> None:
            theirs.append(flops.padded(*padded))
            ours.append(flops(batches))

        made = MlxLmBatches(job, layout_for(adapted.packing, adapted.base.config), seen)
        deque(islice(made.steps(0, steps), steps), maxlen=0)
    of_theirs, of_ours = statistics.mean(theirs) / 1e9, statistics.mean(ours) / 1e9
    return f"| {workload.name} | {of_theirs:,.0f} | {of_ours:,.0f} | {of_theirs / of_ours:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS)
    parser.add_argument("--dtype", choices=DTYPES, default="float32" if on_cpu() else "bfloat16")
    parser.add_argument("--count", action="store_true", help="count products, train nothing")
    parser.add_argument("--models", type=Path, default=HERE.parent / ".cache" / "benchmarks")
    given = parser.parse_args()
    models = given.models / given.dtype
    make_models(models, given.dtype)
    results = HERE / "results"
    device = device_name()
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    path = results / f"train-{name}.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures |= {"benchmark": "train", "device": device}
    if given.count:
        print("| | mlx-lm, GFLOP a step | mlxtune | ratio |\n|---|--:|--:|--:|")
        for letter in given.workloads:
            print(count(WORKLOADS[letter], models, given.pairs))
        return
    print(HEADER)
    for letter in given.workloads:
        measured = measure(WORKLOADS[letter], models, given.pairs, given.rounds, given.dtype)
        print(row(letter, measured))
        if given.rounds >= FEWEST_ROUNDS:
            figures.setdefault("workloads", {})[letter] = measured
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def row(letter: str, measured: dict[str, Any]) -> str:
    """A line of the table."""
    theirs, ours = measured["mlx-lm"], measured["mlxtune"]
    target = measured["target"]
    return (
        f"| {letter} | {theirs['examples_per_second']:.2f} | {ours['examples_per_second']:.2f} "
        f"| **{measured['speed_ratio']:.1f} ×** (≥ {target['speed_ratio']:g}) "
        f"| {theirs['peak_memory_bytes'] / 1e9:.2f} GB | {ours['peak_memory_bytes'] / 1e9:.2f} GB "
        f"| **{measured['memory_ratio']:.2f}** (≤ {target['memory_ratio']:g}) "
        f"| {len(measured['speed_ratios'])} | {measured['matmul_fraction']:.0%} |"
    )


if __name__ == "__main__":
    main()
