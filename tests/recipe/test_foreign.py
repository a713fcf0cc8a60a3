"""Files of other programs given as a recipe: whose they are, and what to do.

The keys are those that each program documents for its own files.
"""

from __future__ import annotations

import json
import shlex

import pytest

from mlxtune.errors import RecipeError
from mlxtune.recipe.load import load_recipe
from mlxtune.recipe.presets import write_preset

# https://docs.axolotl.ai/docs/config-reference.html
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B   # of the hub
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
sequence_len: 2048
adapter: qlora
lora_r: 16
micro_batch_size: 2
lora_target_modules:
  - gate_proj
"""
# https://llamafactory.readthedocs.io/en/latest/getting_started/sft.html
LLAMA_FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
num_train_epochs: 3.0
"""
# https://docs.pytorch.org/torchtune/stable/deep_dives/configs.html
TORCHTUNE = """
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/tokenizer.model
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj']
batch_size: 4
"""
# https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/examples/lora_config.yaml
MLX_LM = """
model: "mlx-community/Llama-3.2-1B-Instruct-4bit"
train: true
fine_tune_type: lora
data: "mlx-community/WikiSQL"
num_layers: 16
iters: 1000
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
"""
# https://huggingface.co/docs/trl/clis
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: stanfordnlp/imdb
use_peft: true
learning_rate: 1.0e-4
"""


def refused(tmp_path, name: str, text: str) -> RecipeError:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert raised.value.where == str(path)
    return raised.value


@pytest.mark.parametrize(
    ("text", "whose", "model", "key", "ours"),
    [
        (AXOLOTL, "Axolotl", "NousResearch/Llama-3.2-1B", "micro_batch_size", "train.batch_size"),
        (
            LLAMA_FACTORY,
            "LLaMA-Factory",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "cutoff_len",
            "train.max_seq_length",
        ),
        (TORCHTUNE, "torchtune", None, None, None),
        (
            MLX_LM,
            "mlx-lm",
            "mlx-community/Llama-3.2-1B-Instruct-4bit",
            "iters",
            "train.max_steps",
        ),
        (TRL, "TRL", "Qwen/Qwen2.5-0.5B", "model_name_or_path", "model.path"),
    ],
    ids=["Axolotl", "LLaMA-Factory", "torchtune", "mlx-lm", "TRL"],
)
def test_a_recipe_of_another_trainer_is_told_with_what_to_type(
    tmp_path, text, whose, model, key, ours
):
    error = refused(tmp_path, "config.yaml", text)
    assert error.what.startswith("this is YAML") and error.what.endswith(f"recipe of {whose}")
    said = {problem.where: problem.what for problem in error.problems}
    assert key is None or said[key] == f"here it is called {ours}"
    # What is to be typed writes a recipe that loads, with that model.
    words = shlex.split(error.remedy.partition(": ")[2])
    assert words[-4 if model else -2 :][:2] == ["init", "recipe.toml"]
    if model:
        assert words[-2:] == ["--model", model]
        write_preset(tmp_path / "recipe.toml", "default", model=model)
        assert load_recipe(tmp_path / "recipe.toml").model.path == model


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        (
            "adapter_config.json",
            json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}),
            "PEFT's config of an adapter",
        ),
        (
            "config.json",
            json.dumps({"architectures": ["A"], "model_type": "llama", "vocab_size": 9}),
            "transformers's config of a model",
        ),
        ("recipe.yml", "a: 1\nb:\n  - c\n", "this is YAML, and a recipe is TOML"),
    ],
)
def test_other_files_are_told_too(tmp_path, name, text, what):
    error = refused(tmp_path, name, text)
    assert error.what.endswith(what) and "init recipe.toml" in error.remedy


@pytest.mark.parametrize("name", ["a b.jsonl", "d.csv", "d.parquet"])
def test_records_are_no_recipe_and_one_is_written_for_them(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\xff')
    with pytest.raises(RecipeError, match="a file of records") as raised:
        load_recipe(path)
    assert shlex.split(raised.value.remedy)[-2:] == ["--data", str(path)]


@pytest.mark.parametrize(
    "text", ["just = some [ text", "print(1)", "[model\npath: 3", "# nothing ="]
)
def test_what_is_none_of_these_stays_invalid_toml(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert "YAML" not in str(raised.value)
