"""The fields that strict readers of config.json ask for, of a model that comes from a GGUF."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlxtune.adapters.store import save_adapter
from mlxtune.export.convert import convert, convert_to_folder
from mlxtune.fuse import fuse_run
from mlxtune.models.fields import with_all_fields
from mlxtune.models.load import load_model
from mlxtune.models.resolve import resolve_model
from support.models import save_tiny_model, with_adapters

# What a GGUF says of a model, in the names of config.json.
SIZES: dict[str, Any] = {
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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 256, "query_pre_attn_scalar": 32},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 512},
}
# Fields without which candle reads no such model
# (https://github.com/huggingface/candle, candle-transformers/src/models), all of them numbers,
# words or truth values.
WINDOWED = ["max_window_layers", "use_sliding_window", "tie_word_embeddings"]
STRICT = {
    "llama": ["hidden_size", "rope_theta"],
    "qwen2": ["hidden_act", "sliding_window", *WINDOWED],
    "qwen3": ["hidden_act", "attention_bias", "head_dim", *WINDOWED],
    "gemma2": ["hidden_activation", "attention_bias", "query_pre_attn_scalar"],
    "phi3": ["hidden_act", "original_max_position_embeddings"],
}
# What transformers notes of itself, and what version 5 says in a way of its own.
ITS_OWN = {"transformers_version", "rope_parameters", "bos_token_id", "eos_token_id"}
ITS_OWN |= {"pad_token_id", "rope_theta"}


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "m.gguf").touch()
    return tmp_path / "m.gguf"


def read_again(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config.json as transformers reads it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("kind", STRICT)
def test_all_fields_are_there_that_transformers_writes(kind, file, tmp_path):
    plain = SIZES | OWN[kind] | {"model_type": kind}
    before = copy.deepcopy(plain)
    full = with_all_fields(plain, file)
    assert plain == before and full | plain == full
    theirs = CONFIG_MAPPING[kind](**copy.deepcopy(plain))
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs/config.json").read_text()).keys()
    wanted = {k: v for k, v in theirs.to_dict().items() if k in written and k not in ITS_OWN}
    if kind in ("qwen2", "qwen3"):  # null, as the window is not used
        wanted["sliding_window"] = CONFIG_MAPPING[kind](use_sliding_window=True).sliding_window
    assert {key: full.get(key) for key in wanted} == wanted
    assert all(isinstance(full[key], str | int | float | bool) for key in STRICT[kind])
    # Whoever read it before reads the same.
    assert read_again(full, tmp_path / "full") == read_again(plain, tmp_path / "plain")


def test_the_fields_of_a_model_that_could_see_are_those_of_its_language_model(file):
    """transformers' class has it in a config inside, which mlx-lm would take for the model's."""
    linear = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    plain = SIZES | {"model_type": "qwen3_5"} | linear
    full = with_all_fields(plain, file)
    inner = CONFIG_MAPPING["qwen3_5_text"]().to_dict()
    added = full.keys() - plain.keys()
    assert {"hidden_act", "attention_bias", "linear_key_head_dim"} <= added
    assert not [key for key in added if key.startswith("vision") or key.endswith("_config")]
    assert inner | {key: full[key] for key in added - {"layer_types"}} == inner
    # One that tells them inside already has them there.
    nested = {"model_type": "qwen3_5", "text_config": plain}
    assert with_all_fields(nested, file) == nested


def test_a_value_stays_even_if_it_is_none(file):
    plain = SIZES | {"model_type": "gemma2", "sliding_window": None, "attention_bias": True}
    full = with_all_fields(plain, file)
    assert full["sliding_window"] is None and full["attention_bias"] is True


def test_a_type_that_transformers_does_not_know_stays_as_it_is(file):
    config = SIZES | {"model_type": "newer than that"}
    assert with_all_fields(config, file) is config


def test_every_folder_that_is_made_of_a_gguf_has_them_and_others_stay(tmp_path):
    (tmp_path / "m").mkdir()
    save_tiny_model(tmp_path / "m", merged=True)
    path = convert(str(tmp_path / "m"), tmp_path / "m.gguf", file_type="f32", verify=False).path
    adapted = with_adapters(load_model(resolve_model(str(path))).model)
    save_adapter(tmp_path / "adapter", adapted, base=str(path))
    convert_to_folder(str(path), tmp_path / "converted", verify=False)
    convert_to_folder(str(tmp_path / "adapter"), tmp_path / "adapted", verify=False)
    fuse_run(tmp_path / "adapter", tmp_path / "fused")
    convert_to_folder(str(tmp_path / "m"), tmp_path / "copied", verify=False)
    known, *made, copied = (
        json.loads((tmp_path / name / "config.json").read_text())
        for name in ("m", "converted", "adapted", "fused", "copied")
    )
    for config in made:
        assert config["hidden_act"] == "silu" and config["attention_dropout"] == 0.0
        assert config["eos_token_id"] == known["eos_token_id"]
    assert copied.keys() - known.keys() <= {"dtype"}
