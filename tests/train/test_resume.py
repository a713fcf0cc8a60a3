"""Runs that are gone on with: by their folder, beyond their end, and in another place."""

from __future__ import annotations

import json
import shlex
import shutil

import mlx.core as mx
import pytest

from mlxtune.errors import ModelError, RecipeError, RunError
from mlxtune.fuse import fuse_run
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.resume import recipe_of_run
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune, open_run
from mlxtune.train.subject import find_subject
from support.files import write_jsonl
from support.program import mlxtune
from support.runs import StopAt, adapter, losses, same_arrays

STEADY = {"lr_scheduler": "constant", "warmup_steps": 2}


class Notes(Silent):
    def started(self, outline):
        self.notes = outline.notes


def longer(run, **train):
    return recipe_of_run(run, [f"train.{key}={value}" for key, value in train.items()], resume=True)


def test_a_finished_run_of_a_constant_rate_goes_on_as_the_longer_run(recipe, few, tmp_path):
    steady = recipe(
        few,
        train={**STEADY, "max_steps": 3},
        eval={"path": str(few), "max_overlap": 1.0, "steps": 2},
    )
    run = fine_tune(steady, tmp_path / "run", Silent())
    short = adapter(run)
    (run.path / "eval").mkdir()
    told = Notes()
    again = fine_tune(longer(run.path, max_steps=6), run.path, told, resume=True)
    whole = recipe(
        few,
        train={**STEADY, "max_steps": 6},
        eval={"path": str(few), "max_overlap": 1.0, "steps": 2},
    )
    once = fine_tune(whole, tmp_path / "once", Silent())
    assert same_arrays(adapter(again), adapter(once))
    assert losses(again) == losses(once)
    assert again.recipe().train.max_steps == 6 and again.status()["status"] == "finished"
    # What there was is kept.
    assert "what there was after step 3 is kept in adapter-step-3 and eval-step-3" in told.notes
    kept = find_subject(str(run.path), adapter=run.path / "adapter-step-3")
    assert same_arrays(kept.saved().arrays, short)
    assert not (run.path / "eval").exists()


def test_a_run_that_is_stopped_on_its_longer_way_is_not_taken_for_finished(recipe, few, tmp_path):
    steady = recipe(few, train={**STEADY, "epochs": 1.0, "max_steps": 3}, checkpoint={"steps": 1})
    run = fine_tune(steady, tmp_path / "run", Silent())
    with pytest.raises(Interrupted):
        fine_tune(longer(run.path, max_steps=6), run.path, StopAt(4), resume=True)
    with pytest.raises(RunError, match="no adapter yet"):
        find_subject(str(run.path))
    fine_tune(longer(run.path), run.path, Silent(), resume=True)
    assert losses(run)[-1] and [e["step"] for e in run.metrics() if "loss" in e] == [*range(1, 7)]


def test_another_length_of_the_warmup_is_told(recipe, few, tmp_path):
    settings = recipe(few, train={"lr_scheduler": "constant", "warmup_ratio": 0.4, "max_steps": 2})
    run = fine_tune(settings, tmp_path / "run", Silent())
    told = Notes()
    fine_tune(longer(run.path, max_steps=3), run.path, told, resume=True)
    assert not [note for note in told.notes if "train.warmup_ratio" in note]
    fine_tune(longer(run.path, max_steps=5), run.path, told, resume=True)
    assert [note for note in told.notes if "rose over 1 steps" in note and "over 2" in note]


