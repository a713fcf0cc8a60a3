"""Does it learn as well: the loss of mlx-lm's own trainer and of ours on the same data.

    python -m mlxtune.device python benchmarks/curves.py PAIRS.jsonl

2,000 pairs, 250 steps of 8, learning rate 2e-4, rank 8, AdamW, SmolLM2-135M in float32; 100
other pairs are held out. All see the same batches in the same order. The held-out loss of
all is computed by the same plain function, over the answers' tokens. mlx-lm's AdamW does not
correct its moments' bias, so ours is told not to either; a third curve is ours as it is by
default. Keeps the figures in benchmarks/results/ and the picture in docs/.

mlx-lm takes half an hour on two cores. `--again CURVE` trains that one and takes the others
from the figures kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from training.driver import TRAINERS, Worker
from training.models import make_models
from training.workloads import read_pairs

from mlxtune.device import device_name

HERE = Path(__file__).parent
STEPS, PAIRS, HELD_OUT, EVERY = 250, 2000, 100, 50
RESULTS = HERE / "results" / "curves.json"
DEFAULT = "mlxtune, bias corrected"
# Curve to trainer, what it is told, and its colour.
CURVES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mlx-lm": ("mlx-lm", {}, "tab:orange"),
    "mlxtune": ("mlxtune", {"bias_correction": False}, "tab:blue"),
    DEFAULT: ("mlxtune", {"bias_correction": True}, "tab:gray"),
}


def train(trainer: str, job: Path) -> dict[str, Any]:
    """Loss by step, and the held-out loss every so many steps."""
    curve: dict[str, Any] = {"loss": [], "held_out": []}
    worker = Worker(trainer, job)
    answer = worker.warm_up
    while True:
        curve["loss"] += answer["losses"]
        curve["held_out"].append((len(curve["loss"]), answer["held_out_loss"]))
        print(trainer, *curve["held_out"][-1], file=sys.stderr)
        if len(curve["loss"]) >= STEPS:
            worker.stop()
            return curve
        answer = worker.turn()


def draw(curves: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150)
    for name, (_, _, colour) in CURVES.items():
        loss = curves[name]["loss"]
        smooth = [sum(loss[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(loss))]
        axes.plot(range(1, len(loss) + 1), smooth, color=colour, alpha=0.35, lw=1)
        steps, held_out = zip(*curves[name]["held_out"], strict=True)
        axes.plot(steps, held_out, "o-", color=colour, ms=4, label=f"{name}, held out")
    axes.set_xlabel("step of 8 examples (thin: training loss, mean of 10 steps)")
    axes.set_ylabel("nats per answer token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--models", type=Path, default=HERE.parent / ".cache" / "benchmarks")
    parser.add_argument("--again", choices=CURVES, action="append")
    given = parser.parse_args()
    make_models(given.models)
    pairs = read_pairs(given.pairs)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (
            ("train", pairs[:PAIRS]),
            ("valid", pairs[PAIRS : PAIRS + HELD_OUT]),
            ("test", pairs[PAIRS : PAIRS + HELD_OUT]),
        ):
            rows = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in part]
            Path(folder, f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        job = {
            "model": str((given.models / "smollm2").absolute()),
            "data": folder,
            "steps": EVERY,
            "first": EVERY,
            "held_out": True,
            "batch_size": 8,
            "max_seq_length": 2048,
            "checkpointing": False,
            "masked": True,
            "rank": 8,
            "alpha": 16.0,
            "learning_rate": 2e-4,
        }
        curves = json.loads(RESULTS.read_text())["curves"] if given.again else {}
        for name in given.again or CURVES:
            trainer, told, _ = CURVES[name]
            path = Path(folder, "job.json")
            path.write_text(json.dumps(job | told))
            curves[name] = train(trainer, path)
    theirs, ours = (curves[name]["held_out"][-1][1] for name in TRAINERS)
    figures = {
        "benchmark": "curves",
        "device": device_name(),
        "steps": STEPS,
        "held_out_loss": {"mlx-lm": theirs, "mlxtune": ours},
        "difference": ours / theirs - 1,
        "curves": curves,
    }
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(curves, HERE.parent / "docs" / "loss-curves.png")
    print(f"held-out loss: mlx-lm {theirs:.4f}, mlxtune {ours:.4f} ({ours / theirs - 1:+.2%})")


if __name__ == "__main__":
    main()
