"""A run whose GPU fails: what is said, what its folder says, and that the remedy works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mlxtune.adapters.saved import load_arrays
from mlxtune.recipe.load import dump_recipe
from mlxtune.report.collect import read_run
from mlxtune.report.page import page
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run, checkpoints
from mlxtune.train.session import fine_tune
from support import faults
from support.faults import Failing
from support.files import SHELL_HELDOUT
from support.program import mlxtune
from support.runs import adapter, losses, same_arrays

HELD_OUT = {"path": str(SHELL_HELDOUT), "max_samples": 4, "steps": 3}


def settling(step: int) -> tuple[str, int]:
    """Where the loss of a step is waited for: two numbers are looked at for each."""
    return "mlxtune.train.loop:scalar", 2 * step - 1


def beginning(step: int) -> tuple[str, int]:
    """Where the arrays of a step are allocated."""
    return "mlxtune.train.step:TrainStep.__call__", step


@pytest.fixture
def world(recipe, few, tmp_path):
    """A folder with a recipe, some of it changed."""

    def make(**sections) -> Path:
        given = {"name": "run", "checkpoint": {"steps": 2, "keep": 3}} | sections
        (tmp_path / "recipe.toml").write_text(dump_recipe(recipe(few, **given)))
        return tmp_path

    return make


def fails(world: Path, place: tuple[str, int], text: str, *arguments: str) -> str:
    """What the program says where its GPU fails."""
    arguments = arguments or ("recipe.toml",)
    done = mlxtune("lora", *arguments, cwd=world, fault=Failing(*place, text))
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: runs/run: "), done.stderr
    assert done.stderr.count("error: ") == 1, "it is told once"
    assert "Traceback" not in done.stderr and "bug in mlxtune" not in done.stderr
    assert text in done.stderr or not text, "what can be looked up is kept"
    return done.stderr


def command(said: str) -> list[str]:
    """Arguments of the command that is to be typed."""
    (line,) = [line for line in said.splitlines() if " lora " in line]
    return shlex.split(line.partition(" lora ")[2])


def run_of(world: Path) -> Run:
    return Run.open(world / "runs/run")


SLOW = pytest.mark.slow


def nothing_half_written(run: Run) -> bool:
    return not [path for path in run.path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        pytest.param(settling(4), faults.MEMORY, id="when it is waited for"),
        pytest.param(beginning(4), faults.MALLOC, id="when it is begun", marks=SLOW),
        pytest.param(settling(4), faults.RESOURCES, id="too many arrays", marks=SLOW),
        pytest.param(settling(4), "", id="MemoryError", marks=SLOW),
    ],
)
def test_a_run_out_of_memory_says_so_and_goes_on_as_it_is_told(world, place, text):
    folder = world()
    said = fails(folder, place, text)
    assert " at step 4: " in said or " at step 4, " in said
    run = run_of(folder)
    status = run.status()
    assert (status["status"], status["error"]) == ("failed", "out of memory")
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-2"]
    assert not run.adapter.exists() and nothing_half_written(run)
    typed = command(said)
    assert typed[:2] == ["runs/run", "--resume"]
    done = mlxtune("lora", *typed, cwd=folder)
    assert done.returncode == 0, done.stderr
    status = run.status()
    assert (status["status"], status["error"]) == ("finished", None)
    # Of memory that is the machine's own, blocks that are computed twice would save little.
    assert status["checkpointed_blocks"] == ([0, 1] if text else [])
    assert [e["step"] for e in run.metrics() if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_without_a_checkpoint_it_begins_again(world, recipe, few, tmp_path):
    folder = world()
    said = fails(folder, settling(1), faults.MEMORY)
    assert " at step 1: " in said
    run = run_of(folder)
    assert not checkpoints(run.checkpoints)
    done = mlxtune("lora", *command(said), cwd=folder)
    assert done.returncode == 0, done.stderr
    settings = recipe(few, train={"gradient_checkpointing": True})
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    assert losses(run) == losses(straight)
    assert same_arrays(adapter(run), adapter(straight))


@pytest.mark.slow
def test_each_remedy_is_another_until_one_is_enough(world):
    """More blocks computed twice, then a smaller limit, then smaller passes."""
    folder = world()
    said = fails(folder, settling(3), faults.MEMORY)
    assert "--resume --set train.gradient_checkpointing=true" in said
    said = fails(folder, settling(1), faults.MEMORY, *command(said))
    assert " at step 3: " in said, "it went on after step 2"
    assert re.search(r"--resume --set train\.memory_limit=\d", said)
    said = fails(folder, settling(1), faults.MEMORY, *command(said))
    assert "--set train.batch_size=2 --set train.gradient_accumulation_steps=2" in said
    done = mlxtune("lora", *command(said), cwd=folder)
    assert done.returncode == 0, done.stderr
    train = run_of(folder).recipe().train
    assert (train.batch_size, train.gradient_accumulation_steps) == (2, 2)
    assert train.gradient_checkpointing is True


def test_an_array_too_large_needs_smaller_passes(world):
    """Blocks that are computed twice leave each array as large as it is."""
    said = fails(world(), beginning(1), faults.BUFFER)
    assert "--set train.batch_size=2 --set train.gradient_accumulation_steps=2" in said
    assert run_of(world()).status()["error"] == "out of memory"


def test_with_the_smallest_passes_the_plan_is_named(world):
    folder = world(train={"batch_size": 1})
    said = fails(folder, beginning(1), faults.BUFFER)
    assert " plan runs/run/recipe.toml" in said
    done = mlxtune("plan", "runs/run/recipe.toml", cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "said_of_it", "in_short"),
    [
        (faults.WATCHDOG, "let the display sleep", "stopped by macOS"),
        (faults.TIMEOUT, "MLX_MAX_OPS_PER_BUFFER=", "the GPU took too long"),
        (faults.PAGE_FAULT, "go on: ", "Caused GPU Address Fault Error"),
    ],
    ids=["watchdog", "timeout", "another"],
)
def test_other_failures_of_the_gpu_are_gone_on_from_unchanged(world, text, said_of_it, in_short):
    folder = world()
    said = fails(folder, settling(3), text)
    assert " at step 3" in said and said_of_it in said
    status = run_of(folder).status()
    assert status["status"] == "failed" and in_short in status["error"]
    typed = command(said)
    assert typed == ["runs/run", "--resume"]
    assert mlxtune("lora", *typed, cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("call", "said_of_it"), [(1, "was measured before training"), (7, "was measured after step 3")]
)
def test_the_held_out_loss_is_a_place_of_its_own(world, call, said_of_it):
    """Four samples a measurement, in one pass: with the last wait two numbers are looked at."""
    folder = world(eval=HELD_OUT, train={"batch_size": 1})
    said = fails(folder, ("mlxtune.train.heldout:scalar", call), faults.MEMORY)
    assert f"while the held-out loss {said_of_it}" in said
    assert "gradient_checkpointing" not in said, "there was no backward pass"
    done = mlxtune("lora", *command(said), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert run_of(folder).recipe().train.memory_limit is not None


def test_a_checkpoint_that_cannot_be_computed_leaves_the_one_before(world):
    folder = world()
    said = fails(folder, ("mlxtune.train.checkpoint:save_arrays", 3), faults.MEMORY)
    assert "while the adapter was saved after step 4" in said
    run = run_of(folder)
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-2"]
    assert nothing_half_written(run)


def test_an_adapter_that_memory_does_not_hold_is_not_called_damaged(tiny_run, monkeypatch):
    def full(_arrays):
        raise RuntimeError(faults.MEMORY)

    monkeypatch.setattr("mlxtune.adapters.saved.mx.eval", full)
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        load_arrays(tiny_run / "adapter/adapters.safetensors")


def test_why_a_run_failed_is_told_wherever_its_status_is(world):
    folder = world()
    fails(folder, settling(3), faults.MEMORY)
    told = "failed: out of memory"
    done = mlxtune("fuse", "runs/run", "-o", "out", cwd=folder)
    assert done.returncode == 1 and told in done.stderr
    assert told in page([read_run(folder / "runs/run")])
    done = mlxtune("report", "runs/run", "--json", cwd=folder)
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["status"], run["error"]) == ("failed", "out of memory")


@pytest.mark.parametrize(
    "place",
    [
        "mlxtune.train.session:adapted_model",
        # Where other errors mean that a model, a folder or a plan is not as it should be.
        "mlxtune.models.heads:scalar",
        "mlxtune.models.enable:_logits",
        "mlx_lm.utils:load_tokenizer",
        "mlxtune.bench.forecast:this_machine",
    ],
)
def test_before_there_is_a_run_nothing_is_written(world, place):
    folder = world()
    before = sorted(folder.rglob("*"))
    fault = Failing(place, 1, faults.MEMORY)
    done = mlxtune("lora", "recipe.toml", cwd=folder, fault=fault)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the GPU ran out of memory"), done.stderr
    assert " plan` says what each change of the recipe would save" in done.stderr
    assert sorted(folder.rglob("*")) == before
