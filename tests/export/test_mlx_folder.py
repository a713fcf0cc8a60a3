"""Folders for Ollama's MLX engine, as mlx-lm reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Qwen3Config

from mlxtune.errors import OutputExists
from mlxtune.export.convert import convert_to_folder
from mlxtune.export.mlx_bundle import export_for_mlx
from mlxtune.export.mlx_engine import KEEP, NotForEngine, refusal
from mlxtune.export.mlx_folder import write_mlx_folder
from mlxtune.fuse import fuse_run
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.metrics import Silent
from mlxtune.train.model import load_base
from mlxtune.train.session import fine_tune
from support.files import SHELL_HELDOUT
from support.models import LLAMA3

IDS = mx.array([[1, 5, 9, 2, 40, 7]])
Q = "self_attn.q_proj"


def tensors(folder):
    return mx.load(str(folder / "model.safetensors"))


def copied(model, to):
    return Path(shutil.copytree(model, to))


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def quantized(once, tiny_folder):
    """The tiny model, quantized by MLX."""
    make = lambda path: convert_to_folder(str(tiny_folder), path / "m", mlx_bits=4, group_size=32)  # noqa: E731
    return once("quantized tiny model", make) / "m"


@pytest.fixture(scope="module")
def run(once, recipe, few, quantized):
    """Trained on one kind of projection of it."""
    settings = recipe(
        few,
        model={"path": str(quantized)},
        lora={"target_modules": ["q_proj"]},
        eval={"path": str(SHELL_HELDOUT), "max_samples": 8},
        train={"max_steps": 3},
    )
    return once("run on a quantized tiny model", lambda path: fine_tune(settings, path, Silent()))


@pytest.fixture(scope="module")
def kept(run, tmp_path_factory):
    return export_for_mlx(run, output=tmp_path_factory.mktemp("kept") / "out")


def test_what_no_adapter_has_changed_stays_to_the_bit(kept, quantized):
    got, base = tensors(kept.folder), tensors(quantized)
    assert got.keys() == base.keys()
    same = [n for n in base if Q not in n]
    assert all(mx.array_equal(got[name], base[name]) for name in same)
    packed = [name for name in same if not name.endswith("norm.weight")]
    assert all(got[name].dtype == base[name].dtype for name in packed)
    assert not mx.array_equal(got[f"model.layers.0.{Q}.weight"], base[f"model.layers.0.{Q}.weight"])
    # Of two blocks of seven matrices, and the embeddings.
    assert (kept.quantized.kept, kept.quantized.rounded, kept.quantized.floats) == (13, 2, 0)


def test_what_it_has_changed_is_quantized_once(kept, run, tmp_path):
    fuse_run(run, tmp_path / "fused", dtype="float32")
    name = f"model.layers.1.{Q}"
    weight = tensors(tmp_path / "fused")[f"{name}.weight"]
    want = mx.quantize(weight, group_size=32, bits=4)
    got = [tensors(kept.folder)[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_it_is_quantized_in_the_type_of_the_bases_scales(run, quantized, tmp_path):
    """Most published folders have scales in bfloat16."""
    base = copied(quantized, tmp_path / "base")
    arrays = tensors(base)
    floats = {n: a.astype(mx.bfloat16) for n, a in arrays.items() if a.dtype != mx.uint32}
    mx.save_safetensors(str(base / "model.safetensors"), arrays | floats, {"format": "mlx"})
    changed(base / "config.json", torch_dtype="bfloat16", dtype="bfloat16")
    made = export_for_mlx(run, base=str(base), output=tmp_path / "out")
    got, name = tensors(made.folder), f"model.layers.0.{Q}"
    assert all(mx.array_equal(got[n], tensors(base)[n]) for n in got if Q not in n)
    assert {a.dtype for a in got.values()} == {mx.uint32, mx.bfloat16}
    fuse_run(run, tmp_path / "fused", base=str(base), dtype="float32")
    weight = tensors(tmp_path / "fused")[f"{name}.weight"]
    want = mx.quantize(weight.astype(mx.bfloat16), group_size=32, bits=4)
    parts = [got[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    assert all(mx.array_equal(a, b) for a, b in zip(parts, want, strict=True))


def test_mlx_lm_computes_from_it_what_we_compute_from_it(kept):
    theirs, _ = mlx_lm.load(str(kept.folder))
    ours = load_base(ModelSection(path=str(kept.folder))).model
    logits = [np.array(model(IDS).astype(mx.float32)) for model in (theirs, ours)]
    assert np.abs(logits[0]).max() > 0.1
    assert np.abs(logits[0] - logits[1]).max() < 1e-3


def test_the_loss_of_what_was_written_is_measured(kept):
    assert kept.measured_on == 8
    assert kept.loss_after == pytest.approx(kept.loss_before, abs=0.2)
    assert kept.loss_after != kept.loss_before


PACKINGS = {
    "int4": (4, 64, "affine"),
    "int8": (8, 64, "affine"),
    "nvfp4": (4, 16, "nvfp4"),
    "mxfp4": (4, 32, "mxfp4"),
    "mxfp8": (8, 32, "mxfp8"),
}


@pytest.mark.parametrize("kind", PACKINGS)
def test_mlx_lm_loads_every_way_of_quantizing(tiny_run, tmp_path, kind):
    made = export_for_mlx(tiny_run, kind=kind, output=tmp_path / "out")
    model, _ = mlx_lm.load(str(made.folder))
    layers = [m for _, m in model.named_modules() if hasattr(m, "bits")]
    assert len(layers) == made.quantized.rounded > 10
    assert {(m.bits, m.group_size, m.mode) for m in layers} == {PACKINGS[kind]}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_floats_are_the_fused_model(tiny_run, tmp_path, kind):
    made = export_for_mlx(tiny_run, kind=kind, output=tmp_path / "out")
    fuse_run(tiny_run, tmp_path / "fused", dtype="float32")
    model, _ = mlx_lm.load(str(made.folder))
    fused, _ = mlx_lm.load(str(tmp_path / "fused"))
    want = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}[kind]
    assert {array.dtype for array in tensors(made.folder).values()} == {want}
    bound = {"f32": 0, "f16": 0.01, "bf16": 0.1}[kind]
    difference = np.abs(np.array(model(IDS).astype(mx.float32)) - np.array(fused(IDS)))
    assert difference.max() <= bound


def test_a_layer_of_other_bits_is_written_in_floats(run, quantized, tmp_path):
    base = copied(quantized, tmp_path / "base")
    arrays, name = tensors(quantized), "model.layers.0.mlp.up_proj"
    parts = [arrays[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    full = mx.dequantize(*parts, group_size=32, bits=4)
    parts = mx.quantize(full, group_size=32, bits=8)
    for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
        arrays[f"{name}.{part}"] = array
    mx.save_safetensors(str(base / "model.safetensors"), arrays, {"format": "mlx"})
    config = json.loads((base / "config.json").read_text())
    config["quantization"][name] = {"group_size": 32, "bits": 8}
    (base / "config.json").write_text(json.dumps(config))
    made = export_for_mlx(run, base=str(base), output=tmp_path / "out")
    got = tensors(made.folder)
    assert f"{name}.scales" not in got and made.quantized.floats == 1
    want = mx.dequantize(*parts, group_size=32, bits=8)
    assert mx.array_equal(got[f"{name}.weight"], want.astype(got[f"{name}.weight"].dtype))
    model, _ = mlx_lm.load(str(made.folder))
    block = model.layers[0].mlp
    assert not hasattr(block.up_proj, "bits") and block.down_proj.bits == 4


def test_all_that_the_engine_reads_is_in_json(kept):
    said = json.loads((kept.folder / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in said["chat_template"] and said["add_bos_token"] is False
    assert not (kept.folder / "chat_template.jinja").exists()
    ends = json.loads((kept.folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((kept.folder / "config.json").read_text())["eos_token_id"]
    assert json.loads((kept.folder / "config.json").read_text())["quantization"]["bits"] == 4


def test_every_end_of_an_answer_is_listed(tiny_run, tiny_folder, tmp_path):
    """The engine stops at those of generation_config.json."""
    base = copied(tiny_folder, tmp_path / "base")
    end = json.loads((base / "config.json").read_text())["eos_token_id"]
    said = {"eos_token_id": [end, 5, 7], "temperature": 0.5}
    (base / "generation_config.json").write_text(json.dumps(said))
    made = export_for_mlx(tiny_run, base=str(base), output=tmp_path / "out")
    got = json.loads((made.folder / "generation_config.json").read_text())
    assert sorted(got["eos_token_id"]) == [5, 7, end] and got["temperature"] == 0.5
    _, tokenizer = mlx_lm.load(str(made.folder))
    assert tokenizer.eos_token_ids == {5, 7, end}


def test_the_rotation_stands_where_the_engine_reads_it(tiny_folder, tmp_path):
    """transformers 5 writes `rope_parameters`, of which it knows nothing."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((tiny_folder / "config.json").read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    write_mlx_folder(tmp_path / "out", load_base(ModelSection(path=str(tmp_path / "model"))), KEEP)
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 5e5