@pytest.mark.parametrize(
    ("train", "more", "why"),
    [
        ({"max_steps": 2}, {"max_steps": 4}, 'lr_scheduler = "cosine"'),
        ({"max_steps": 2}, {}, "nothing to go on with"),
        ({"lr_scheduler": "warmup_stable_decay", "max_steps": 2}, {"max_steps": 4}, "stable"),
    ],
)
def test_a_finished_run_whose_rate_has_ended_says_how_to_train_on(
    recipe, few, tmp_path, train, more, why
):
    fine_tune(recipe(few, train=train), tmp_path / "run", Silent())
    with pytest.raises(RunError, match="has finished") as error:
        fine_tune(longer(tmp_path / "run", **more), tmp_path / "run", Silent(), resume=True)
    assert why in error.value.what
    command = error.value.remedy.partition(": ")[2]
    done = mlxtune(*shlex.split(command)[1:], "--set=train.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Run.open(tmp_path / "run-more").finished_adapter()


def test_a_steady_run_that_has_finished_says_how_it_is_made_longer(recipe, few, tmp_path):
    fine_tune(recipe(few, train={**STEADY, "max_steps": 2}), tmp_path / "run", Silent())
    done = mlxtune("lora", "run", "--resume", cwd=tmp_path)
    assert "mlxtune lora run --resume --set train.max_steps=N" in done.stderr
    done = mlxtune("lora", "run", "--resume", "--set", "train.max_steps=1", cwd=tmp_path)
    assert "has done 2 steps already, and was to go on to step 1" in done.stderr
    assert Run(tmp_path / "run").recipe().train.max_steps == 2
    shutil.rmtree(tmp_path / "run/checkpoints")
    done = mlxtune("lora", "run", "--resume", "--set", "train.max_steps=3", cwd=tmp_path)
    assert "its checkpoints are gone" in done.stderr and "lora.init_from=run" in done.stderr


def test_what_patience_has_ended_is_not_made_longer(recipe, few, tmp_path, monkeypatch):
    values = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(
        "mlxtune.train.loop.held_out_figures", lambda *_, **__: {"loss": next(values)}
    )
    held_out = {"path": str(few), "max_overlap": 1.0, "steps": 1, "patience": 2}
    settings = recipe(few, train={**STEADY, "max_steps": 5}, eval=held_out)
    run = fine_tune(settings, tmp_path / "run", Silent())
    with pytest.raises(RunError, match="ended early"):
        fine_tune(longer(run.path, max_steps=9), run.path, Silent(), resume=True)


@pytest.fixture
def project(tiny_folder, few, tmp_path):
    """A folder with model, template, data and held-out data in it, and a recipe of them."""
    path = tmp_path / "project"
    shutil.copytree(tiny_folder, path / "model")
    lines = few.read_text().splitlines()
    (path / "data").mkdir()
    (path / "data/a.jsonl").write_text("\n".join(lines[:20]))
    (path / "data/b.jsonl").write_text("\n".join(lines[20:28]))
    write_jsonl(path / "held-out.jsonl", map(json.loads, lines[28:32]))
    (path / "template.jinja").write_bytes((path / "model/chat_template.jinja").read_bytes())
    return path


def settings_of(project, **changes):
    values = {
        "name": "t",
        "model": {
            "path": str(project / "model"),
            "chat_template": str(project / "template.jinja"),
        },
        "data": [{"path": str(project / "data/*.jsonl")}],
        "eval": {"path": str(project / "held-out.jsonl")},
        "train": {"batch_size": 4, "max_steps": 4, "gradient_checkpointing": False},
        "checkpoint": {"steps": 1},
        "log": {"steps": 1},
    }
    return parse_recipe(values | changes, where="test")


def test_a_moved_project_is_used_and_resumed_where_it_is(project, tmp_path):
    whole = fine_tune(settings_of(project), project / "runs/whole", Silent())
    with pytest.raises(Interrupted):
        fine_tune(settings_of(project), project / "runs/part", StopAt(2))
    hidden = mx.array([[3, 1, 4]])
    before = open_run(whole.path)[1].model(hidden)
    there = tmp_path / "elsewhere/moved"
    there.parent.mkdir()
    project.rename(there)
    moved = Run(there / "runs/whole")
    assert moved.recipe().data[0].path == str(there / "data/*.jsonl")
    assert moved.recipe().model.path == str(there / "model")
    assert all(
        name in ("model", "tokenizer") or name.startswith(str(there))
        for name in moved.status()["hashes"]
    )
    assert mx.array_equal(open_run(moved.path)[1].model(hidden), before)
    done = mlxtune("eval", "runs/whole", "--max-tokens=2", cwd=there)
    assert done.returncode == 0, done.stderr
    assert fuse_run(there / "runs/whole", tmp_path / "fused").tried_on == "records"
    done = mlxtune("lora", "runs/part", "--resume", cwd=there)
    assert done.returncode == 0, done.stderr
    part = Run(there / "runs/part")
    assert same_arrays(adapter(part), adapter(moved))
    # From here on that is where it is.
    assert str(project) not in (part.path / "recipe.toml").read_text()
    assert part.moved() == {} and not [n for n in part.status()["hashes"] if str(project) in n]


def test_a_moved_run_is_resumed_with_its_recipe_where_that_is_now(project, tmp_path):
    with pytest.raises(Interrupted):
        fine_tune(settings_of(project), project / "runs/t", StopAt(2))
    there = project.rename(tmp_path / "there")
    fine_tune(settings_of(there), there / "runs/t", Silent(), resume=True)
    assert Run(there / "runs/t").finished_adapter()


def test_a_copy_beside_the_original_goes_by_the_original(project, tmp_path):
    run = fine_tune(settings_of(project), project / "runs/t", Silent())
    shutil.copytree(project, tmp_path / "copy")
    assert Run(tmp_path / "copy/runs/t").recipe() == run.recipe()


def test_a_run_goes_on_with_the_same_model_elsewhere_and_with_no_other(project, tmp_path):
    with pytest.raises(Interrupted):
        fine_tune(settings_of(project), project / "runs/t", StopAt(2))
    (project / "model").rename(tmp_path / "its model")
    with pytest.raises(ModelError, match="is not at"):
        find_subject(f"{project / 'runs/t'}@step-2").load()
    shutil.copytree(tmp_path / "its model", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    resume = ("lora", "runs/t", "--resume", "--model")
    done = mlxtune(*resume, str(tmp_path / "other"), cwd=project)
    assert done.returncode == 1 and "model has changed since the run began" in done.stderr
    done = mlxtune(*resume, str(tmp_path / "its model"), cwd=project)
    assert done.returncode == 0, done.stderr
    done = mlxtune("chat", "runs/t", "-p", "x", "--max-tokens=2", cwd=project)
    assert done.returncode == 0, done.stderr


def test_a_run_whose_data_is_gone_is_fused_all_the_same(project, tmp_path):
    fine_tune(settings_of(project), project / "runs/t", Silent())
    shutil.rmtree(project / "data")
    (project / "held-out.jsonl").unlink()
    assert fuse_run(project / "runs/t", tmp_path / "fused").tried_on == "records"
    (project / "runs/t/held-out.jsonl").unlink()  # of a run that held nothing out
    assert fuse_run(project / "runs/t", tmp_path / "other").tried_on == "texts"


def test_a_changed_recipe_is_refused_as_before(project):
    with pytest.raises(Interrupted):
        fine_tune(settings_of(project), project / "runs/t", StopAt(2))
    six = longer(project / "runs/t", max_steps=6)
    with pytest.raises(RecipeError, match=r"train\.max_steps was 4 and is 6"):
        fine_tune(six, project / "runs/t", Silent(), resume=True)
