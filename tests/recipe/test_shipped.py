"""The recipes that come along: each is valid, and names a Mac and a model that are known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import resources
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxtune.bench.chips import Chip, find_chip
from mlxtune.models.known import known_config
from mlxtune.models.load import model_classes
from mlxtune.models.skeleton import skeleton
from mlxtune.recipe.load import load_recipe
from mlxtune.train.check import check_sources
from support.files import ROOT

FILES = sorted((ROOT / "recipes").glob("*.toml"))
EVERY = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

# Parameters as the hub counts them.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5e6,
    "Qwen/Qwen3-0.6B": 596e6,
    "Qwen/Qwen3-0.6B-Base": 596e6,
    "Qwen/Qwen3-4B": 4.02e9,
    "Qwen/Qwen3-8B": 8.19e9,
    "google/gemma-2-2b-it": 2.61e9,
    # https://github.com/keras-team/keras-hub/blob/master/keras_hub/src/models/gemma3/gemma3_presets.py
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-3.2-1B-Instruct": 1.24e9,
    "meta-llama/Llama-3.2-3B-Instruct": 3.21e9,
    "microsoft/Phi-4-mini-instruct": 3.84e9,
    "mlx-community/Mistral-7B-Instruct-v0.3-4bit": 7.25e9,
    "mlx-community/Qwen3-30B-A3B-4bit": 30.5e9,
}
# Of packed weights, as the hub lists them.
BYTES = {
    "mlx-community/Mistral-7B-Instruct-v0.3-4bit": 4.08e9,
    "mlx-community/Qwen3-30B-A3B-4bit": 17.2e9,
}
CONFIGS = json.loads((resources.files("mlxtune.models") / "configs.json").read_text("utf-8"))


def mac(path: Path) -> tuple[Chip, int]:
    """The chip and the GB of memory that a recipe is for."""
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    found = re.findall(r"^# for: (M\d+(?: \w+)?), (\d+) GB$", head, re.MULTILINE)
    assert len(found) == 1, f"{path.name}: one line of the form '# for: M2, 16 GB'"
    return find_chip(found[0][0]), int(found[0][1])


def arrays(hub_id: str, **without: object) -> list[mx.array]:
    config = known_config(hub_id)
    assert config is not None
    return [a for _, a in tree_flatten(skeleton(config | without, mx.bfloat16).parameters())]


def test_there_are_more_than_ten():
    assert len(FILES) >= 12


@EVERY
def test_a_recipe_is_valid_with_its_data(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    check = check_sources(recipe)
    check.require_usable()
    assert all(source.records > 10 for source in check.sources) and not check.overlap


@EVERY
def test_a_recipe_says_what_it_is_for_and_on_which_mac(path):
    chip, memory = mac(path)
    assert memory in chip.memory_gb
    first, *_ = path.read_text(encoding="utf-8").split("\n")
    assert first.startswith("# ") and len(first) > 40


@EVERY
def test_a_recipes_model_is_known_without_the_hub(path):
    model = load_recipe(path).model.path
    assert model.startswith("pkg:") or known_config(model) is not None


@EVERY
def test_the_table_of_recipes_has_it(path):
    chip, memory = mac(path)
    table = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    (row,) = (line for line in table.splitlines() if f"]({path.name})" in line)
    assert row.endswith(f"| {chip.name}, {memory} GB |")
    recipe = load_recipe(path)
    assert ("8-bit AdamW" in row) == (recipe.train.optimizer == "adamw_8bit")
    assert ("packed while loading" in row) == (recipe.model.quantize is not None)


def test_gemma_2_is_as_it_was_asked_for():
    recipe = load_recipe(ROOT / "recipes/gemma-2-2b.toml")
    lora, train = recipe.lora, recipe.train
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert (train.batch_size, train.gradient_accumulation_steps) == (4, 4)
    assert (train.max_seq_length, train.epochs, train.learning_rate) == (2048, 3, 5e-5)
    assert (train.optimizer, train.lr_scheduler) == ("adamw_8bit", "cosine")
    assert (train.warmup_steps, train.warmup_ratio) == (100, None)


def test_the_known_models_are_those_of_the_recipes():
    named = {load_recipe(path).model.path for path in FILES}
    assert CONFIGS.keys() == PARAMETERS.keys() == {n for n in named if not n.startswith("pkg:")}


def test_a_model_that_is_not_known_has_no_config():
    assert known_config("owner/model") is None


def test_what_a_caller_does_to_a_config_stays_with_it():
    mine = known_config("Qwen/Qwen3-0.6B")
    mine["rope_scaling"] = "mine"
    known_config("microsoft/Phi-4-mini-instruct")["rope_scaling"]["long_factor"].clear()
    assert known_config("Qwen/Qwen3-0.6B")["rope_scaling"] is None
    assert known_config("microsoft/Phi-4-mini-instruct")["rope_scaling"]["long_factor"]


@pytest.mark.parametrize("hub_id", CONFIGS)
def test_a_known_config_names_its_source_and_nothing_that_mlx_lm_does_not_read(hub_id):
    assert CONFIGS[hub_id]["_source"].startswith("https://")
    config = known_config(hub_id)
    read = {field.name for field in fields(model_classes(config)[1])}
    assert config.keys() <= read | {"torch_dtype", "quantization"}


@pytest.mark.parametrize("hub_id", CONFIGS)
def test_a_known_model_has_as_many_parameters_as_published(hub_id):
    count = sum(array.size for array in arrays(hub_id, quantization=None))
    assert count == pytest.approx(PARAMETERS[hub_id], rel=0.01)


@pytest.mark.parametrize("hub_id", BYTES)
def test_a_known_packed_model_is_as_large_as_published(hub_id):
    size = sum(array.nbytes for array in arrays(hub_id))
    assert size == pytest.approx(BYTES[hub_id], rel=0.01)


def test_knowing_a_config_loads_neither_mlx_nor_mlx_lm():
    code = """
import sys
from mlxtune.models.known import known_config
assert known_config("Qwen/Qwen3-0.6B")["model_type"] == "qwen3"
assert not {"mlx.core", "mlx_lm"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
