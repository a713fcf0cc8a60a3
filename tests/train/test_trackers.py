"""Trackers are told what metrics.jsonl holds: read back with their own libraries."""

from __future__ import annotations

import json
import struct
import sys

import pytest

from mlxtune.errors import MlxtuneError, RecipeError
from mlxtune.install import install_extra
from mlxtune.recipe.load import dump_recipe, load_recipe, parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support.files import SHELL_TRAIN, write_jsonl
from support.program import mlxtune, wait_until

TRAIN_NAMES = {
    "train/epoch", "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens",
    "train/supervised_tokens", "train/examples", "train/tokens_per_second",
    "train/examples_per_second", "train/peak_memory_bytes", "train/seconds",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_stores_elsewhere(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    """A recipe for six steps, reported to the trackers named."""
    lines = SHELL_TRAIN.read_text().splitlines()[::42]
    few = write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", map(json.loads, lines))

    def make(*trackers: str, **train):
        values = {
            "name": "told",
            "model": {"path": str(tiny_folder)},
            "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
            "data": [{"path": str(few)}],
            "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2} | train,
            "eval": {"val_size": 4, "steps": 3},
            "checkpoint": {"steps": 2},
            "log": {"steps": 1, "report_to": list(trackers)},
        }
        return parse_recipe(values, where="test")

    return make


class Stopping(Silent):
    """Ends the run at a step, as a crash or Ctrl-C does."""

    def __init__(self, error: type[BaseException], step: int = 5) -> None:
        self._error, self._step = error, step

    def reported(self, report):
        if report.step == self._step:
            raise self._error


def told(run: Run) -> dict[str, dict[int, float]]:
    """What trackers should hold: name, step, figure."""
    want: dict[str, dict[int, float]] = {}
    for entry in run.metrics():
        if "held_out_loss" in entry:
            want.setdefault("eval/loss", {})[entry["step"]] = entry["held_out_loss"]
        else:
            for key in entry.keys() - {"step"}:
                want.setdefault(f"train/{key}", {})[entry["step"]] = entry[key]
    return want


def events(run: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    return found.Reload()


def client(run: Run):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{run.path}/mlruns/mlflow.db")


def mlflow_run(run: Run):
    """The only run of the store."""
    store = client(run)
    [experiment] = [e for e in store.search_experiments() if e.name == "mlxtune"]
    [found] = store.search_runs([experiment.experiment_id])
    return found


def test_tensorboard_and_mlflow_hold_what_was_reported(recipe, tmp_path):
    run = fine_tune(recipe("tensorboard", "mlflow"), tmp_path / "run", Silent())
    want = told(run)
    assert want.keys() == TRAIN_NAMES | {"eval/loss"}
    board = events(run)
    assert set(board.Tags()["scalars"]) == set(want)
    for name, figures in want.items():
        got = {event.step: event.value for event in board.Scalars(name)}
        assert got == pytest.approx(figures, rel=1e-6)
    [recipe_text] = board.Tensors("recipe/text_summary")
    assert "learning_rate = 0.01" in recipe_text.tensor_proto.string_val[0].decode()
    found, store = mlflow_run(run), client(run)
    for name, figures in want.items():
        history = store.get_metric_history(found.info.run_id, name)
        assert {m.step: m.value for m in history} == figures
        assert len(history) == len(figures)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "told")
    params = found.data.params
    assert params["train.learning_rate"] == "0.01" and params["lora.rank"] == "2"
    assert params["model.path"] == run.recipe().model.path
    assert params["lora.target_modules.1"] == "v_proj"
    assert run.status()["trackers"] == {"mlflow": found.info.run_id}


def test_a_run_that_is_resumed_is_the_same_run_to_them(recipe, tmp_path):
    path, asked = tmp_path / "run", recipe("tensorboard", "mlflow")
    with pytest.raises(RuntimeError):
        fine_tune(asked, path, Stopping(RuntimeError, step=3))
    run = Run(path)
    first = mlflow_run(run)
    assert (run.status()["status"], first.info.status) == ("failed", "FAILED")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(asked, path, Stopping(KeyboardInterrupt, step=5), resume=True)
    assert (run.status()["status"], mlflow_run(run).info.status) == ("interrupted", "KILLED")
    fine_tune(asked, path, Silent(), resume=True)
    assert mlflow_run(run).info.run_id == first.info.run_id
    assert mlflow_run(run).info.status == "FINISHED"
    want, board = told(run), events(run)
    assert set(want["train/loss"]) == set(range(1, 7))
    for name in ("train/loss", "eval/loss"):
        # Steps after the checkpoint were run again; what was told of them first is purged.
        got = [(event.step, event.value) for event in board.Scalars(name)]
        assert sorted(step for step, _ in got) == sorted(want[name])
        assert dict(got) == pytest.approx(want[name], rel=1e-6)
        history = client(run).get_metric_history(first.info.run_id, name)
        assert {m.step: m.value for m in history} == want[name]


def test_mlflow_goes_where_its_variables_say(recipe, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shell")
    run = fine_tune(recipe("mlflow", max_steps=1), tmp_path / "run", Silent())
    found = MlflowClient(tracking_uri=store).get_run(run.status()["trackers"]["mlflow"])
    assert found.data.metrics["train/loss"] == told(run)["train/loss"][1]
    assert not (run.path / "mlruns").exists()


def test_a_store_that_cannot_be_reached_is_told_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nope/x.db")
    (tmp_path / "nope").write_text("a file")
    with pytest.raises(MlxtuneError, match=r"log\.report_to: mlflow cannot log this run"):
        fine_tune(recipe("mlflow"), tmp_path / "run", Silent())
    assert Run(tmp_path / "run").status()["status"] == "failed"


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_a_library_that_is_missing_is_told_before_anything_is_written(
    recipe, tmp_path, monkeypatch, tracker
):
    module = {"tensorboard": "tensorboardX"}.get(tracker, tracker)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MlxtuneError) as caught:
        fine_tune(recipe(tracker), tmp_path / "run", Silent())
    assert caught.value.where == "log.report_to"
    assert caught.value.remedy == install_extra(tracker)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_no_library(recipe, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MlxtuneError, match="wandb is not installed"):
        fine_tune(recipe("wandb"), tmp_path / "run", Silent())


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_stop_the_run(recipe, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    def refuse(self, run_id, metrics=(), params=(), tags=()):
        if metrics:
            raise OSError("the server has gone\nand more")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    with pytest.warns(UserWarning, match="mlflow gets no more figures: the server has gone$"):
        run = fine_tune(recipe("mlflow", "tensorboard"), tmp_path / "run", Silent())
    assert run.status()["status"] == "finished"
    assert len(events(run).Scalars("train/loss")) == 6


def wandb_records(path):
    """What wandb keeps of a run: a header, then (checksum, size, kind, record) each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at = path.read_bytes(), 7
    while at < len(data):
        _, size, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1  # whole: none is divided in a file below 32 KiB
        yield Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size


@pytest.mark.slow
def test_wandb_offline(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = fine_tune(recipe("wandb", max_steps=2), tmp_path / "run", Silent())
    [folder] = (run.path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run.status()["trackers"]["wandb"])
    [log] = folder.glob("*.wandb")
    # wandb writes in a process of its own, which on a busy machine comes after us.
    wait_until(lambda: any(record.HasField("exit") for record in wandb_records(log)))
    import wandb

    wandb.teardown()  # its process
    records = list(wandb_records(log))
    got: dict[str, dict[int, float]] = {}
    for record in records:
        items = {item.nested_key[0]: float(item.value_json) for item in record.history.item}
        for name in items.keys() & (TRAIN_NAMES | {"eval/loss"}):
            got.setdefault(name, {})[int(items["_step"])] = items[name]
    assert got == told(run)
    [begun] = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert begun.display_name == "told" and config["train.learning_rate"] == "0.01"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def test_report_to_takes_one_or_a_list(tmp_path):
    path = tmp_path / "recipe.toml"
    text = '[model]\npath = "m"\n[[data]]\npath = "d"\n[log]\nreport_to = '
    for written, read in (
        ('"mlflow"', ("mlflow",)),
        ('["tensorboard", "wandb"]', ("tensorboard", "wandb")),
        ("[]", ()),
        ('"none"', ()),
    ):
        path.write_text(text + written)
        assert load_recipe(path).log.report_to == read
    assert load_recipe(path, ["log.report_to=tensorboard"]).log.report_to == ("tensorboard",)
    for written, said in (
        ('["comet"]', "tensorboard"),
        ("3", "list"),
    ):
        path.write_text(text + written)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        [problem] = caught.value.problems
        assert problem.where.startswith("log.report_to") and said in str(problem)


@pytest.mark.slow
def test_trackers_say_nothing_in_a_terminal(recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe("tensorboard", "mlflow", max_steps=1)))
    done = mlxtune("lora", "recipe.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mlflow" not in done.stdout and "ensor" not in done.stdout
    names = {p.name for p in (tmp_path / "runs/told").iterdir()}
    assert {"tensorboard", "mlruns"} <= names
    # A resolved recipe goes round.
    assert load_recipe(tmp_path / "runs/told/recipe.toml").log.report_to == (
        "tensorboard",
        "mlflow",
    )
