"""What an export says of a model that got worse, or that computes no numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.errors import ExportError
from mlxtune.export.convert import convert
from mlxtune.export.runtime import check_in_llamacpp
from mlxtune.models.load import load_model
from mlxtune.models.resolve import ModelSource
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.metrics import Silent
from mlxtune.train.outcome import outcome
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from support.files import SHELL_HELDOUT, SHELL_TRAIN, write_jsonl
from support.models import save_real_vocabulary
from support.program import mlxtune

ROWS = [[504, 2537, 841, 260, 284, 1017, 28, 260, 3122, 30]]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save_real_vocabulary(path)
    return path


def with_value(folder: Path, to: Path, value: float) -> Path:
    """A copy of a model with one of its weights changed."""
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    arrays = {name: a.astype(mx.float32) for name, a in mx.load(str(path)).items()}
    arrays[UP][0, 0] = value
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    return to


@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_damaged_weights_is_called_that(folder, tmp_path, file_type, value):
    source = with_value(folder, tmp_path / "damaged", value)
    size = mx.load(str(source / "model.safetensors"))[UP].size
    with pytest.raises(ExportError, match="the model itself is damaged") as error:
        convert(str(source), tmp_path / "m.gguf", file_type=file_type)
    assert f"1 of {size:,} values of {UP} are no numbers" in error.value.what
    assert "report" not in error.value.remedy and not (tmp_path / "m.gguf").exists()


def test_a_model_that_computes_no_numbers_is_not_blamed_on_llama_cpp(folder, tmp_path):
    pytest.importorskip("xllamacpp")
    written = convert(str(folder), tmp_path / "m.gguf", file_type="f32", verify=False).path
    model = load_model(ModelSource("small", folder)).model
    # All weights are numbers, and what is computed with them is none.
    for layer in model.layers:
        layer.input_layernorm.weight = layer.input_layernorm.weight + 3e38
    with pytest.raises(ExportError, match="the model itself gives no numbers") as error:
        check_in_llamacpp(written, model, ROWS, "f32")
    assert "report" not in error.value.remedy


def test_a_model_worse_than_chance_is_not_blamed_on_llama_cpp(folder, tmp_path):
    pytest.importorskip("xllamacpp")
    model = load_model(ModelSource("small", folder)).model
    written = convert(str(folder), tmp_path / "m.gguf", file_type="f32", verify=False).path
    # Sure of itself, and of what does not follow.
    model.model.norm.weight = model.model.norm.weight * -40
    with pytest.raises(ExportError, match="other tokens than MLX") as error:
        check_in_llamacpp(written, model, ROWS, "f32")
    loss = float(nn.losses.cross_entropy(*_next(model), reduction="mean"))
    assert loss > math.log(model.args.vocab_size) + 1
    assert f"predicts worse than chance (loss {loss:.2f})" in error.value.remedy
    model.model.norm.weight = model.model.norm.weight / -40 * 1.5
    with pytest.raises(ExportError, match="other tokens than MLX") as error:
        check_in_llamacpp(written, model, ROWS, "f32")
    assert "report" in error.value.remedy


def _next(model):
    """Logits and tokens of all places but the first."""
    tokens = mx.array(ROWS)
    return model(tokens)[:, :-1], tokens[:, 1:]


def test_values_that_overflow_in_llama_cpp_are_told_from_a_wrong_file(folder, tmp_path):
    """There inputs of packed matrices are packed too, with scales of 16 bits."""
    pytest.importorskip("xllamacpp")
    source = shutil.copytree(folder, tmp_path / "large")
    path = source / "model.safetensors"
    arrays = {name: a.astype(mx.float32) for name, a in mx.load(str(path)).items()}
    for name in arrays:
        if "up_proj" in name:
            arrays[name] = arrays[name] * 3e7
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    convert(str(source), tmp_path / "whole.gguf", file_type="f32")
    with pytest.raises(ExportError, match="computes no numbers with this file") as error:
        convert(str(source), tmp_path / "m.gguf", file_type="q8_0")
    assert "report" not in error.value.remedy and not (tmp_path / "m.gguf").exists()


@pytest.fixture(scope="module")
def worse(folder, tmp_path_factory) -> Run:
    """A run that made a model worse that can be written as GGUF."""
    place = tmp_path_factory.mktemp("runs")
    rows = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[:12]]
    values = {
        "name": "worse",
        "model": {"path": str(folder)},
        "lora": {"rank": 4},
        "data": [{"path": str(write_jsonl(place / "rows.jsonl", rows))}],
        "eval": {"path": str(SHELL_HELDOUT), "max_samples": 4},
        "train": {"batch_size": 2, "max_steps": 2, "learning_rate": 1.0},
    }
    return fine_tune(parse_recipe(values, where="test"), place / "run", Silent())


def test_export_and_fuse_say_first_that_the_run_got_worse(worse, tmp_path):
    found = outcome(worse.metrics())
    assert found.after > found.before + 0.1
    said = (
        f"warning: the held-out loss is worse than before training: {found.before:.4f} before, "
        f"{found.after:.4f} after step 2"
    )
    path = str(worse.path)
    written = {
        "out": ["export", path, "--quantize", "f32", "-o"],
        "adapter": ["export", path, "--adapter-only", "-o"],
        "fused": ["fuse", path, "-o"],
        "converted": ["convert", path],
    }
    for place, arguments in written.items():
        done = mlxtune(*arguments, place, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0] == said, done.stderr
    card = (tmp_path / "out/README.md").read_text()
    assert f"{found.after:.4f} after: worse than before training |" in card
    done = mlxtune("export", path, "-o", "j", "--quantize", "f32", "--json", cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert printed["warnings"][0] == said
    assert printed["adapter"] == f"{worse.adapter} (after step 2)"


def test_eval_says_first_that_the_adapter_is_worse_and_which_one_it_is(worse, tmp_path):
    done = mlxtune("eval", str(worse.path), "--max-tokens", "2", "-o", "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    before, after = (f"{loss:.4f}" for loss in (list(outcome(worse.metrics()).losses.values())))
    assert printed.startswith(
        f"warning: the held-out loss is worse than before training: {before} before, {after} "
        f"after training base → tuned: held-out loss {before} → {after}; exact match 0.0% with both"
    )
    assert "tuned: the same with" in printed
    assert "adapter (after step 2)" in printed.replace(str(worse.path), "")
    assert "note: train again with a lower train.learning_rate" in printed
    assert "+0.0%" not in printed and "-0.0" not in printed
