"""Two workers on this machine train as one process with twice the batch, and end together."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtune.adapters.store import load_arrays
from mlxtune.data.batches import Part, Plan
from mlxtune.data.passes import Layout
from mlxtune.device import find_blas, worker_rank
from mlxtune.errors import OutOfMemory, RunError
from mlxtune.recipe.load import dump_recipe, parse_recipe
from mlxtune.train.distributed import Workers, join
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run, checkpoints
from mlxtune.train.session import fine_tune
from support import faults, program
from support.compare import distance, random_samples
from support.files import SHELL_TRAIN, write_jsonl
from support.process import HANGS, THREADS
from support.program import running

WORKERS = ("-m", "support.workers")


def free_ports() -> int:
    """The first of two ports that nobody listens on."""
    choose = random.Random(os.getpid())
    own = 20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for _ in range(100):
        first = own + choose.randrange(999)
        try:
            for port in (first, first + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


def environment(**changes: str) -> dict[str, str]:
    """One thread a worker: two of them would fight for the same cores."""
    return program.environment() | dict.fromkeys(THREADS, "1") | changes


def launch(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program on two workers, with MLX's own launcher."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    options = ["-n", "2", "--backend", "ring", "--starting-port", str(free_ports())]
    return subprocess.run(
        [str(launcher), *options, sys.executable, *command],
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


# Twice as much on one worker as on each of two.
ONE = {"batch_size": 8, "gradient_accumulation_steps": 1}
TWO = {"batch_size": 4, "gradient_accumulation_steps": 1}
TWO_TWICE = {"batch_size": 2, "gradient_accumulation_steps": 2}

# Of 17 records an epoch's last step has one, so that worker 1 has none.
SAME = {
    "plain": (TWO, {"train": {"max_grad_norm": 0.5}}),
    "accumulated": (
        TWO_TWICE,
        {
            "train": {"packing": False, "optimizer": "sgd", "learning_rate": 0.1},
            "lora": {"layers": 1},
        },
    ),
    "pairs": (
        TWO,
        {
            "objective": "dpo",
            "dpo": {"sft_weight": 0.5},
            "data": [{"path": "pairs.jsonl"}],
            "eval": {"path": "pairs.jsonl", "max_samples": 5, "max_overlap": 1.0, "steps": 2},
            "train": {"max_grad_norm": 0.01, "optimizer": "sgd", "learning_rate": 0.1},
        },
    ),
}


@pytest.fixture(scope="module")
def values(tiny_folder):
    """Makes the values of a recipe for four steps of 8 on few.jsonl."""

    def make(**sections):
        made = {
            "name": "t",
            "model": {"path": str(tiny_folder)},
            "lora": {"rank": 4},
            "data": [{"path": "few.jsonl"}],
            "train": TWO | {"max_steps": 4, "learning_rate": 1e-2},
            "eval": {"path": "few.jsonl", "max_samples": 5, "max_overlap": 1.0, "steps": 2},
            "log": {"steps": 1},
        }
        return made | {
            name: made.get(name, {}) | new if isinstance(new, dict) else new
            for name, new in sections.items()
        }

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with data, and inside it two that stand for another machine's."""
    path = tmp_path_factory.mktemp("workers")
    records = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[::40]][:17]
    write_jsonl(path / "few.jsonl", records)
    sides = zip(records, [*records[3:], *records[:3]], strict=True)
    write_jsonl(
        path / "pairs.jsonl",
        [
            {
                "prompt": record["prompt"],
                "chosen": record["expected_command"],
                "rejected": f"{other['expected_command']} 2",
            }
            for record, other in sides
        ],
    )
    for name, last in {"other": {"prompt": "a", "completion": "b"}, "bad": {"no": 1}}.items():
        (path / name).mkdir()
        write_jsonl(path / name / "few.jsonl", [*records[:-1], last])
    return path


