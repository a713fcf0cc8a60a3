"""Checkpoints in the form that their makers publish, against what mlx-lm makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxtune.export.source import open_source
from mlxtune.layers.dense import dense_tensors
from mlxtune.layers.inject import own_quantized_layers
from mlxtune.models.load import load_model
from mlxtune.models.resolve import ModelSource
from support.models import GEMMA4, QWEN3_5, no_tokenizer, tiny

GPT_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}


def compare_with_mlx_lm(
    folder: Path, config: dict[str, Any], weights: dict[str, mx.array], monkeypatch
) -> None:
    """Every tensor read one by one is the parameter of the model that mlx-lm loads."""
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("mlx_lm.utils.load_tokenizer", lambda *_, **__: no_tokenizer())
    loaded = load_model(ModelSource("published", folder))
    own_quantized_layers(loaded.model, mx.float32)
    want = {tensor.name: tensor.source().load() for tensor in dense_tensors(loaded.model)}
    opened = open_source(str(folder))
    assert {"vocab_size", "num_attention_heads"} <= opened.config.keys()
    got = {tensor.name: tensor for tensor in opened.tensors()}
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].shape == values.shape
        assert np.array_equal(got[name].load(), values), name


def test_gpt_oss_in_four_bit_floats_with_gate_and_up_alternating(tmp_path, monkeypatch):
    config = GPT_OSS | {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    model = tiny("gpt_oss", **GPT_OSS)
    config |= {k: v for k, v in vars(model.args).items() if v is not None}
    weights: dict[str, mx.array] = {}
    for name, values in tree_flatten(model.parameters()):
        if ".experts." not in name:
            weights[name] = values
            continue
        experts, projection, kind = name.rsplit(".", 2)
        values = mx.random.normal(values.shape)
        if projection == "up_proj":
            continue
        if projection == "gate_proj":
            projection, shape = "gate_up_proj", (values.shape[0], 2 * values.shape[1])
            values = mx.random.normal((*shape, *values.shape[2:]))
        if kind == "bias":
            weights[f"{experts}.{projection}_bias"] = values
        else:
            codes, scales = mx.quantize(values, mode="mxfp4", group_size=32, bits=4)
            blocks = codes.view(mx.uint8).reshape(*scales.shape, 16)
            weights[f"{experts}.{projection}_blocks"] = blocks
            weights[f"{experts}.{projection}_scales"] = scales
    compare_with_mlx_lm(tmp_path, config, weights, monkeypatch)


def test_qwen3_5_beside_what_looks_at_images_and_what_predicts_further(tmp_path, monkeypatch):
    text = tiny("qwen3_5", **QWEN3_5)
    weights = {}
    for name, values in tree_flatten(text.parameters()):
        values = mx.random.normal(values.shape)
        if name.endswith("conv1d.weight"):
            values = values.moveaxis(2, 1)
        weights[name.replace("language_model.model", "model.language_model")] = values
    for name in ("model.visual.patch_embed.proj.weight", "mtp.norm.weight", "mtp.fc.weight"):
        weights[name] = mx.zeros((4,))
    config = {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text.args.text_config | {"model_type": "qwen3_5_text"},
        "vision_config": {"depth": 1},
    }
    compare_with_mlx_lm(tmp_path, config, weights, monkeypatch)


def test_gemma4_beside_what_looks_at_images_with_keys_that_no_block_uses(tmp_path, monkeypatch):
    text = tiny("gemma4_text", **GEMMA4)
    weights = {
        name.replace("model.", "model.language_model.", 1): mx.random.normal(values.shape)
        for name, values in tree_flatten(text.parameters())
    }
    for block in (3, 4):
        for name in ("k_proj", "v_proj", "k_norm"):
            weights[f"model.language_model.layers.{block}.self_attn.{name}.weight"] = mx.zeros((4,))
    for name in ("vision_tower.patch.weight", "embed_vision.weight", "audio_tower.conv.weight"):
        weights[f"model.{name}"] = mx.zeros((4,))
    config = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "vocab_size": 128,
        "text_config": {k: v for k, v in vars(text.args).items() if v is not None},
        "vision_config": {"depth": 1},
    }
    compare_with_mlx_lm(tmp_path, config, weights, monkeypatch)