def test_a_second_export_is_the_first_or_is_refused(run, tmp_path):
    made = export_for_mlx(run, output=tmp_path / "out")
    again = export_for_mlx(run, output=tmp_path / "out")
    assert again.written_before and not made.written_before
    assert (again.loss_after, again.size) == (made.loss_after, made.size)
    with pytest.raises(OutputExists, match="quantized otherwise"):
        export_for_mlx(run, kind="int8", output=tmp_path / "out")
    assert export_for_mlx(run, kind="bf16").folder.name == "mlx-bf16"
    shutil.rmtree(run / "export")


def test_what_was_trained_on_is_not_taken_for_what_was_exported(run, tmp_path):
    """Another adapter has taken the place of the one that was written."""
    trained = copied(run, tmp_path / "run")
    made = export_for_mlx(trained)
    before = tensors(made.folder)[f"model.layers.0.{Q}.weight"]
    mx.eval(before)
    weights = trained / "adapter/adapters.safetensors"
    arrays = {name: array + 0.5 for name, array in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), arrays)
    with pytest.raises(OutputExists, match="another adapter"):
        export_for_mlx(trained)
    again = export_for_mlx(trained, overwrite=True)
    assert again.folder == made.folder and not again.written_before
    assert not mx.array_equal(tensors(again.folder)[f"model.layers.0.{Q}.weight"], before)


