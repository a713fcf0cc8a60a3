"""A preference trainer in a process of its own, which trains as many steps as it is told to.

    python -m training.pairs_worker {mlx-lm-lora|mlxtune} JOB.json

The peer runs in an environment of its own and gets tokens; nothing of mlxtune is imported
there. Otherwise as `training.worker`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from training.worker import SEED, Turns


def train_peer(job: dict[str, Any], turns: Turns) -> None:
    """DPO as `mlx_lm_lora.train` does it: its model, reference, optimizer, loss and step."""
    # It asks a GPU how much memory to hold.
    known = mx.device_info
    limit = {"max_recommended_working_set_size": 1 << 34}
    mx.device_info = lambda *given: limit | known(*given)
    mx.set_wired_limit = lambda _limit: 0

    import mlx_lm_lora.train as peer
    from mlx_lm_lora.trainer import dpo_trainer

    class Callback(peer.TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            turns.step_done(
                info["train_loss"],
                chosen=info["train_chosen_logits_mean"].item(),
                tokens=tokens[-1],
            )

    rows = json.loads(Path(job["peer_rows"]).read_text(encoding="utf-8"))
    tokens: list[int] = []
    size, own = job["batch_size"], dpo_trainer.iterate_dpo_batches
    begins = cycle(range(0, len(rows) - len(rows) % size, size))

    def batches(dataset: list[Any], **given: Any) -> Iterator[Any]:
        """Its own batch of the pairs that are next: for each step it asks anew."""
        at = next(begins)
        for batch in own(dataset=dataset[at : at + size], **given):
            # Policy and reference see both sides, less the last token of each row.
            shapes = [side.shape for side in batch[:2]]
            tokens.append(2 * sum(rows * (width - 1) for rows, width in shapes))
            yield batch

    dpo_trainer.iterate_dpo_batches = batches
    dpo_trainer.tqdm = _NoBar
    folder = str(Path(job["data"]).with_name("peer"))
    arguments = SimpleNamespace(
        **peer.CONFIG_DEFAULTS
        | {
            "model": job["model"],
            "train_mode": "dpo",
            "optimizer": "adamw",
            "batch_size": size,
            "iters": 10**6,
            "steps_per_report": 1,
            "save_every": 10**6,
            "learning_rate": job["learning_rate"],
            "seed": SEED,
            "adapter_path": folder,
            "beta": job["beta"],
            "lora_parameters": {
                "rank": job["rank"],
                "dropout": 0.0,
                "scale": job["alpha"] / job["rank"],
            },
        }
    )
    model, tokenizer, file = peer.from_pretrained(
        model=arguments.model,
        new_adapter_path=folder,
        lora_config=peer.build_lora_config(arguments),
    )
    peer.train_model(
        args=arguments,
        model=model,
        tokenizer=tokenizer,
        adapter_file=file,
        reference_model=peer.load_reference_model(arguments),
        train_set=rows,
        training_callback=Callback(),
    )


class _NoBar:
    """Instead of a progress bar."""

    def __init__(self, steps: Iterable[int], **_: Any) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def set_postfix(self, _figures: dict[str, str]) -> None:
        pass

    @staticmethod
    def write(_line: str) -> None:
        pass


def train_mlxtune(job: dict[str, Any], turns: Turns) -> None:
    """Computes the reference's log-probabilities first, and says what that took."""
    from training.flops import Flops
    from training.pairs import groups_of, recipe_of, steps_of, store_of

    from mlxtune.data.passes import passes
    from mlxtune.objectives import objective_of
    from mlxtune.train.distributed import Workers
    from mlxtune.train.loop import Trainer
    from mlxtune.train.metrics import Report, Silent
    from mlxtune.train.model import adapted_model, layout_for
    from mlxtune.train.reference import Reference
    from mlxtune.train.run import Run

    class Reporter(Silent):
        def reported(self, report: Report) -> None:
            grid, flops, peer_flops = counted[report.step - 1]
            turns.flops += flops
            turns.step_done(
                report.loss,
                chosen=report.figures["logps/chosen"],
                tokens=grid,
                peer_flops=peer_flops,
            )

    @dataclass(frozen=True)
    class Steps:
        """The pairs in their order, as a plan of ours."""

        steps_per_epoch: int = 10**6

        def total_steps(self, **_: Any) -> int:
            return 10**6

        def steps(self, start: int, _stop: int) -> Iterator[Any]:
            assert start == 0
            for pairs in steps_of(groups, job["batch_size"]):
                samples = [sample for pair in pairs for sample in pair]
                batches = passes(samples, job["batch_size"], layout)
                grid = sum(batch.tokens.size for batch in batches)
                padded = len(pairs), max(len(sample.tokens) for sample in samples)
                # Both sides, and both once more by the reference.
                theirs = 2 * (flops.padded(*padded) + flops.looked_at(*padded))
                counted.append((grid, flops(batches), theirs))
                yield batches

    counted: list[tuple[int, float, float]] = []  # of each step, when its batches are made
    recipe = recipe_of(job)
    store = store_of(recipe)
    adapted = adapted_model(recipe)
    base = adapted.base
    assert adapted.packing
    layout, flops = layout_for(adapted.packing, base.config), Flops(base.model, checkpointed=False)
    reference = Reference(base.model, None, {})
    mx.reset_peak_memory()
    begun = time.perf_counter()
    assert reference.known_to(store, batch_size=job["batch_size"], layout=layout)
    turns.beside["reference_seconds"] = [time.perf_counter() - begun]
    turns.beside["reference_peak_memory_bytes"] = [mx.get_peak_memory()]
    groups = groups_of(store)
    trainer = Trainer(
        base.model,
        Run.create(Path(job["data"]).with_name("run"), recipe, {}, overwrite=False),
        Steps(),
        (),
        objective_of(recipe),
        train=recipe.train,
        evaluation=recipe.eval,
        checkpoint=recipe.checkpoint,
        log=recipe.log,
        base="bench",
        reporter=Reporter(),
        workers=Workers(),
    )
    trainer()


TRAINERS: dict[str, Callable[[dict[str, Any], Turns], None]] = {
    "mlx-lm-lora": train_peer,
    "mlxtune": train_mlxtune,
}


def main() -> None:
    # What the trainers print goes nowhere.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    TRAINERS[trainer](job, Turns(job, told))


if __name__ == "__main__":
    main()
