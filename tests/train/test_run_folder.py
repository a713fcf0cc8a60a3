"""What becomes of a run's folder: who may write in it, and what goes on from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlxtune.errors import RecipeError, RunError, StorageError, TrainingDiverged
from mlxtune.train import loop
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.outcome import outcome
from mlxtune.train.run import Run, checkpoints
from mlxtune.train.session import fine_tune


class Notes(Silent):
    def started(self, outline):
        self.notes = outline.notes


class StopAfterSecond(Silent):
    def stepped(self, step):
        if step == 2:
            raise Interrupted(Path("nowhere"))


@pytest.fixture
def begun(recipe, few, tmp_path):
    """A run with a checkpoint, stopped by an error after it."""
    with pytest.raises(Interrupted):
        fine_tune(recipe(few, checkpoint={"steps": 1}), tmp_path / "run", StopAfterSecond())
    return Run(tmp_path / "run")


def test_two_processes_do_not_train_in_one_folder(begun, recipe, few):
    settings = recipe(few, checkpoint={"steps": 1})
    before = sorted(path.name for path in begun.path.rglob("*"))
    with begun.held():
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match="another process is training"):
                fine_tune(settings, begun.path, Silent(), **how)
    assert sorted(path.name for path in begun.path.rglob("*")) == before
    fine_tune(settings, begun.path, Silent(), resume=True)  # it is free again
    assert begun.finished_adapter().is_dir()


def test_what_does_not_reach_the_weights_may_change_while_a_run_is_interrupted(begun, recipe, few):
    other = recipe(
        few, checkpoint={"steps": 1, "keep": 1}, log={"steps": 2}, export={"quantize": "q4_k_m"}
    )
    fine_tune(other, begun.path, Silent(), resume=True)
    assert begun.recipe().export.quantize == "q4_k_m"
    assert [path.name for path in checkpoints(begun.checkpoints)] == ["step-6"]


def test_all_that_has_changed_is_named(begun, recipe, few):
    other = recipe(few, lora={"rank": 8}, train={"learning_rate": 1e-3})
    with pytest.raises(RecipeError) as error:
        fine_tune(other, begun.path, Silent(), resume=True)
    assert "lora.rank was 4 and is 8" in error.value.what
    assert "train.learning_rate was 0.01 and is 0.001" in error.value.what
    assert "checkpoint" not in error.value.what
    assert str(begun.path / "recipe.toml") in error.value.remedy


def test_a_run_killed_before_it_said_that_it_was_finished_says_so(begun, recipe, few):
    settings = recipe(few, checkpoint={"steps": 1})
    fine_tune(settings, begun.path, Silent(), resume=True)
    begun.write_status(status="running")
    with pytest.raises(RunError, match="this run has finished"):
        fine_tune(settings, begun.path, Silent(), resume=True)
    assert begun.status()["status"] == "finished"


def test_other_versions_are_told(begun, recipe, few):
    versions = begun.status()["versions"] | {"mlx": "0.1.2"}
    begun.write_status(versions=versions)
    told = Notes()
    fine_tune(recipe(few, checkpoint={"steps": 1}), begun.path, told, resume=True)
    assert any("begun with mlx 0.1.2" in note for note in told.notes)


def test_a_checkpoint_that_cannot_be_read_now_is_not_thrown_away(begun, recipe, few, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mlxtune.train.checkpoint.sha256", unreadable)
    kept = checkpoints(begun.checkpoints)
    assert kept
    with pytest.raises(RunError, match="cannot be read"):
        fine_tune(recipe(few, checkpoint={"steps": 1}), begun.path, Silent(), resume=True)
    assert checkpoints(begun.checkpoints) == kept


def test_with_no_whole_checkpoint_the_way_out_is_told(begun, recipe, few):
    for path in begun.checkpoints.glob("*/adapter.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="no checkpoint of this run is whole") as error:
        fine_tune(recipe(few, checkpoint={"steps": 1}), begun.path, Silent(), resume=True)
    assert "--overwrite" in error.value.remedy


def test_the_checkpoint_of_the_lowest_held_out_loss_stays(recipe, few, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(loop, "held_out_figures", lambda *_, **__: {"loss": next(losses)})
    settings = recipe(
        few,
        eval={"path": str(few), "max_overlap": 1.0, "steps": 1},
        checkpoint={"steps": 1, "keep": 1},
    )
    run = fine_tune(settings, tmp_path / "run", Silent())
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-2", "step-6"]
    assert run.best_adapter.is_dir()


def test_a_best_loss_between_checkpoints_gets_one_of_its_own(recipe, few, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, 5.0, 6.0])
    monkeypatch.setattr(loop, "held_out_figures", lambda *_, **__: {"loss": next(losses)})
    settings = recipe(
        few,
        eval={"path": str(few), "max_overlap": 1.0, "steps": 2},
        checkpoint={"steps": 5, "keep": 1},
    )
    run = fine_tune(settings, tmp_path / "run", Silent())
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step-2", "step-6"]
    assert outcome(run.metrics()).better_before == 2


def test_a_run_that_ends_at_its_best_has_none_before(recipe, few, tmp_path, monkeypatch):
    losses = iter([4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(loop, "held_out_figures", lambda *_, **__: {"loss": next(losses)})
    run = fine_tune(
        recipe(few, eval={"path": str(few), "max_overlap": 1.0, "steps": 2}),
        tmp_path / "run",
        Silent(),
    )
    assert outcome(run.metrics()).better_before is None


def test_a_run_that_had_too_little_memory_goes_on_with_less_of_it(begun, recipe, few):
    assert begun.status()["checkpointed_blocks"] == []
    told = Notes()
    other = recipe(few, checkpoint={"steps": 1}, train={"gradient_checkpointing": True})
    fine_tune(other, begun.path, told, resume=True)
    assert begun.status()["checkpointed_blocks"] == [0, 1]
    assert any("computed twice" in note for note in told.notes)
    assert begun.recipe().train.gradient_checkpointing is True


def test_a_killed_run_is_not_said_to_be_running(begun):
    begun.write_status(status="running")
    with begun.held():
        assert begun.status()["status"] == "running"
    assert begun.status()["status"] == "interrupted"


def test_where_no_lock_can_tell_a_run_is_as_it_says(begun, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    begun.write_status(status="running")
    monkeypatch.setattr("mlxtune.train.run.fcntl.flock", no_locks)
    assert begun.status()["status"] == "running"


def test_a_run_whose_reader_has_gone_is_interrupted(recipe, few, tmp_path):
    class Gone(Silent):
        def started(self, outline):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fine_tune(recipe(few), tmp_path / "run", Gone())
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"


def test_a_damaged_line_of_metrics_takes_no_other_with_it(begun):
    path = begun.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"step": 1, "lo', *lines[1:]]) + "\n")
    assert [json.dumps(entry) for entry in begun.metrics()] == lines


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_ends_the_run(recipe, few, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(loop, "held_out_figures", lambda *_, **__: {"loss": loss})
    with pytest.raises(TrainingDiverged, match="the held-out loss is"):
        fine_tune(
            recipe(few, eval={"path": str(few), "max_overlap": 1.0}), tmp_path / "run", Silent()
        )


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(recipe, few, tmp_path):
    (tmp_path / "file").write_text("")
    lost = recipe(few, model={"path": str(tmp_path / "no-model")})
    with pytest.raises(StorageError, match="is a file, not a folder"):
        fine_tune(lost, tmp_path / "file/runs/run", Silent())
