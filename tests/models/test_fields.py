"""The fields that strict readers of config.json ask for, of a model that comes from a GGUF."""

from __future__ import annotations

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlxtune.export.convert import convert, convert_to_folder
from mlxtune.models.fields import with_all_fields
from support.models import save_tiny_model

# What a GGUF says of a model, in the names of config.json.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}
# Fields without which candle reads no such model
# (https://github.com/huggingface/candle, candle-transformers/src/models), all of them numbers,
# words or truth values.
STRICT = {
    "llama": ["hidden_act"],
    "qwen2": ["hidden_act", "sliding_window", "max_window_layers", "use_sliding_window"],
    "qwen3": [
        "hidden_act",
        "attention_bias",
        "max_window_layers",
        "use_sliding_window",
    ],
    "gemma2": ["hidden_activation", "attention_bias", "sliding_window"],
    "phi3": ["hidden_act"],
    "mistral": ["hidden_act"],
}


@pytest.mark.parametrize("kind", STRICT)
def test_strict_readers_find_their_fields_and_others_read_what_they_read_before(kind):
    plain = SIZES | {"model_type": kind} | ({"sliding_window": 256} if kind == "gemma2" else {})
    full = with_all_fields(plain)
    assert full.items() >= plain.items()
    assert all(isinstance(full[key], str | int | float | bool) for key in STRICT[kind])
    assert not [key for key in full.keys() - plain.keys() if key.endswith("_token_id")]
    before, after = (CONFIG_MAPPING[kind](**config).to_dict() for config in (plain, full))
    if kind == "mistral":  # whose window is on unless it is said to be off
        before.pop("sliding_window"), after.pop("sliding_window")
    assert after == before
    assert "sliding_window" not in full or kind in ("qwen2", "qwen3", "gemma2")


def test_a_type_that_transformers_does_not_know_stays_as_it_is():
    config = SIZES | {"model_type": "newer than that"}
    assert with_all_fields(config) is config


def test_a_folder_that_is_made_of_a_gguf_has_them(tmp_path):
    (tmp_path / "m").mkdir()
    save_tiny_model(tmp_path / "m", merged=True)
    convert(str(tmp_path / "m"), tmp_path / "m.gguf", file_type="f32", verify=False)
    convert_to_folder(str(tmp_path / "m.gguf"), tmp_path / "folder", verify=False)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    known = json.loads((tmp_path / "m/config.json").read_text())
    assert config["hidden_act"] == "silu" and config["attention_dropout"] == 0.0
    assert config["eos_token_id"] == known["eos_token_id"]
