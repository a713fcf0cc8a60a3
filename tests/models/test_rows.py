"""A tokenizer with tokens that the model has no rows for: used, they are refused."""

from __future__ import annotations

import json

import pytest

from mlxtune.data.records import Conversation, Turn
from mlxtune.data.render import Renderer
from mlxtune.errors import ModelError
from mlxtune.models.load import embedding_rows, load_model, model_config
from mlxtune.models.resolve import ModelSource, resolve_model
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import rows_of, tokenizer_of
from support.files import write_jsonl
from support.models import SMOLLM2, save_with_unknown_tokens
from support.program import mlxtune

RECIPE = """
name = "r"
[model]
path = "m"
[[data]]
path = "data.jsonl"
[lora]
rank = 4
[train]
batch_size = 1
max_steps = 1
max_seq_length = 512
gradient_checkpointing = false
"""
PLAIN = {"prompt": "a question", "completion": "an answer"}
USED = {"prompt": "a question", "completion": "an <image> answer"}


def said(first: int, token: str, number: int) -> str:
    return f"the token '{token}' has the id {number}, and the model's embedding has {first} rows"


def test_a_sample_with_such_a_token_is_refused_before_anything_is_trained(tmp_path):
    first = save_with_unknown_tokens(tmp_path / "m")
    (tmp_path / "r.toml").write_text(RECIPE)
    write_jsonl(tmp_path / "data.jsonl", [PLAIN, USED])
    for verb in (("lora", "r.toml", "--output=run"), ("data", "inspect", "r.toml")):
        done = mlxtune(*verb, cwd=tmp_path)
        assert done.returncode == 1
        text = " ".join(done.stderr.split())
        assert said(first, "<image>", first + 1) in text and "data.jsonl:2" in text
        assert "resize_token_embeddings" in text
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_only_lists_such_tokens_keeps_working(tmp_path):
    """As Gemma 3's does with `<image_soft_token>`."""
    first = save_with_unknown_tokens(tmp_path / "m")
    (tmp_path / "r.toml").write_text(RECIPE)
    write_jsonl(tmp_path / "data.jsonl", [PLAIN])
    done = mlxtune("lora", "r.toml", "--output=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Tokens that were made for a larger model of the same tokenizer do not count for this one.
    section = ModelSection(path=str(tmp_path / "m"))
    renderer = Renderer(tokenizer_of(section), rows=rows_of(section))
    assert renderer.rows == first
    assert renderer.encode("an answer")


@pytest.mark.parametrize("form", ["template", "prompt"])
def test_a_prompt_with_such_a_token_is_not_answered(form, tmp_path):
    first = save_with_unknown_tokens(tmp_path / "m", template=form == "template")
    prompt = "hello" if form == "template" else "hello <tool>"
    done = mlxtune("chat", "m", f"--prompt={prompt}", cwd=tmp_path)
    assert done.returncode == 1
    assert said(first, "<tool>", first) in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_text_to_calibrate_on_with_such_a_token_is_refused(name, tmp_path):
    save_with_unknown_tokens(tmp_path / "m")
    if name == "text.txt":
        (tmp_path / name).write_text("some <image> text " * 20)
    else:
        write_jsonl(tmp_path / name, [USED])
    done = mlxtune(
        *("convert", "m", "m.gguf", "--quantize=q4_k_m", f"--calibrate={name}"), cwd=tmp_path
    )
    assert done.returncode == 1
    assert "'<image>' has the id" in " ".join(done.stderr.split())
    assert not (tmp_path / "m.gguf").exists()


def test_a_question_of_an_evaluation_with_such_a_token_is_refused(tmp_path):
    save_with_unknown_tokens(tmp_path / "m")
    loaded = load_model(ModelSource("m", tmp_path / "m"))
    asked = Conversation((Turn("user", "an <image>"), Turn("assistant", "yes")))
    with pytest.raises(ModelError, match="'<image>' has the id"):
        loaded.renderer().prompt(asked)
    with pytest.raises(ModelError, match="'<image>' has the id"):
        loaded.renderer().samples(asked)


ROWS = {
    "text": ({"model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 8}, 262_144),
    # mlx-lm's own default, whatever the part for text says.
    "also sees": ({"model_type": "gemma3", "text_config": {"hidden_size": 8}}, 262_208),
    "nested": (
        {"model_type": "qwen3_5", "text_config": {"vocab_size": 300, "hidden_size": 8}},
        300,
    ),
    "nested, an object": ({"model_type": "kimi_vl", "text_config": {"vocab_size": 300}}, 300),
    "another name": ({"model_type": "phixtral", "num_vocab": 300}, 300),
    "unknown": ({"model_type": "nothing known"}, None),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_are_those_of_the_model_that_mlx_lm_builds(name):
    config, rows = ROWS[name]
    before = json.dumps(config)
    assert embedding_rows(config) == rows
    assert json.dumps(config) == before


def test_the_rows_of_a_gguf_are_its_tensors(smollm2):
    config = model_config(resolve_model(SMOLLM2))
    assert embedding_rows(config) == smollm2.model.model.embed_tokens.shape[0]