def test_every_kind_has_a_folder_of_its_own(tiny_run, tmp_path):
    trained = copied(tiny_run, tmp_path / "run")
    folders = [export_for_mlx(trained, kind=kind).folder for kind in ("int8", "f16")]
    assert [folder.name for folder in folders] == ["mlx-int8", "mlx-f16"]
    assert all((folder / "model.safetensors").is_file() for folder in folders)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rope_theta": 1e4,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "head_dim": 32}
GEMMA3 = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
TWO = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"head_dim": 16, "rope_scaling": None},
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        QWEN3,
        GEMMA3,
        GEMMA3 | {"rope_parameters": TWO},
    ],
)
def test_what_the_engine_computes(config):
    assert refusal(config) is None


# With tiny random models the real engine's log-probabilities were MLX's within 1e-4 for what is
# accepted, and 0.01 to 1.6 off for what is refused.
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling (llama3)"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling (llama3)"),
        (LLAMA | {"head_dim": 32}, "16 wide"),
        (QWEN3 | {"rms_norm_eps": 1e-5}, "epsilon"),
        (QWEN3 | {"rope_scaling": {"type": "yarn"}}, "rope_scaling (yarn)"),
        (GEMMA3 | {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar"),
        (GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "(linear)"),
        (LLAMA | {"architectures": ["Phi3ForCausalLM"]}, "no Phi3ForCausalLM"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused_by_name(config, said):
    assert said in refusal(config)


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
STRETCHED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


def written(config, architecture):
    """As transformers writes a config.json."""
    return json.loads(config.to_json_string()) | {"architectures": [architecture]}


def test_configs_that_transformers_writes_are_read():
    small = LlamaConfig(**SMALL)
    assert refusal(written(small, "LlamaForCausalLM")) is None
    assert refusal(written(Qwen3Config(**SMALL), "Qwen3ForCausalLM")) is None
    assert refusal(written(Gemma3TextConfig(), "Gemma3ForCausalLM")) is None
    assert refusal(written(Gemma3Config(), "Gemma3ForConditionalGeneration")) is None


def test_what_transformers_writes_of_a_stretched_rotation_is_seen():
    llama = written(LlamaConfig(**SMALL, rope_parameters=LLAMA3), "LlamaForCausalLM")
    assert "rope_scaling (llama3)" in refusal(llama)
    text = Gemma3TextConfig(rope_parameters=TWO | {"full_attention": STRETCHED})
    assert "rope_scaling (linear)" in refusal(written(text, "Gemma3ForCausalLM"))
    whole = written(Gemma3Config(text_config=text), "Gemma3ForConditionalGeneration")
    assert "rope_scaling (linear)" in refusal(whole)


def test_such_a_run_is_refused_before_anything_is_written(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxtune.export.mlx_bundle.refusal", lambda _config: "no such thing")
    with pytest.raises(NotForEngine, match="no such thing") as raised:
        export_for_mlx(tiny_run, output=tmp_path / "out")
    assert "--engine gguf" in raised.value.remedy and not (tmp_path / "out").exists()
