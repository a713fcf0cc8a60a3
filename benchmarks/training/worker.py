"""One trainer in a process of its own, which trains as many steps as it is told to.

    python -m training.worker {mlx-lm|mlxtune} JOB.json

It loads, trains one step to warm up, and then for each line on standard input trains the
job's steps and prints what they took as a line of JSON. Both see the batches that mlx-lm
makes: its own tokens, offsets and order.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import mlx.core as mx
import numpy as np

SEED = 0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = [f"self_attn.{name}" for name in PROJECTIONS[:4]] + [f"mlp.{n}" for n in PROJECTIONS[4:]]


class Turns:
    """Stops training after each turn until the next is asked for."""

    def __init__(self, job: dict[str, Any], told: TextIO) -> None:
        self._job = job
        self._told = told
        self._left = job.get("first", 1)  # by default one step to warm up
        self._losses: list[float] = []
        self.beside: dict[str, list[float]] = {}  # lists to stand in this turn's figures
        self.flops = 0.0  # of this turn's steps, if they are counted
        self.model: Any = None
        self._begun = time.perf_counter()

    def step_done(self, loss: float, **beside: float) -> None:
        """Count a step; what stands beside its loss is given back under the same names."""
        self._left -= 1
        self._losses.append(loss)
        for name, value in beside.items():
            self.beside.setdefault(name, []).append(value)
        if self._left:
            return
        seconds = time.perf_counter() - self._begun
        figures = {
            "seconds": seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
            "flops": self.flops,
            "losses": self._losses,
            **self.beside,
        }
        if self._job.get("held_out"):
            figures["held_out_loss"] = held_out_loss(self.model, self._job)
        self.flops, self._losses, self.beside = 0.0, [], {}
        print(json.dumps(figures), file=self._told, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._left, self._begun = self._job["steps"], time.perf_counter()


def held_out_loss(model: Any, job: dict[str, Any]) -> float:
    """Mean loss over the answers' tokens of test.jsonl: one function for both trainers."""
    from mlx_lm.tuner.datasets import load_dataset
    from mlx_lm.utils import load_tokenizer

    from mlxtune.data.pack import pad
    from mlxtune.data.render import Sample
    from mlxtune.models.heads import evaluating
    from mlxtune.train.step import LossFunction, batch_arrays

    _, _, rows = load_dataset(mlx_lm_arguments(job), load_tokenizer(Path(job["model"])))
    samples = []
    for number in range(len(rows)):
        ids, offset = rows.process(rows[number])
        weights = (np.arange(len(ids)) >= offset).astype(np.float32)
        samples.append(Sample(np.array(ids, np.int32), weights, record=number))
    samples.sort(key=lambda sample: len(sample.tokens))
    total = weight = 0.0
    with evaluating(model):
        loss = LossFunction(model)
        for at in range(0, len(samples), 8):
            batch = pad(samples[at : at + 8])
            total += loss(batch_arrays(batch), 0, False)[0].item()
            weight += batch.weight
    return total / weight


def mlx_lm_arguments(job: dict[str, Any]) -> SimpleNamespace:
    """As `mlx_lm.lora` would have them from its command line and config."""
    import mlx_lm.lora

    arguments = mlx_lm.lora.CONFIG_DEFAULTS | {
        "model": job["model"],
        "data": job["data"],
        "train": True,
        "optimizer": "adamw",
        "num_layers": -1,
        "batch_size": job["batch_size"],
        "iters": 10**6,
        "steps_per_report": 1,
        "save_every": 10**6,
        "learning_rate": job["learning_rate"],
        "max_seq_length": job["max_seq_length"],
        "grad_checkpoint": job["checkpointing"],
        "mask_prompt": job["masked"],
        "seed": SEED,
        "adapter_path": tempfile.mkdtemp(),
        "lora_parameters": {
            "rank": job["rank"],
            "dropout": 0.0,
            "scale": job["alpha"] / job["rank"],
            "keys": KEYS,
        },
    }
    return SimpleNamespace(**arguments)


