"""Checkpoints that others have quantized: read as they were meant, or refused by their name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxtune.errors import ModelError
from mlxtune.export.convert import convert
from mlxtune.layers.dense import dense_tensors
from mlxtune.layers.inject import own_quantized_layers
from mlxtune.models.folder import folder_tensors
from mlxtune.models.load import load_model, model_config
from mlxtune.models.quantization import readable
from mlxtune.models.resolve import ModelSource
from support.compare import distance
from support.files import SHELL_TRAIN, write_jsonl
from support.models import QWEN3_MOE, no_tokenizer, save_real_vocabulary, tiny
from support.program import mlxtune
from support.quantized import GROUP, quantized_weights, save_quantized

IDS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])
KINDS = {
    "awq": ("awq", 4, {}),
    "gptq": ("gptq", 4, {}),
    "gptq-2-bits": ("gptq", 2, {}),
    "gptq-8-bits": ("gptq", 8, {"checkpoint_format": "gptq"}),
    "gptq-v2": ("gptq", 4, {"checkpoint_format": "gptq_v2", "sym": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-block llama with a real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_real_vocabulary(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_awq_and_gptq_are_trained_and_converted_as_they_were_meant(kind, folder, tmp_path):
    """Against what the codes, zeros and scales stand for before they were packed."""
    method, bits, said = KINDS[kind]
    want = save_quantized(folder, tmp_path / "m", method, bits, **said)
    source = ModelSource("m", tmp_path / "m")
    loaded = load_model(source, dtype="float32")
    assert "QuantizedLinear" in str(loaded.model.layers[0].mlp.up_proj)
    own_quantized_layers(loaded.model, mx.float32)
    trained = {tensor.name: tensor.source().load() for tensor in dense_tensors(loaded.model)}
    converted = {t.name: t.load() for t in folder_tensors(source.path, model_config(source))}
    for got in (trained, converted):
        assert got.keys() == want.keys()
        for name, values in want.items():
            np.testing.assert_allclose(got[name], values, rtol=0, atol=1e-6, err_msg=name)
    made = convert(str(source.path), tmp_path / "m.gguf", file_type="f32", verify=False)
    again = load_model(ModelSource("again", made.path), dtype="float32")
    assert distance(again.model(IDS), loaded.model(IDS)) < 1e-4


def test_experts_that_awq_packed_one_by_one_are_put_together(tmp_path, monkeypatch):
    model = tiny("qwen3_moe", **QWEN3_MOE)
    given: dict[str, mx.array] = {}
    for name, values in tree_flatten(model.parameters()):
        if ".switch_mlp." in name:
            names = (name.replace("switch_mlp", f"experts.{n}") for n in range(len(values)))
            given |= dict(zip(names, values, strict=True))
        else:
            given[name] = values
    weights, dense = quantized_weights(given, "awq")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    config = {k: v for k, v in vars(model.args).items() if v is not None}
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": GROUP}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("mlx_lm.utils.load_tokenizer", lambda *_, **__: no_tokenizer())
    source = ModelSource("m", tmp_path)
    loaded = load_model(source, dtype="float32")
    own_quantized_layers(loaded.model, mx.float32)
    trained = {tensor.name: tensor.source().load() for tensor in dense_tensors(loaded.model)}
    converted = {t.name: t.load() for t in folder_tensors(tmp_path, model_config(source))}
    name = "model.layers.1.mlp.switch_mlp.down_proj.weight"
    want = np.stack([dense[name.replace("switch_mlp", f"experts.{n}")] for n in range(8)])
    for got in (trained, converted):
        assert got.keys() == dict(tree_flatten(model.parameters())).keys()
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("zeros", [True, False])
def test_awq_is_what_mlx_lm_makes_of_it(zeros, folder, tmp_path):
    """Without zeros all of them are the middle of the codes."""
    save_quantized(folder, tmp_path / "m", "awq", zero_point=zeros)
    if not zeros:
        file = str(tmp_path / "m/model.safetensors")
        arrays = mx.load(file)
        kept = {name: array for name, array in arrays.items() if not name.endswith("qzeros")}
        mx.save_safetensors(file, kept)
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "m")
    ours = load_model(ModelSource("m", tmp_path / "m"), dtype="float32").model
    # mlx-lm keeps products of scales and zeros in sixteen bits.
    assert distance(ours(IDS), theirs(IDS).astype(mx.float32)) < 1e-2


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=pytest.mark.slow) for method in ("awq", "gptq")]
)
def test_every_verb_takes_a_quantized_checkpoint(method, folder, tmp_path):
    save_quantized(folder, tmp_path / "m", method)
    write_jsonl(
        tmp_path / "data.jsonl", [json.loads(x) for x in SHELL_TRAIN.read_text().splitlines()[:6]]
    )
    (tmp_path / "r.toml").write_text(RECIPE)
    for verb in (
        ("validate", "r.toml"),
        ("plan", "r.toml"),
        ("lora", "r.toml", "--output=run", "--force"),
        ("fuse", "run", "--output=fused"),
        ("convert", "m", "m.gguf", "--quantize=q8_0"),
        ("convert", "m", "packed", "--mlx-bits=4", "--group-size=32"),
        ("export", "run", "--quantize=f16", "--output=export"),
    ):
        done = mlxtune(*verb, cwd=tmp_path)
        assert done.returncode == 0, (verb, done.stderr)
    assert "quantization_config" not in json.loads((tmp_path / "fused/config.json").read_text())
    # A projection of what was trained, on top of what AWQ or GPTQ had left.
    assert json.loads((tmp_path / "fused/fuse.json").read_text())["top1_agreement"] == 1


RECIPE = """
name = "q"
[model]
path = "m"
[[data]]
path = "data.jsonl"
[lora]
rank = 4
[train]
batch_size = 2
max_steps = 2
max_seq_length = 512
gradient_checkpointing = false
"""

REFUSED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitnet": {"quant_method": "bitnet"},
    "hqq": {"quant_method": "hqq"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name_with_what_to_take(name, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    _say(tmp_path / "m", REFUSED[name])
    with pytest.raises(ModelError, match=f"quantized with {name}, which is not read") as told:
        model_config(ModelSource("m", tmp_path / "m"))
    assert "take the original model" in told.value.remedy


def _say(folder: Path, said: object, **more: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said} | more))


def test_every_verb_refuses_them_before_it_does_anything(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    _say(tmp_path / "m", REFUSED["fp8"])
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "r.toml").write_text(RECIPE)
    for verb in (
        ("validate", "r.toml"),
        ("plan", "r.toml"),
        ("data", "inspect", "r.toml"),
        ("lora", "r.toml", "--output=run"),
        ("convert", "m", "m.gguf"),
        ("chat", "m", "--prompt=hello"),
    ):
        done = mlxtune(*verb, cwd=tmp_path)
        assert done.returncode == 1, (verb, done.stdout)
        assert "quantized with fp8" in done.stderr, (verb, done.stderr)
        assert "download" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"m", "data.jsonl", "r.toml"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, "groups of -1"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "to 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "desc_act"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
            "layout 'marlin'",
        ),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"what": 1}, "does not name"),
    ],
)
def test_variants_that_mlx_cannot_hold_are_refused_by_what_they_are(said, words, tmp_path):
    for config in ({"quantization_config": said}, {"text_config": {"quantization_config": said}}):
        with pytest.raises(ModelError, match=words) as told:
            readable(config, tmp_path)
        assert told.value.where == str(tmp_path / "config.json")


def test_modelopt_says_it_in_a_file_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "m/hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="quantized with modelopt"):
        load_model(ModelSource("m", tmp_path / "m"))


@pytest.mark.parametrize(
    ("kind", "words"), [("g_idx", "its g_idx is in another order"), ("qzeros", "its qzeros is of")]
)
def test_a_layer_of_another_layout_than_its_config_says_is_named(kind, words, folder, tmp_path):
    save_quantized(folder, tmp_path / "m", "gptq")
    file = str(tmp_path / "m/model.safetensors")
    arrays = mx.load(file)
    name = f"model.layers.1.mlp.up_proj.{kind}"
    arrays[name] = arrays[name][::-1] if kind == "g_idx" else arrays[name][:, :-1]
    mx.save_safetensors(file, {k: mx.contiguous(v) for k, v in arrays.items()})
    source = ModelSource("m", tmp_path / "m")
    for read in (
        lambda: load_model(source),
        lambda: [t.load() for t in folder_tensors(source.path, model_config(source))],
    ):
        with pytest.raises(ModelError, match=f"model.layers.1.mlp.up_proj .*{words}"):
            read()


def test_mxfp8_is_read_as_mlx_lm_reads_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj"
    codes, scales = mx.quantize(weights[f"{name}.weight"], mode="mxfp8", group_size=32, bits=8)
    weights |= {f"{name}.weight": codes, f"{name}.scales": scales}
    mx.save_safetensors(str(tmp_path / "m/model.safetensors"), weights)
    _say(tmp_path / "m", {"quant_method": "mxfp8"})
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "m")
    source = ModelSource("m", tmp_path / "m")
    assert mx.array_equal(theirs(IDS), load_model(source, dtype="float32").model(IDS))
    read = {t.name: t.load() for t in folder_tensors(source.path, model_config(source))}
    want = mx.dequantize(codes, scales, mode="mxfp8", group_size=32, bits=8)
    assert np.array_equal(read[f"{name}.weight"], np.array(want.astype(mx.float32)))


def test_what_mlx_quantized_itself_is_read_as_before(tmp_path):
    config = {"quantization": {"group_size": 64, "bits": 4}}
    assert readable(config, tmp_path) is config
    only = {"quantization_config": {"group_size": 64, "bits": 4}}
    assert readable(only, tmp_path)["quantization"] == only["quantization_config"]
