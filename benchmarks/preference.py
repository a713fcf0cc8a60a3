"""DPO's speed and memory against mlx-lm-lora's own.

    python3 -m venv PEER && PEER/bin/pip install mlx-lm-lora==5.10.2 "mlx[cpu]"
    python -m mlxtune.device python benchmarks/preference.py PAIRS.jsonl PEER [a b] [--rounds 4]

PAIRS.jsonl has one {"prompt", "expected_command"} a line, PEER is an environment of
mlx-lm-lora's (on a Mac without "mlx[cpu]"). Both trainers run at the same time in processes of
their own and take turns, a step each. They load the same folder and train the same four pairs a
step, given the same tokens, with the same rank, scale, type and BLAS; medians over the rounds.
Ours takes the reference's log-probabilities from before; what computing them took is said too.
Prints the tables of benchmarks/README.md and keeps all figures in benchmarks/results/, but for
those of fewer than three rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer
from training.driver import Worker
from training.flops import matmul_rate
from training.machine import machine
from training.models import make_smollm2
from training.pairs import (
    WORKLOADS,
    Workload,
    groups_of,
    recipe_of,
    store_of,
    write_peer_rows,
)
from training.workloads import read_pairs

from mlxtune.device import device_name

HERE = Path(__file__).parent
TRAINERS = PEER, OURS = "mlx-lm-lora", "mlxtune"
PAIRS_A_STEP, RANK, ALPHA, LEARNING_RATE, BETA = 4, 8, 16.0, 1e-5, 0.1
FEWEST_ROUNDS = 3  # to be kept
# Both compute the chosen answers' log-probabilities before they have learned anything.
SAME = 1e-3
PACKAGES = ("mlx-lm-lora", "mlx", "mlx-lm")
SPEEDS = (
    "| | mlx-lm-lora pairs/s | mlxtune pairs/s | ratio | mlx-lm-lora peak | mlxtune peak | ratio "
    "| rounds | of matmul rate |\n|---|---|---|---|---|---|---|---|---|"
)
AMOUNTS = (
    "| | tokens a step, mlx-lm-lora | mlxtune | GFLOP a step, mlx-lm-lora | mlxtune | ratio "
    "| reference, once | its peak | pairs/s, first epoch |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)

Turn = dict[str, Any]


def measure(
    workload: Workload, model: Path, pairs: Path, peer: Path, rounds: int
) -> dict[str, Any]:
    """Figures of both trainers on one workload."""
    with tempfile.TemporaryDirectory() as folder:
        # Tokens and log-probabilities are made anew.
        os.environ["MLXTUNE_CACHE"] = folder
        job = write_job(workload, model, pairs, Path(folder))
        pythons = {PEER: str(peer / "bin" / "python"), OURS: sys.executable}
        workers = {
            trainer: Worker(trainer, job, "training.pairs_worker", pythons[trainer])
            for trainer in TRAINERS
        }
        turns: dict[str, list[Turn]] = {trainer: [] for trainer in TRAINERS}
        rates = []
        for number in range(rounds):
            rates.append(matmul_rate())
            for trainer in TRAINERS if number % 2 else reversed(TRAINERS):
                turns[trainer].append(workers[trainer].turn())
                print(workload.name, number, trainer, turns[trainer][-1], file=sys.stderr)
        for worker in workers.values():
            worker.stop()
    warm_ups = {trainer: workers[trainer].warm_up for trainer in TRAINERS}
    return summary(workload, warm_ups, turns, rates)


def summary(
    workload: Workload,
    warm_ups: dict[str, Turn],
    turns: dict[str, list[Turn]],
    rates: list[float],
) -> dict[str, Any]:
    """What the steps of both trainers say together.

    Args:
        workload: that was trained.
        warm_ups: the first step of each, ours with what the reference took.
        turns: the steps after it, which are timed.
        rates: of a product on this device, a round each, in operations a second.
    """
    theirs, ours = (warm_ups[trainer]["chosen"][0] for trainer in TRAINERS)
    if abs(ours / theirs - 1) > SAME:
        sys.exit(f"the two do not compute the same: chosen log-probabilities {theirs}, {ours}")
    figures: dict[str, Any] = {"what": workload.what, "pairs_a_step": PAIRS_A_STEP}
    for trainer in TRAINERS:
        seconds = [turn["seconds"] for turn in turns[trainer]]
        steps = [warm_ups[trainer], *turns[trainer]]
        figures[trainer] = {
            "pairs_per_second": PAIRS_A_STEP / statistics.median(seconds),
            "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in steps),
            "tokens_a_step": statistics.mean(turn["tokens"][0] for turn in turns[trainer]),
            "seconds": seconds,
            "warm_up_seconds": warm_ups[trainer]["seconds"],
            "losses": [turn["losses"][0] for turn in steps],
            "chosen_log_probabilities": [turn["chosen"][0] for turn in steps],
        }
    of_peer, own = (figures[trainer] for trainer in TRAINERS)
    [seconds] = warm_ups[OURS]["reference_seconds"]
    [peak] = warm_ups[OURS]["reference_peak_memory_bytes"]
    each = seconds / workload.pairs
    own["reference"] = {
        "pairs": workload.pairs,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "first_epoch_pairs_per_second": 1 / (1 / own["pairs_per_second"] + each),
    }
    # The two take the same pairs, so each round is a comparison of its own.
    ratios = [a / b for a, b in zip(of_peer["seconds"], own["seconds"], strict=True)]
    figures["speed_ratio"] = statistics.median(ratios)
    figures["speed_ratios"] = ratios
    figures["memory_ratio"] = own["peak_memory_bytes"] / of_peer["peak_memory_bytes"]
    of_peer["flops_a_step"] = statistics.mean(turn["peer_flops"][0] for turn in turns[OURS])
    own["flops_a_step"] = statistics.mean(turn["flops"] for turn in turns[OURS])
    figures["matmul_flops_per_second"] = rate = statistics.median(rates)
    done = [turn["flops"] / turn["seconds"] / rate for turn in turns[OURS]]
    figures["matmul_fraction"] = statistics.median(done)
    figures["target"] = {"speed_ratio": workload.speed, "memory_ratio": workload.memory}
    return figures


def write_job(workload: Workload, model: Path, pairs: Path, folder: Path) -> Path:
    """Write pairs and job to `folder`; the job's file."""
    rows = workload.rows(read_pairs(pairs), load_tokenizer(model), workload.pairs)
    data, peer_rows = folder / "pairs.jsonl", folder / "peer.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = {
        "model": str(model.absolute()),
        "data": str(data),
        "peer_rows": str(peer_rows),
        "steps": 1,
        "batch_size": PAIRS_A_STEP,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
    }
    write_peer_rows(peer_rows, groups_of(store_of(recipe_of(job))))
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


