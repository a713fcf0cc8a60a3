"""Training for real: it learns, it stops, it goes on exactly, it says when it can't."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtune.adapters.peft import write_peft
from mlxtune.adapters.saved import load_arrays
from mlxtune.adapters.store import read_adapter
from mlxtune.arrays import flat
from mlxtune.errors import OutOfMemory, OutputExists, RecipeError, RunError, TrainingDiverged
from mlxtune.fuse import fuse_run
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.run import Run, checkpoints
from mlxtune.train.session import fine_tune
from support.files import SHELL_HELDOUT, write_jsonl
from support.models import QWEN3_5, SMOLLM2, tiny
from support.process import HANGS
from support.program import running, wait_until
from support.runs import StopAt, adapter, losses, same_arrays

REPORT_KEYS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens",
    "examples", "tokens_per_second", "examples_per_second", "peak_memory_bytes", "seconds",
}  # fmt: skip


def held_out_losses(run):
    return [e["held_out_loss"] for e in run.metrics() if "held_out_loss" in e]


@pytest.mark.slow
def test_a_run_halves_the_held_out_loss(shell_run):
    first, *_, last = held_out_losses(Run.open(shell_run))
    assert last < 0.5 * first


def test_a_run_learns_and_leaves_what_the_design_says(brief_run):
    run = Run.open(brief_run)
    first, *_, last = held_out_losses(run)
    assert last < 0.8 * first
    reports = [e for e in run.metrics() if "loss" in e]
    assert [e["step"] for e in reports] == [2, 4, 6]
    assert all(e.keys() == REPORT_KEYS for e in reports)
    assert reports[-1]["examples"] == 6 * 3
    status = run.status()
    assert status["status"] == "finished"
    assert set(status) >= {"versions", "device", "hashes", "seed"}
    names = {p.name for p in brief_run.iterdir()}
    assert names >= {"recipe.toml", "run.json", "metrics.jsonl", "checkpoints", "adapter"}
    assert run.recipe().train.max_steps == 6


def test_packed_and_padded_batches_train_alike(recipe, few, tmp_path):
    packed = fine_tune(recipe(few), tmp_path / "packed", Silent())
    padded = fine_tune(recipe(few, train={"packing": False}), tmp_path / "padded", Silent())
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)


def test_accumulation_is_the_same_mathematics(recipe, few, tmp_path):
    whole = fine_tune(recipe(few, train={"max_steps": 3}), tmp_path / "whole", Silent())
    parts = {"max_steps": 3, "batch_size": 1, "gradient_accumulation_steps": 4}
    parted = fine_tune(recipe(few, train=parts), tmp_path / "parted", Silent())
    assert losses(whole) == pytest.approx(losses(parted), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"lora": {"dropout": 0.5}},
        {"lora": {"rslora": True}},
        {"lora": {"layers": 1}},
        {"lora": {"layers": [0]}},
        {"lora": {"target_modules": ["*.self_attn.*"]}},
        {"lora": {"exclude_modules": ["down_proj"]}},
        {"lora": {"dora": True}},
        {"train": {"optimizer": "adafactor"}},
        {"train": {"optimizer": "lion"}},
        {"train": {"optimizer": "muon"}},
        {"train": {"optimizer": "sgd"}},
        {"train": {"adam_bias_correction": False}},
        {"train": {"lora_plus_ratio": 4.0}},
        {"train": {"lr_scheduler": "constant"}},
        {"train": {"lr_scheduler": "warmup_stable_decay", "decay_ratio": 0.5}},
        {"train": {"lr_scheduler": "linear"}},
        {"train": {"warmup_ratio": 0.5}},
        {"train": {"warmup_steps": 4}},
        {"train": {"min_lr_ratio": 0.5}},
        {"train": {"weight_decay": 0.5}},
        {"train": {"max_grad_norm": 0.01}},
        {"train": {"adam_beta1": 0.5}},
        {"train": {"adam_beta2": 0.9}},
        {"train": {"adam_epsilon": 1e-3}},
        {"train": {"neftune_noise_alpha": 5.0}},
        {"seed": 1},
    ],
    ids=str,
)
def test_each_option_has_an_effect(recipe, change, few, tmp_path, three_steps):
    settings = change | {"train": THREE | change.get("train", {})}
    other = fine_tune(recipe(few, **settings), tmp_path / "other", Silent())
    assert not same_arrays(adapter(other), three_steps)


def test_moments_of_a_byte_are_kept_in_bytes(recipe, few, tmp_path):
    """Of matrices that are large enough to be worth it."""
    settings = recipe(few, lora={"rank": 64}, train={"optimizer": "adamw_8bit", "max_steps": 2})
    run = fine_tune(settings, tmp_path / "run", Silent())
    [saved] = checkpoints(run.checkpoints)
    arrays = load_arrays(saved / "optimizer.safetensors")
    in_bytes = sum(array.nbytes for array in arrays.values() if array.dtype == mx.uint8)
    trained = sum(array.nbytes for array in adapter(run).values())
    assert in_bytes > 0.4 * trained  # both moments: two bytes for each weight of four


THREE = {"max_steps": 3}


@pytest.fixture(scope="module")
def three_steps(recipe, few, tmp_path_factory):
    path = tmp_path_factory.mktemp("three") / "run"
    return adapter(fine_tune(recipe(few, train=THREE), path, Silent()))


@pytest.fixture(scope="module")
def plain_adapter(recipe, few, tmp_path_factory):
    run = fine_tune(recipe(few), tmp_path_factory.mktemp("plain") / "run", Silent())
    return adapter(run)


def test_the_same_recipe_gives_the_same_bits(recipe, few, tmp_path, plain_adapter):
    again = fine_tune(recipe(few), tmp_path / "again", Silent())
    assert same_arrays(adapter(again), plain_adapter)


@pytest.mark.parametrize("wired", [True, False])
def test_weights_are_wired_unless_the_recipe_says_otherwise(
    wired, recipe, few, tmp_path, monkeypatch
):
    budgets = []
    monkeypatch.setattr("mlxtune.train.session.wire_weights", budgets.append)
    train = {"wired_memory": wired, "memory_limit": 3, "max_steps": 1}
    fine_tune(recipe(few, train=train), tmp_path / "run", Silent())
    assert budgets == ([3_000_000_000] if wired else [])


def test_what_mlx_keeps_of_freed_memory_is_bounded_by_a_step(recipe, few, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    # A budget that nothing is left of: then it is what a step needs, and no more.
    train = {"memory_limit": 0.001, "gradient_checkpointing": False}
    run = fine_tune(recipe(few, log={"steps": 1}, train=train), tmp_path / "run", Silent())
    peaks = [entry["peak_memory_bytes"] for entry in run.metrics() if "loss" in entry]
    assert len(limits) == len(peaks) > 1
    assert all(0 < limit < peak for limit, peak in zip(limits, peaks, strict=True))


def test_a_run_begins_where_an_adapter_is(recipe, few, tmp_path):
    first = fine_tune(recipe(few, lora={"dora": True}), tmp_path / "first", Silent())
    # Of the run, and of its adapter in PEFT's layout; a rate of almost nothing keeps it.
    (tmp_path / "peft").mkdir()
    write_peft(tmp_path / "peft", read_adapter(first.adapter))
    for number, start in enumerate((first.path, tmp_path / "peft")):
        lora = {"dora": True, "init_from": str(start)}
        again = fine_tune(
            recipe(few, lora=lora, train={"learning_rate": 1e-30, "max_steps": 1}),
            tmp_path / str(number),
            Silent(),
        )
        got, want = adapter(again), adapter(first)
        assert got.keys() == want.keys()
        assert all(mx.allclose(got[n], want[n], rtol=1e-6, atol=1e-9).item() for n in want)
        (weights,) = (p for p in again.status()["hashes"] if "adapter" in Path(p).name)
        assert Path(weights).is_relative_to(start)


def test_a_run_that_began_with_an_adapter_goes_on_without_it(recipe, few, tmp_path):
    first = fine_tune(recipe(few), tmp_path / "first", Silent())
    begun = recipe(few, lora={"init_from": str(first.path)}, checkpoint={"steps": 3})
    want = fine_tune(begun, tmp_path / "whole", Silent())
    with pytest.raises(Interrupted):
        fine_tune(begun, tmp_path / "parts", StopAt(4))
    shutil.rmtree(first.path)
    again = fine_tune(begun, tmp_path / "parts", Silent(), resume=True)
    assert same_arrays(adapter(again), adapter(want))


def test_an_adapter_to_begin_with_is_looked_at_first(recipe, few, tmp_path):
    broken = recipe(few, lora={"init_from": str(tmp_path)}, model={"path": str(tmp_path / "no")})
    with pytest.raises(RunError, match="no readable adapter") as caught:
        fine_tune(broken, tmp_path / "run", Silent())
    assert caught.value.where == str(tmp_path)
    assert not (tmp_path / "run").exists()


def test_dora_on_packed_weights_is_interrupted_resumed_and_fused(recipe, few, tmp_path):
    settings = recipe(
        few,
        model={"quantize": 4, "quantized_matmul": "expand"},
        lora={"dora": True, "dropout": 0.2},
        train={"gradient_checkpointing": True, "max_steps": 4, "lora_plus_ratio": 4.0},
        checkpoint={"steps": 2},
    )
    want = fine_tune(settings, tmp_path / "whole", Silent())
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "parts", StopAt(2))
    again = fine_tune(settings, tmp_path / "parts", Silent(), resume=True)
    assert same_arrays(adapter(again), adapter(want))
    assert losses(again) == losses(want)
    assert sum(name.endswith(".m") for name in adapter(again)) == 14
    report = fuse_run(again.path, tmp_path / "fused", dtype="float32")
    assert report.max_logit_difference < 1e-3 and report.top1_agreement == 1


@pytest.mark.parametrize(
    ("change", "twice"),
    [
        ({"gradient_checkpointing": True}, [0, 1]),
        ({"gradient_checkpointing": 2}, [0]),
        ({"gradient_checkpointing": "auto", "memory_limit": 0.001}, [0, 1]),
        ({"gradient_checkpointing": "auto"}, []),
    ],
    ids=str,
)
def test_gradient_checkpointing_changes_nothing(
    recipe, few, tmp_path, plain_adapter, change, twice
):
    run = fine_tune(recipe(few, train=change), tmp_path / "run", Silent())
    assert run.status()["checkpointed_blocks"] == twice
    got = adapter(run)
    for name, want in plain_adapter.items():
        assert mx.allclose(got[name], want, rtol=1e-3, atol=1e-5).item(), name


def test_interrupted_and_resumed_is_the_uninterrupted_run(recipe, few, tmp_path):
    settings = recipe(
        few,
        lora={"dropout": 0.1},
        train={"neftune_noise_alpha": 5.0},
        checkpoint={"steps": 2},
        eval={"path": str(few), "max_overlap": 1.0, "steps": 3},
    )
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "stopped", StopAt(3))
    stopped = Run.open(tmp_path / "stopped")
    assert stopped.status()["status"] == "interrupted"
    with pytest.raises(RunError, match="no adapter yet"):
        stopped.finished_adapter()
    fine_tune(settings, tmp_path / "stopped", Silent(), resume=True)
    assert losses(stopped) == losses(straight)
    assert same_arrays(adapter(stopped), adapter(straight))
    assert [p.name for p in sorted(stopped.checkpoints.iterdir())] == ["step-4", "step-6"]


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_the_uninterrupted_run(recipe, few, tmp_path, kills):
    """SIGKILL at random moments; MLXTUNE_KILLS=100 for more of them."""
    kills = int(os.environ.get("MLXTUNE_KILLS", kills))
    path, file = tmp_path / "killed", tmp_path / "t.toml"
    settings = recipe(
        few,
        checkpoint={"steps": 1},
        lora={"dropout": 0.1},
        train={"max_steps": 15 * (kills + 1)},
        eval={"path": str(few), "max_overlap": 1.0, "max_samples": 2, "steps": 15},
    )
    from mlxtune.recipe.load import dump_recipe

    file.write_text(dump_recipe(settings))
    moments = random.Random(0)
    reached = []
    for number in range(kills):
        before = latest_checkpoint(path)
        resume = ["--resume"] if number else []
        with running("lora", str(file), "-o", str(path), *resume, cwd=tmp_path) as process:
            wait_until(lambda before=before: latest_checkpoint(path) != before, process)
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
            assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        reached.append(latest_checkpoint(path))
    assert reached == sorted(set(reached))
    run = fine_tune(settings, path, Silent(), resume=True)
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    assert losses(run) == losses(straight)
    assert same_arrays(adapter(run), adapter(straight))


def latest_checkpoint(run: Path) -> int:
    found = checkpoints(run / "checkpoints")
    return int(found[-1].name[5:]) if found else 0


@pytest.fixture(scope="module")
def with_dropout(recipe, few, tmp_path_factory):
    """A recipe that keeps its last checkpoints, and its whole run."""
    settings = recipe(few, lora={"dropout": 0.1}, checkpoint={"steps": 1, "keep": 3})
    path = tmp_path_factory.mktemp("straight") / "run"
    return settings, fine_tune(settings, path, Silent())


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(with_dropout, tmp_path, file):
    settings, straight = with_dropout
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "run", StopAt(3))
    run = Run.open(tmp_path / "run")
    damaged = run.checkpoints / "step-3" / file
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1  # of the same length, and still a safetensors file
    damaged.write_bytes(data)

    class Told(Silent):
        def started(self, outline):
            self.outline = outline
            self.found = [p.name for p in checkpoints(run.checkpoints)]

    told = Told()
    fine_tune(settings, tmp_path / "run", told, resume=True)
    assert told.outline.first_step == 2
    assert any("step-3 is damaged" in note for note in told.outline.notes)
    assert told.found == ["step-1", "step-2"]
    assert losses(run) == losses(straight)
    assert same_arrays(adapter(run), adapter(straight))


def test_a_step_that_was_altered_is_damage(recipe, few, tmp_path):
    settings = recipe(few, checkpoint={"steps": 1, "keep": 3})
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "run", StopAt(3))
    run = Run.open(tmp_path / "run")
    state = run.checkpoints / "step-3/state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps(values | {"step": 2}))
    fine_tune(settings, tmp_path / "run", Silent(), resume=True)
    assert [e["step"] for e in run.metrics() if "loss" in e] == [1, 2, 3, 4, 5, 6]


class Dies(Silent):
    """As a run that is killed: no checkpoint is written."""

    def stepped(self, step):
        if step == 2:
            raise MemoryError


def test_a_run_killed_before_its_first_checkpoint_begins_as_it_did(recipe, few, tmp_path):
    first = fine_tune(recipe(few), tmp_path / "first", Silent())
    settings = recipe(
        few,
        lora={"init_from": str(first.path), "dropout": 0.1},
        eval={"path": str(few), "max_overlap": 1.0, "max_samples": 2, "steps": 3},
    )
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    with pytest.raises(OutOfMemory):
        fine_tune(settings, tmp_path / "run", Dies())
    run = fine_tune(settings, tmp_path / "run", Silent(), resume=True)
    assert losses(run) == losses(straight)
    steps = [[e["step"] for e in r.metrics() if "held_out_loss" in e] for r in (run, straight)]
    assert steps[0] == steps[1] == [0, 3, 6]
    assert same_arrays(adapter(run), adapter(straight))


def test_reports_span_a_resume(recipe, few, tmp_path):
    settings = recipe(few, log={"steps": 4})
    straight = fine_tune(settings, tmp_path / "straight", Silent())
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "run", StopAt(3))
    run = fine_tune(settings, tmp_path / "run", Silent(), resume=True)
    assert [e["step"] for e in run.metrics() if "loss" in e] == [4, 6]
    assert losses(run) == losses(straight)


def test_a_run_whose_checkpoints_are_all_damaged_is_told(recipe, few, tmp_path):
    settings = recipe(few, checkpoint={"steps": 1, "keep": 2})
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "run", StopAt(2))
    for path in (tmp_path / "run/checkpoints").glob("*/adapter.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="is not what was written"):
        fine_tune(settings, tmp_path / "run", Silent(), resume=True)


def test_training_stops_when_the_held_out_loss_gets_no_better(recipe, few, tmp_path):
    """At a rate that changes nothing the first measurement stays the best."""
    settings = recipe(
        few,
        train={"learning_rate": 1e-30, "max_steps": 30},
        eval={"path": str(few), "max_overlap": 1.0, "steps": 1, "patience": 3},
    )
    run = fine_tune(settings, tmp_path / "run", Silent())
    measured = [e["held_out_loss"] for e in run.metrics() if "held_out_loss" in e]
    assert len(measured) == 4 and len(set(measured)) == 1
    assert run.finished_adapter().is_dir()
    assert run.status()["status"] == "finished"
    # Killed after its last checkpoint and before the adapter was written.
    shutil.rmtree(run.adapter)
    fine_tune(settings, tmp_path / "run", Silent(), resume=True)
    assert run.finished_adapter().is_dir()
    assert [e["step"] for e in run.metrics() if "loss" in e] == [1, 2, 3]


def test_the_last_steps_before_an_early_stop_are_reported(recipe, few, tmp_path):
    settings = recipe(
        few,
        train={"learning_rate": 1e-30, "max_steps": 30},
        eval={"path": str(few), "max_overlap": 1.0, "max_samples": 2, "steps": 1, "patience": 3},
        log={"steps": 10},
    )
    run = fine_tune(settings, tmp_path / "run", Silent())
    assert [e["step"] for e in run.metrics() if "loss" in e] == [3]


def test_resuming_with_another_recipe_or_other_data_is_refused(recipe, few, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [json.loads(x) for x in few.read_text().splitlines()])
    with pytest.raises(Interrupted):
        fine_tune(recipe(data), tmp_path / "run", StopAt(1))
    with pytest.raises(RecipeError, match=r"lora\.rank was 4 and is 8"):
        fine_tune(recipe(data, lora={"rank": 8}), tmp_path / "run", Silent(), resume=True)
    write_jsonl(data, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(RunError, match=r"d\.jsonl has changed"):
        fine_tune(recipe(data), tmp_path / "run", Silent(), resume=True)


def test_resuming_on_other_weights_another_tokenizer_or_fewer_files_is_refused(
    recipe, few, tiny_folder, tmp_path
):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_folder, model)
    data.mkdir()
    rows = few.read_text()
    for name in ("a.jsonl", "b.jsonl"):
        (data / name).write_text(rows)
    settings = recipe(data, model={"path": str(model)})
    with pytest.raises(Interrupted):
        fine_tune(settings, tmp_path / "run", StopAt(1))

    def refused(words):
        with pytest.raises(RunError, match=words):
            fine_tune(settings, tmp_path / "run", Silent(), resume=True)

    weights = bytearray((model / "model.safetensors").read_bytes())
    other = weights.copy()
    other[-1] ^= 1  # of the same shapes, and of another fine-tune
    (model / "model.safetensors").write_bytes(other)
    refused("model has changed")
    (model / "model.safetensors").write_bytes(weights)
    template = model / "chat_template.jinja"
    text = template.read_text()
    template.write_text("{# another #}" + text)
    refused("tokenizer has changed")
    template.write_text(text)
    (data / "b.jsonl").unlink()
    refused(r"b\.jsonl is no longer there")
    (data / "b.jsonl").write_text(rows)
    fine_tune(settings, tmp_path / "run", Silent(), resume=True)


def test_a_loss_that_is_no_number_stops_the_run(recipe, few, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"at step \d+, on records \d+, ") as caught:
        fine_tune(
            recipe(
                few,
                train={"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 20},
                checkpoint={"steps": 1},
            ),
            tmp_path / "run",
            Silent(),
        )
    assert "last good checkpoint" in caught.value.remedy
    assert Run.open(tmp_path / "run").status()["status"] == "failed"


def test_an_existing_run_is_kept_unless_told_otherwise(recipe, few, tmp_path):
    settings = recipe(few, train={"max_steps": 1})
    fine_tune(settings, tmp_path / "run", Silent())
    with pytest.raises(OutputExists):
        fine_tune(settings, tmp_path / "run", Silent())
    with pytest.raises(RunError, match="finished"):
        fine_tune(settings, tmp_path / "run", Silent(), resume=True)
    fine_tune(settings, tmp_path / "run", Silent(), overwrite=True)


def test_val_size_holds_records_out(recipe, few, tmp_path):
    run = fine_tune(
        recipe(few, train={"max_steps": 2}, eval={"val_size": 0.25}), tmp_path / "run", Silent()
    )
    assert sum("held_out_loss" in e for e in run.metrics()) == 2
    assert run.best_adapter.is_dir()


def test_quantize_packs_while_loading(recipe, few, tmp_path, tiny_folder, plain_adapter):
    from mlxtune.layers.quantized import QuantizedLinear
    from mlxtune.recipe.schema import ModelSection
    from mlxtune.train.model import load_base

    packed = load_base(ModelSection(path=str(tiny_folder), quantize=4))
    layer = packed.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear) and layer.bits == 4
    run = fine_tune(recipe(few, model={"quantize": 4}), tmp_path / "run", Silent())
    assert losses(run)[-1] < losses(run)[0]
    assert not same_arrays(adapter(run), plain_adapter)


HYBRID = QWEN3_5 | {"head_dim": 16, "tie_word_embeddings": True}
RECURRENT = {
    "num_heads": 8,
    "state_size": 16,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "time_step_limit": [0.0, 100.0],
    "time_step_rank": "auto",
}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param("qwen3_5", HYBRID, id="hybrid", marks=pytest.mark.slow),
        pytest.param("mamba2", RECURRENT, id="recurrent"),
    ],
)
def test_models_that_remember_otherwise_are_padded_and_say_so(
    recipe, few, tmp_path, tiny_folder, kind, sizes
):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = tiny(kind, vocab_size=vocabulary, **sizes)
    config = {k: v for k, v in asdict(model.args).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), flat(model.parameters()))

    class Told(Silent):
        def started(self, outline):
            self.outline = outline

    told = Told()
    settings = recipe(few, model={"path": str(folder)}, train={"max_steps": 6})
    run = fine_tune(settings, tmp_path / "run", told)
    assert not told.outline.packed
    assert any("batches are padded, not packed" in note for note in told.outline.notes)
    assert losses(run)[-1] < losses(run)[0]


def test_a_cpu_that_computes_otherwise_than_the_weights_are_stored_says_so(
    recipe, few, tmp_path, tiny_folder
):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    half = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half)

    class Told(Silent):
        def started(self, outline):
            self.outline = outline

    told = Told()
    settings = recipe(few, model={"path": str(folder)}, train={"max_steps": 1})
    fine_tune(settings, tmp_path / "run", told)
    assert told.outline.dtype == "float32"
    assert any("computed in float32" in note and "bfloat16" in note for note in told.outline.notes)


@pytest.mark.parametrize(
    "asked",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_the_cli_stops_when_asked_to_and_says_how_to_go_on(recipe, few, tmp_path, asked):
    file = tmp_path / "t.toml"
    from mlxtune.recipe.load import dump_recipe

    file.write_text(dump_recipe(recipe(few, train={"max_steps": 50_000})))
    metrics = tmp_path / "a run/metrics.jsonl"
    with running("lora", str(file), "-o", str(tmp_path / "a run"), cwd=tmp_path) as process:
        wait_until(metrics.exists, process)
        process.send_signal(asked)
        _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + asked
    [saved] = checkpoints(tmp_path / "a run/checkpoints")
    assert str(saved) in errors
    assert "Traceback" not in errors
    [how] = [line for line in errors.splitlines() if "go on:" in line]
    again = shlex.split(how.partition(": ")[2])  # it can be pasted
    assert again[-3:] == ["lora", str(tmp_path / "a run"), "--resume"]


def test_max_samples_takes_the_first_so_many(recipe, few, tmp_path):
    from mlxtune.data.render import Renderer
    from mlxtune.train.corpus import read_corpus
    from mlxtune.train.model import tokenizer_of

    settings = recipe(few, eval={"path": str(few), "max_overlap": 1.0, "max_samples": 3})
    values = settings.model_dump() | {"data": [{"path": str(few), "max_samples": 7}]}
    settings = parse_recipe(values, where="test")
    corpus = read_corpus(settings, Renderer(tokenizer_of(settings.model)))
    assert [sample.record for sample in corpus.parts[0].samples] == list(range(1, 8))
    assert len(corpus.held_out) == 3


def test_held_out_file_is_read_with_the_recipe(recipe, few, tmp_path):
    run = fine_tune(
        recipe(few, train={"max_steps": 1}, eval={"path": str(SHELL_HELDOUT)}),
        tmp_path / "run",
        Silent(),
    )
    assert str(SHELL_HELDOUT) in run.status()["hashes"]


@pytest.mark.slow
def test_dequantize_expands_a_packed_model_and_computes_the_same(smollm2):
    import mlx.nn as nn

    from mlxtune.recipe.schema import ModelSection
    from mlxtune.train.model import load_base

    expanded = load_base(ModelSection(path=SMOLLM2, dequantize=True))
    assert type(expanded.model.model.layers[0].mlp.up_proj) is nn.Linear
    tokens = mx.array([[1, 4093, 198, 2683, 359, 253, 5356, 5646]])
    got, want = expanded.model(tokens), smollm2.model(tokens)
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-3).item()


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_step_is_the_plain_step(accumulation):
    import numpy as np

    from mlxtune.data.batches import Part, Plan
    from mlxtune.data.render import Sample
    from mlxtune.layers.inject import add_lora, projections
    from mlxtune.models.enable import enable_packs
    from mlxtune.train.optim import make_optimizer
    from mlxtune.train.step import TrainStep
    from support.models import tiny_llama

    generator = np.random.default_rng(0)
    samples = [
        Sample(
            np.concatenate([np.arange(1, 11), generator.integers(1, 100, n)]).astype(np.int32),
            np.array([0] * 12 + [1] * (n - 2), np.float32),
            n,
        )
        for n in (5, 9, 14, 7)
    ]
    results = []
    for compiled in (False, True):
        model = tiny_llama()
        mx.random.seed(1)
        add_lora(model, projections(model), rank=2, scale=2.0, dropout=0.1)
        enable_packs(model)
        optimizer = make_optimizer("sgd", model, weight_decay=0.0)
        step = TrainStep(model, optimizer, max_grad_norm=1.0, compiled=compiled)
        model.train()
        plan = Plan([Part(samples)], 4 // accumulation, accumulation, 0)
        losses = [step(batches, 0.1).loss.item() for batches in plan.steps(0, 4)]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-5)
