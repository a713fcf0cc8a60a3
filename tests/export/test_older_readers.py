"""Folders that are written, as readers other than transformers 5 know them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from mlxtune.export.convert import convert_to_folder
from mlxtune.fuse import dense_config, fuse_run
from support.models import save_tiny_model


def said(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / name).read_text())


@pytest.fixture
def published(tmp_path) -> Path:
    """A model as transformers 4 published it, with tokens of its own."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_tiny_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    assert said(folder, "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    config = said(folder, "config.json") | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer_has_a_class_and_keys_that_transformers_4_has(published, tmp_path):
    """Version 4.57 ends in "Tokenizer class TokenizersBackend does not exist", and at a list of
    `extra_special_tokens` in "'list' object has no attribute 'keys'"."""
    convert_to_folder(str(published), tmp_path / "m")
    written = said(tmp_path / "m", "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in written
    before = transformers.AutoTokenizer.from_pretrained(published)
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "<|im_start|>user\nGrüße<|im_end|>"
    assert after(text).input_ids == before(text).input_ids
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template == before.chat_template


def test_the_type_of_the_weights_is_told_by_all_its_names(published, tmp_path):
    convert_to_folder(str(published), tmp_path / "m", dtype="bfloat16")
    config = said(tmp_path / "m", "config.json")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "m").dtype is torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert model.dtype is torch.bfloat16
    parts = {"text_config": {"torch_dtype": "float16", "hidden_size": 8}, "dtype": "float16"}
    assert dense_config(parts, "float32") == {
        "text_config": {"torch_dtype": "float32", "hidden_size": 8},
        "dtype": "float32",
    }


def test_a_fused_model_is_written_so_too(tiny_run, tmp_path):
    fuse_run(tiny_run, tmp_path / "fused", dtype="float16")
    assert said(tmp_path / "fused", "config.json")["dtype"] == "float16"
    written = said(tmp_path / "fused", "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