@pytest.fixture(scope="module")
def launched(folder, values):
    """All runs that need no processes of their own, on two workers; their recipes."""
    dropout = values(lora={"dropout": 0.3}, checkpoint={"steps": 2, "keep": 9})
    runs = {
        **{name: {"recipe": with_train(values, *kind)} for name, kind in SAME.items()},
        "straight": {"recipe": dropout},
        "stopped": {"recipe": dropout, "rank_1": {"at": 1, "what": "interrupt"}},
        "resumed": {"recipe": dropout, "folder": "stopped", "resume": True},
        "other recipe": {"recipe": values(), "rank_1": {"recipe": {"seed": 5}}},
        "late": {"recipe": values(), "rank_1": {"at": 1, "what": "fail"}},
        "bad data": {"recipe": values(), "rank_1": {"cwd": "bad"}},
        "other data": {"recipe": values(), "rank_1": {"cwd": "other"}},
        "full": {"recipe": dropout, "full": True},
        "no memory": {"recipe": values(), "rank_1": {"at": 1, "what": "fail by GPU"}},
        "less memory": {
            "recipe": values(train=TWO | {"max_steps": 4, "gradient_checkpointing": True}),
            "folder": "no memory",
            "resume": True,
        },
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    done = launch(*WORKERS, str(folder))
    assert done.returncode == 0 and "WARN" not in done.stderr, done.stderr
    return {name: run["recipe"] for name, run in runs.items()}


def with_train(values, split, sections):
    settings = {"max_steps": 4, "learning_rate": 1e-2} | sections.get("train", {}) | split
    return values(**sections | {"train": settings})


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.metrics() if "loss" in entry]


def same_bits(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        bytes(memoryview(one[name])) == bytes(memoryview(other[name])) for name in one
    )


def left_by(folder: Path, name: str) -> list[dict[str, mx.array]]:
    """The arrays that each worker has left."""
    return [load_arrays(folder / f"{name}.{rank}.safetensors") for rank in (0, 1)]


