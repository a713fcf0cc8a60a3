"""Folders that transformers 5 saved: the rotation is where mlx-lm does not look for it."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlxtune.errors import ExportError
from mlxtune.export.convert import convert, convert_to_folder
from mlxtune.gguf.architectures import for_config
from mlxtune.gguf.rope import theta
from mlxtune.models.load import load_model
from mlxtune.models.resolve import resolve_model
from support.models import LLAMA3, REAL_TOKENS, real_vocabulary

TOKENS = [17, 3900, 5, 260, 42, 999, 1234, 7, 64, 3, 2048, 77]
SIZES = {
    "vocab_size": REAL_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
# Each turns by something else than mlx-lm takes where config.json is silent.
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
}
SLOW = {"rope_type": "default", "rope_theta": 90.0}
MODELS = {
    "llama": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0, "factor": 4.0}},
    "mistral": {"rope_parameters": SLOW, "sliding_window": None},
    "qwen2": {"rope_parameters": SLOW},
    "gemma2": {"rope_parameters": SLOW, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "rope_parameters": GEMMA3,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"rope_parameters": SLOW | {"partial_rotary_factor": 0.5}},
    "smollm3": {"rope_parameters": SLOW, "num_hidden_layers": 4},
    "granite": {"rope_parameters": SLOW},
}


def logprobs(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


FEW = ("llama", "gemma3_text", "phi3")


@pytest.mark.parametrize(
    "name",
    [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_the_model_turns_as_transformers_turns_it(name, tmp_path):
    torch.manual_seed(0)
    own = json.loads(json.dumps(MODELS[name]))
    config = transformers.AutoConfig.for_model(name, **SIZES | own)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for path, values in theirs.named_parameters():
        if "q_proj" in path or "k_proj" in path or "qkv_proj" in path:
            values.data *= 8  # so that attention goes by place
    source = tmp_path / name
    theirs.eval().save_pretrained(source)
    real_vocabulary().save_pretrained(source)
    assert "rope_theta" not in json.loads((source / "config.json").read_text())
    with torch.no_grad():
        want = logprobs(theirs(torch.tensor([TOKENS])).logits[0].float().numpy())

    def ours(path) -> np.ndarray:
        model = load_model(resolve_model(str(path))).model
        return logprobs(np.array(model(mx.array([TOKENS]))[0].astype(mx.float32)))

    assert np.abs(ours(source) - want).max() < 1e-3
    # A file, in llama.cpp and read again, and folders, for transformers too.
    made = convert(str(source), tmp_path / "m.gguf", file_type="f32")
    assert made.verified.llamacpp.mean_kl < 1e-5
    assert np.abs(ours(made.path) - want).max() < 1e-3
    for number, told in enumerate((source, made.path)):
        folder = tmp_path / f"folder{number}"
        convert_to_folder(str(told), folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", pad_token_id=0
        )
        with torch.no_grad():
            got = logprobs(again(torch.tensor([TOKENS])).logits[0].float().numpy())
        assert np.abs(got - want).max() < 1e-3, told


def test_a_config_that_says_no_base_has_that_of_mlx_lm():
    for name, base in (("qwen2", 1e6), ("gemma3_text", 1e6), ("llama", 1e4), ("gpt_oss", 150e3)):
        config = {"model_type": name}
        assert theta(for_config(config), config) == base
    config = {"model_type": "qwen3"}
    with pytest.raises(ExportError, match="no 'rope_theta'"):
        theta(for_config(config), config)