def train_mlx_lm(job: dict[str, Any], turns: Turns) -> None:
    import mlx_lm.lora
    from mlx_lm.tuner.datasets import load_dataset

    class Callback(mlx_lm.lora.TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            turns.step_done(info["train_loss"])

    arguments = mlx_lm_arguments(job)
    model, tokenizer = mlx_lm.lora.load(arguments.model)
    turns.model = model
    rows, _, _ = load_dataset(arguments, tokenizer)
    np.random.seed(SEED)
    mlx_lm.lora.train_model(arguments, model, rows, [], Callback())


@dataclass(frozen=True)
class MlxLmBatches:
    """The batches of mlx-lm, as a plan of ours."""

    job: dict[str, Any]
    layout: Any
    seen: Callable[[Any, tuple[int, int]], None]  # our passes, and the shape of mlx-lm's rows
    steps_per_epoch: int = 10**6

    def total_steps(self, **_: Any) -> int:
        return 10**6

    def steps(self, start: int, _stop: int) -> Iterator[Any]:
        from mlx_lm.tuner.datasets import CacheDataset, load_dataset
        from mlx_lm.tuner.trainer import iterate_batches
        from mlx_lm.utils import load_tokenizer

        from mlxtune.data.passes import passes
        from mlxtune.data.render import Sample

        assert start == 0
        arguments = mlx_lm_arguments(self.job)
        rows, _, _ = load_dataset(arguments, load_tokenizer(Path(arguments.model)))
        np.random.seed(SEED)
        batches = iterate_batches(
            CacheDataset(rows), arguments.batch_size, arguments.max_seq_length, loop=True
        )
        for tokens, spans in batches:
            samples = []
            for number, (row, (offset, length)) in enumerate(
                zip(np.array(tokens), np.array(spans), strict=True)
            ):
                ids = row[:length].astype(np.int32)
                weights = (np.arange(length) >= max(1, offset)).astype(np.float32)
                samples.append(Sample(ids, weights, record=number + 1, where=""))
            batches = passes(samples, len(samples), self.layout)
            self.seen(batches, (tokens.shape[0], tokens.shape[1]))
            yield batches


def recipe_of(job: dict[str, Any]) -> Any:
    """What ours is told, so that it trains as mlx-lm does."""
    from mlxtune.recipe.load import parse_recipe

    return parse_recipe(
        {
            "name": "bench",
            "seed": SEED,
            "model": {"path": job["model"]},
            "lora": {"rank": job["rank"], "alpha": job["alpha"], "target_modules": PROJECTIONS},
            "data": [{"path": f"{job['data']}/train.jsonl"}],
            "train": {
                "max_steps": 10**6,
                "batch_size": job["batch_size"],
                "learning_rate": job["learning_rate"],
                "lr_scheduler": "constant",
                "warmup_ratio": 0.0,
                "max_grad_norm": 0.0,
                # As MLX's AdamW has it by itself.
                "weight_decay": 0.01,
                "adam_bias_correction": job.get("bias_correction", False),
                "max_seq_length": job["max_seq_length"],
            },
            "checkpoint": {"steps": 10**6},
            "log": {"steps": 1},
        },
        where="worker",
    )


def train_mlxtune(job: dict[str, Any], turns: Turns) -> None:
    from training.flops import Flops

    from mlxtune.objectives import SFT
    from mlxtune.train.blocks import checkpoint_blocks
    from mlxtune.train.distributed import Workers
    from mlxtune.train.loop import Trainer
    from mlxtune.train.metrics import Report, Silent
    from mlxtune.train.model import adapted_model, layout_for
    from mlxtune.train.run import Run

    class Reporter(Silent):
        def reported(self, report: Report) -> None:
            turns.flops += counted[report.step - 1]
            turns.step_done(report.loss)

    counted: list[float] = []  # of each step, when its batches are made

    recipe = recipe_of(job)
    adapted = adapted_model(recipe)
    base = adapted.base
    turns.model = base.model
    assert adapted.packing
    if job["checkpointing"]:
        checkpoint_blocks(base.model, range(len(base.model.layers)))
    flops = Flops(base.model, checkpointed=job["checkpointing"])

    def seen(batches: Any, _padded: tuple[int, int]) -> None:
        counted.append(flops(batches))

    folder = Path(tempfile.mkdtemp()) / "run"
    trainer = Trainer(
        base.model,
        Run.create(folder, recipe, {}, overwrite=False),
        MlxLmBatches(job, layout_for(adapted.packing, base.config), seen),
        (),
        SFT(),
        train=recipe.train,
        evaluation=recipe.eval,
        checkpoint=recipe.checkpoint,
        log=recipe.log,
        base="bench",
        reporter=Reporter(),
        workers=Workers(),
    )
    trainer()


def main() -> None:
    # What the trainers print goes nowhere.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    turns = Turns(job, told)
    {"mlx-lm": train_mlx_lm, "mlxtune": train_mlxtune}[trainer](job, turns)


if __name__ == "__main__":
    main()