def said_by(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


# ---------------------------------------------------------------------- the same mathematics


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_two_workers_are_one_with_twice_the_batch(
    launched, folder, values, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)

    def alone(split):
        recipe = parse_recipe(with_train(values, split, SAME[name][1]), where="test")
        return fine_tune(recipe, tmp_path / f"by {split['batch_size']}", Silent())

    one, two = alone(ONE), Run(folder / "runs" / name)
    entries, by_two = list(one.metrics()), list(two.metrics())
    assert len(entries) == len(by_two) == 4 + 3
    for entry, other in zip(entries, by_two, strict=True):
        assert entry.keys() == other.keys()
        for key in {"step", "epoch", "tokens", "supervised_tokens", "examples"} & entry.keys():
            assert entry[key] == other[key]
        for key in {"loss", "held_out_loss", "grad_norm", "learning_rate"} & entry.keys():
            assert other[key] == pytest.approx(entry[key], rel=1e-5), (key, entry["step"])
        for key in (key for key in entry if "/" in key):  # figures of an objective
            assert other[key] == pytest.approx(entry[key], rel=1e-4, abs=1e-4), key
    clipped = SAME[name][1]["train"].get("max_grad_norm", 1.0)
    assert max(entry.get("grad_norm", 0) for entry in entries) > clipped, "nothing was clipped"
    # AdamW divides small gradients by their own size, and with it what rounding left in them:
    # one process whose steps are more passes is the measure of how far that alone leads.
    divided = [
        alone(ONE | {"batch_size": size, "gradient_accumulation_steps": 8 // size})
        for size in (1, 2, 4)
    ]
    for place in ("adapter", "adapter-best"):
        file = f"{place}/adapters.safetensors"
        want, got, *others = (load_arrays(r.path / file) for r in (one, two, *divided))
        assert want.keys() == got.keys()
        rounding = max(distance(other[key], want[key]) for other in others for key in want)
        assert rounding < 5e-5, "that is no rounding"
        assert max(distance(got[key], want[key]) for key in want) < max(1e-5, 2 * rounding)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SAME, "straight", "resumed"])
def test_all_workers_have_the_same_adapter_to_the_last_bit(launched, folder, name):
    first, second = left_by(folder, name)
    assert same_bits(first, second)


def test_workers_share_every_step_and_an_epoch_sees_every_sample_once():
    samples = random_samples([8] * 23)
    padded = Layout(packing=False)
    alone = Plan([Part(samples)], 4, 2, 7, padded)
    shares = [Plan([Part(samples)], 2, 2, 7, padded, rank, 2) for rank in (0, 1)]
    assert {share.steps_per_epoch for share in shares} == {alone.steps_per_epoch} == {3}
    together = zip(alone.steps(0, 6), *(share.steps(0, 6) for share in shares), strict=True)
    for whole, first, second in together:
        seen = [{r for batch in part for r in batch.records} for part in (whole, first, second)]
        assert seen[0] == seen[1] | seen[2] and not seen[1] & seen[2]
        assert all(len(part) <= 2 for part in (first, second))


@pytest.mark.slow
def test_what_workers_exchange_arrives(launched, folder):
    one, other = left_by(folder, "exchanged")
    assert (mx.arange(50) + 1 == one["summed.single"]).all()
    assert one["summed.half"].dtype == mx.bfloat16
    assert one["summed.half"].tolist() == [512.0, 3.0]
    assert one["summed.scalar"].item() == 0.5
    exchanged = [name for name in one if name.startswith(("summed.", "first."))]
    assert same_bits({n: one[n] for n in exchanged}, {n: other[n] for n in exchanged})
    assert bytes(memoryview(one["first.zeros"]))[3] == 0x80, "the sign of zero was lost"
    assert one["first.step"].item() == 2**40 and one["first.half"].item() == 1.5
    for said in said_by(folder, "exchanged"):
        assert said["totals"] == [3, 0.2, 2**41]
        assert said["largest"] == 5
        assert said["texts"] == ["", "größer"]


@pytest.mark.slow
def test_each_worker_draws_numbers_of_its_own_from_one_saved_state(launched, folder):
    one, other = left_by(folder, "exchanged")
    for drawn in ("drawn", "drawn_again"):
        assert not (one[drawn] == other[drawn]).any()
    assert not (one["drawn"] == one["drawn_again"]).any()
    assert (one["after"] == other["after"]).all() and (one["after"] != one["before"]).any()


@pytest.mark.slow
def test_workers_that_have_come_apart_go_on_from_what_the_first_has(launched, folder):
    one, other = left_by(folder, "drifted")
    assert any(name.startswith("optimizer.") for name in one)
    assert same_bits(one, other)


# -------------------------------------------------------------------------- stop and go on


@pytest.mark.slow
def test_interrupted_on_one_worker_all_stop_and_resume_exactly(launched, folder):
    stopped, straight = Run(folder / "runs/stopped"), Run(folder / "runs/straight")
    for said in said_by(folder, "stopped"):
        assert said["type"] == "Interrupted" and said["text"].endswith("step-2")
    assert losses(stopped) == losses(straight)
    assert stopped.status()["status"] == straight.status()["status"] == "finished"
    for resumed, uninterrupted in zip(
        left_by(folder, "resumed"), left_by(folder, "straight"), strict=True
    ):
        assert same_bits(resumed, uninterrupted)


@pytest.mark.slow
def test_a_run_goes_on_with_as_many_workers_as_it_was_begun_with(launched, folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = parse_recipe(launched["late"], where="test")
    with pytest.raises(RunError, match="begun with 2 workers, and there are 1 now"):
        fine_tune(recipe, folder / "runs/late", Silent(), resume=True)


@pytest.fixture
def recipe_path(folder, values, monkeypatch):
    """A recipe on disk, in the working folder."""
    monkeypatch.chdir(folder)
    recipe = parse_recipe(values(checkpoint={"steps": 2}), where="test")
    (folder / "t.toml").write_text(dump_recipe(recipe))
    return "t.toml"


@pytest.mark.slow
def test_the_program_stops_all_workers_with_130_and_only_the_first_speaks(
    folder, tmp_path, recipe_path
):
    """Both run themselves once more with a BLAS preloaded, and still find each other.

    Each is started as the launcher would: only so is its exit code seen.
    """
    port = free_ports()
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    arguments = ("lora", recipe_path, "-o", str(tmp_path / "run"), "--set=train.max_steps=99999")
    given = {"cwd": folder, "MLX_HOSTFILE": str(hosts), "MLXTUNE_BLAS": "", "LD_PRELOAD": ""}
    given |= {"MLXTUNE_CACHE": str(tmp_path / "cache")}  # where nothing has been said yet
    with (
        running(*arguments, **given, MLX_RANK="0") as first,
        running(*arguments, **given, MLX_RANK="1") as second,
    ):
        workers = (first, second)
        for line in first.stdout:
            if line.startswith("step 1/"):
                break
        second.send_signal(signal.SIGINT)
        (said, errors), silent = (worker.communicate(timeout=HANGS) for worker in workers)
    assert [worker.returncode for worker in workers] == [130, 130], errors
    assert "saved" in said and "--resume" in errors and "Traceback" not in errors
    assert silent == ("", "")
    assert Run(tmp_path / "run").status()["status"] == "interrupted"
    if sys.platform == "linux" and find_blas():
        assert errors.count("with lib") == 1


# --------------------------------------------------------------------------------- failures


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_with_an_error(folder, tmp_path, recipe_path):
    run = tmp_path / "run"
    options = ["--at", "3", "SIGKILL", "lora", recipe_path, "-o", str(run)]
    done = launch(*WORKERS, *options, MLXTUNE_BLAS="off")
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    assert "rank 1 exited with code -9" in done.stderr
    assert "workers  2," in done.stdout
    assert done.stdout.count("\nstep 3/4  ") == 1, "both workers wrote, or none did"
    assert Run(run).status()["status"] == "failed"
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "failing", "kind", "text"),
    [
        ("bad data", 1, "DataError", "few.jsonl"),
        ("late", 1, "DataError", "the disk with the data is gone"),
        ("full", 0, "StorageError", "no space left"),
    ],
)
def test_an_error_on_one_worker_ends_all(launched, folder, name, failing, kind, text):
    said = said_by(folder, name)
    own, other = said[failing], said[1 - failing]
    assert own["type"] == kind and text in own["text"]
    assert own["notes"] == [f"  on worker {failing} of 2"]
    assert other["type"] == "WorkerFailed"
    assert f"worker {failing} has failed" in other["text"] and text in other["text"]
    run = folder / "runs" / name
    assert not run.exists() if name == "bad data" else Run(run).status()["status"] == "failed"


