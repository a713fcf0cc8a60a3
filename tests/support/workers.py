"""What each worker does in test_distributed.py, which starts two of them.

    # What they exchange, then every run of FOLDER/runs.json.
    python -m support.workers FOLDER
    # The program; worker 1 gets a signal.
    python -m support.workers --at STEP SIGNAL ARGUMENTS…

On worker 1 a run's `rank_1` changes what it finds or does: `cwd` is the folder it works
in, `recipe` changes its recipe, `at` is what happens before a step of its data is read.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import mlx.core as mx

import mlxtune.train.loop as loop
import mlxtune.train.session as session
from mlxtune.arrays import flat, random_key
from mlxtune.data.batches import Plan
from mlxtune.errors import DataError, StorageError
from mlxtune.train import distributed
from mlxtune.train.distributed import Workers, join
from mlxtune.train.loop import Trainer
from mlxtune.train.metrics import Silent
from support import faults


def main() -> None:
    loop.ahead = iter  # what happens at a step happens then, and not ahead of it
    if sys.argv[1] == "--at":
        step, number = int(sys.argv[2]), signal.Signals[sys.argv[3]]
        if os.environ["MLX_RANK"] == "1":
            session.Plan = happening(step, lambda: os.kill(os.getpid(), number))
        sys.argv[1:] = sys.argv[4:]
        from mlxtune.cli import main as program

        program()
    folder = Path(sys.argv[1])
    workers = join()
    exchange(workers, folder)
    for name, run in json.loads((folder / "runs.json").read_text()).items():
        train(workers, folder, name, run)


def happening(step: int, what) -> type[Plan]:
    """A plan before whose step something happens."""

    class Happening(Plan):
        def steps(self, start, stop):
            for number, batches in enumerate(super().steps(start, stop), start=start):
                if number == step:
                    what()
                yield batches

    return Happening


def fail() -> None:
    raise DataError("the disk with the data is gone", where="few.jsonl")


def fail_by_gpu() -> None:
    raise RuntimeError(faults.MEMORY)


class Full(Silent):
    """A disk that has room for one checkpoint."""

    def saved(self, path):
        raise StorageError("no space left", where=str(path))


HAPPENS = {
    "fail": fail,
    "fail by GPU": fail_by_gpu,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
}


def train(workers: Workers, folder: Path, name: str, run: dict) -> None:
    """One run; what it raises, and this worker's adapter, are left in the folder."""
    trainers = []

    class Kept(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    other = run.get("rank_1", {}) if workers.rank == 1 else {}
    values = run["recipe"] | other.get("recipe", {})
    os.chdir(folder / other.get("cwd", "."))
    session.Trainer = Kept
    session.Plan = happening(other["at"], HAPPENS[other["what"]]) if "at" in other else Plan
    from mlxtune.recipe.load import parse_recipe

    said = None
    try:
        session.fine_tune(
            parse_recipe(values, where="test"),
            folder / "runs" / run.get("folder", name),
            Full() if run.get("full") else Silent(),
            resume=run.get("resume", False),
            workers=workers,
        )
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        said = {"type": type(error).__name__, "text": str(error), "notes": notes}
    place = folder / f"{name}.{workers.rank}"
    place.with_name(place.name + ".json").write_text(json.dumps(said))
    if trainers:
        parameters = flat(trainers[-1]._model.trainable_parameters())
        mx.save_safetensors(str(place) + ".safetensors", parameters)


def exchange(workers: Workers, folder: Path) -> None:
    """Messages of all kinds; what came of them is saved."""
    rank = workers.rank
    distributed.MESSAGE_BYTES = 64
    mx.random.seed(7)
    arrays = {
        "single": mx.arange(50) * 0.5 + rank,
        "half": mx.array([256.0, 1.0 + rank], mx.bfloat16),
        "scalar": mx.array(0.25),
    }
    summed = workers.sum({"a": [arrays["single"], {"b": arrays["half"]}], "c": arrays["scalar"]})
    first = workers.from_first(
        {
            "zeros": mx.array([-0.0, 0.0, float("inf"), -1.5]) * (1 - 2 * rank),
            "nan": mx.array([float("nan")]),
            "step": mx.array(2**40 + rank, mx.uint64),
            "half": mx.array([[1.5 + rank]], mx.bfloat16),
        }
    )
    before = random_key()
    with workers.own_randomness():
        drawn = mx.random.uniform(shape=(4,))
        if rank:
            mx.random.uniform()  # one more than the other worker
    after = random_key()
    with workers.own_randomness():
        drawn_again = mx.random.uniform(shape=(4,))
    mx.eval(drawn, drawn_again)
    out = {
        "summed.single": summed["a"][0],
        "summed.half": summed["a"][1]["b"],
        "summed.scalar": summed["c"],
        **{f"first.{name}": array for name, array in first.items()},
        "drawn": drawn,
        "drawn_again": drawn_again,
        "before": before,
        "after": after,
    }
    distributed.MESSAGE_BYTES = 64 << 20
    mx.save_safetensors(str(folder / f"exchanged.{rank}.safetensors"), out)
    said = {
        "totals": workers.totals(1 + rank, 0.1, 2**40),
        "largest": workers.largest(5 - 10 * rank),
        "texts": workers.texts("größer" * rank),
    }
    (folder / f"exchanged.{rank}.json").write_text(json.dumps(said))
    drifted(workers, folder)


def drifted(workers: Workers, folder: Path) -> None:
    """Adapters and optimizers that have come apart, after a checkpoint's exchange."""
    import mlx.optimizers
    from mlx.utils import tree_map

    from mlxtune.train.checkpoint import Progress, share_state
    from support.models import tiny, with_adapters

    model = with_adapters(tiny("llama"))
    mx.random.seed(100 + workers.rank)
    optimizer = mlx.optimizers.AdamW(0.1)
    optimizer.init(model.trainable_parameters())
    held = optimizer.state["model"]
    optimizer.update(
        model, tree_map(lambda g: mx.random.normal(g.shape), model.trainable_parameters())
    )
    progress = share_state(workers, model, optimizer, Progress(step=workers.rank + 3))
    assert progress.step == 3
    assert optimizer.state["model"] is held, "a compiled step would not see the new state"
    state = flat({"adapter": model.trainable_parameters(), "optimizer": optimizer.state})
    state["random"] = random_key()
    mx.save_safetensors(str(folder / f"drifted.{workers.rank}.safetensors"), state)


if __name__ == "__main__":
    main()