def versions_of(peer: Path) -> dict[str, str]:
    """What the peer's environment has."""
    asked = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    try:
        told = subprocess.run(
            [peer / "bin" / "python", "-c", asked], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{peer}: no environment with mlx-lm-lora; how to make one:\n{__doc__}")
    return dict(zip(PACKAGES, told.stdout.split(), strict=True))


def tables(workloads: dict[str, dict[str, Any]]) -> str:
    """Both tables: what was reached, and what there was to compute."""
    speeds = [_speeds(letter, measured) for letter, measured in sorted(workloads.items())]
    amounts = [_amounts(letter, measured) for letter, measured in sorted(workloads.items())]
    return "\n".join([SPEEDS, *speeds, "", AMOUNTS, *amounts])


def _speeds(letter: str, measured: dict[str, Any]) -> str:
    theirs, ours = (measured[trainer] for trainer in TRAINERS)
    target = measured["target"]
    return (
        f"| {letter} | {theirs['pairs_per_second']:.3f} | {ours['pairs_per_second']:.2f} "
        f"| **{measured['speed_ratio']:.1f} ×** (≥ {target['speed_ratio']:g}) "
        f"| {theirs['peak_memory_bytes'] / 1e9:.2f} GB | {ours['peak_memory_bytes'] / 1e9:.2f} GB "
        f"| **{measured['memory_ratio']:.2f}** (≤ {target['memory_ratio']:g}) "
        f"| {len(measured['speed_ratios'])} | {measured['matmul_fraction']:.0%} |"
    )


def _amounts(letter: str, measured: dict[str, Any]) -> str:
    theirs, ours = (measured[trainer] for trainer in TRAINERS)
    reference, flops = ours["reference"], (theirs["flops_a_step"], ours["flops_a_step"])
    return (
        f"| {letter} | {theirs['tokens_a_step']:,.0f} | {ours['tokens_a_step']:,.0f} "
        f"| {flops[0] / 1e9:,.0f} | {flops[1] / 1e9:,.0f} | {flops[0] / flops[1]:.1f} "
        f"| {reference['seconds']:.1f} s for {reference['pairs']} pairs "
        f"| {reference['peak_memory_bytes'] / 1e9:.2f} GB "
        f"| {reference['first_epoch_pairs_per_second']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("peer", type=Path)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--models", type=Path, default=HERE.parent / ".cache" / "benchmarks")
    given = parser.parse_args()
    versions = {"mlxtune": version("mlxtune"), **{p: version(p) for p in PACKAGES[1:]}}
    of_both = {"mlx-lm-lora": versions_of(given.peer), "mlxtune": versions}
    model = make_smollm2(given.models / "float32")
    device = device_name()
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    path = HERE / "results" / f"preference-{name}.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures |= {"benchmark": "preference", "device": device}
    kept, now = figures.setdefault("workloads", {}), {}
    for letter in given.workloads:
        before = {"machine": machine(), "versions": of_both}
        now[letter] = measure(WORKLOADS[letter], model, given.pairs, given.peer, given.rounds)
        if given.rounds >= FEWEST_ROUNDS:
            kept[letter] = now[letter] | before
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(tables(now))


if __name__ == "__main__":
    main()