@pytest.mark.slow
def test_a_worker_without_memory_says_what_to_do_and_all_go_on(launched, folder):
    """Its folder has gone on already: with less memory, from the beginning."""
    (first, second) = said_by(folder, "no memory")
    assert second["type"] == "OutOfMemory" and "ran out of memory at step 2" in second["text"]
    remedy = "the same command with --resume --set train.gradient_checkpointing=true"
    assert remedy in second["text"]
    assert second["notes"][-1] == "  on worker 1 of 2"
    assert first["type"] == "WorkerFailed" and "worker 1 has failed" in first["text"]
    assert said_by(folder, "less memory") == [None, None]
    status = Run(folder / "runs/no memory").status()
    assert (status["status"], status["error"]) == ("finished", None)
    assert status["checkpointed_blocks"] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other recipe", "other data"])
def test_workers_that_differ_are_refused(launched, folder, name):
    what = name.split()[1]
    first, second = said_by(folder, name)
    assert first["type"] == "RunError"
    assert f"worker 1 does not have the same {what} as worker 0" in first["text"]
    assert second["type"] == "WorkerFailed", "both would say the same"
    assert not (folder / "runs" / name).exists()


# ------------------------------------------------------------------------------------ alone


def test_without_a_launcher_a_process_is_alone(monkeypatch, tmp_path):
    for name in ("MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert worker_rank() is None
    workers = join()
    assert (workers.rank, workers.size, workers.first) == (0, 1, True)
    with workers:
        workers.barrier()
        assert workers.totals(1.5, 2) == [1.5, 2]
        assert workers.largest(3) == 3 and workers.texts("a") == ["a"]
        assert not workers.stopping
        workers.ask_to_stop()
        assert workers.stopping
    monkeypatch.setenv("MLX_RANK", "0")
    empty = tmp_path / "hosts"
    empty.write_text("\n")
    monkeypatch.setenv("MLX_HOSTFILE", str(empty))
    assert worker_rank() is None, "mlx.launch -n 1"
    monkeypatch.delenv("MLX_HOSTFILE")
    assert worker_rank() == 0
    with pytest.raises(RunError, match="cannot be connected"):
        join()
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_WORLD_SIZE", "1")
    assert worker_rank() is None


class NoMessages:
    """Two workers, as MLX has them."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


@pytest.fixture
def no_messages(monkeypatch):
    """A worker whose GPU fails at every message."""

    def fails(*_arguments, **_named):
        raise RuntimeError(faults.MEMORY)

    monkeypatch.setattr("mlxtune.train.distributed.mx.distributed.all_gather", fails)
    return Workers(NoMessages())


def test_a_gpu_that_fails_in_a_message_is_no_lost_worker(no_messages):
    with pytest.raises(RuntimeError, match=re.escape(faults.MEMORY)):
        no_messages.barrier()


def test_a_failed_gpu_that_sends_no_more_messages_ends_with_its_error(no_messages, monkeypatch):
    monkeypatch.setattr("mlxtune.train.distributed._end_when_told", lambda: None)
    monkeypatch.setattr("mlxtune.train.distributed.end_in_peace", lambda: None)
    with pytest.raises(OutOfMemory, match="at step 2") as caught, no_messages:
        raise OutOfMemory("no memory at step 2")
    assert caught.value.__notes__ == ["  on worker 1 of 2"]


def test_an_error_of_one_that_is_alone_is_its_own():
    with pytest.raises(KeyError) as caught, Workers():
        raise KeyError("x")
    assert not hasattr(caught.value, "__notes__")
