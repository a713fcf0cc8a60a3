"""Every architecture as GGUF in llama.cpp, against the same model in mlx-lm.

Small models with random weights, trained for a moment on one text, so that they are sure
of something; real tokenizers.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from mlxtune.adapters.store import save_adapter
from mlxtune.export.adapter import export_adapter
from mlxtune.export.convert import convert, convert_to_folder
from mlxtune.gguf.model import read_config
from mlxtune.gguf.reader import GGUFFile
from mlxtune.layers.inject import projections
from mlxtune.models.load import load_model
from mlxtune.models.resolve import ModelSource, resolve_model
from support.llamacpp import next_tokens
from support.models import LLAMA3, REAL_TOKENS, real_vocabulary, with_adapters

TEXT = (
    "To find the ten largest files below a folder, list all with their sizes, sort the "
    "list and keep its end: du -a . | sort -n | tail -n 10"
)
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "vocab_size": REAL_TOKENS,
    "rope_theta": 50_000.0,
    "tie_word_embeddings": True,
}
GEMMA = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "rope_theta": 10_000.0,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": REAL_TOKENS,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-3-rope": {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    # mlx-lm and llama.cpp let it look back without bounds whatever its window is.
    "mistral": {"head_dim": 32, "sliding_window": 16},
    "qwen2": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "qwen3": {
        "head_dim": 64,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    # mlx-lm lets Gemma 2 look back without bounds, so the text is shorter than the window.
    "gemma2": GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA
    | {"num_hidden_layers": 7, "rope_theta": 1e6, "rope_local_base_freq": 10_000.0}
    | {"sliding_window_pattern": 6, "sliding_window": 16},
    "gemma4": GEMMA4
    | {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 64, "use_double_wide_mlp": True},
    "gemma4, values from keys": GEMMA4
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
    | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "phi3": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "smollm3": {"num_hidden_layers": 5},
    "granite": {
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gpt_oss": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "intermediate_size": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
    "qwen3_5": {
        "num_hidden_layers": 4,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
        },
    },
}

# Steps and rate where these must be other than usual: at a higher rate smollm3 learns
# activations so large that eight bits of them err, and with the others attention comes to
# count for nothing beside the MLP; others stay unsure with one number of threads or another, or
# on one processor or another, whose products round otherwise.
TRAINING = dict.fromkeys(("llama", "llama-3-rope", "qwen2", "qwen3_moe", "smollm3"), (40, 3e-3))
TRAINING |= dict.fromkeys(("gemma4, values from keys", "granite", "mistral", "phi3"), (80, 2e-3))
TRAINING |= {"gpt_oss": (30, 1e-3), "qwen3_5": (10, 3e-3)}


def config_of(name: str) -> dict[str, Any]:
    own = MODELS[name]
    return {"model_type": name, **COMMON, **own}


@pytest.fixture(scope="session")
def tokenizer():
    return real_vocabulary()


def trained(config: dict[str, Any], tokens: list[int], steps: int, rate: float) -> nn.Module:
    """A model that knows one text by heart."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    if config["tie_word_embeddings"] and "lm_head" in model:
        model.sanitize({})  # gemma3_text learns from its weights that its head is tied
    for block in model.layers:
        # Begun alike for all heads, they would not tell one head from another.
        for part, name in (("self_attn", "sinks"), ("linear_attn", "dt_bias")):
            if name in block.get(part, {}):
                block[part][name] = mx.random.normal(block[part][name].shape)
    mx.eval(model.parameters())
    model.freeze(keys=["embed_tokens"], strict=False)
    for layer in [model.model.embed_tokens, *([model.lm_head] if "lm_head" in model else [])]:
        layer.freeze()
    x = mx.array([tokens])
    optimizer = optim.Adam(rate)

    def loss(x: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:]).mean()

    step = nn.value_and_grad(model, loss)
    for _ in range(steps):
        _, gradient = step(x)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
    return model


def written(
    name: str, tokenizer, place: Path, *, plain=False, untrained=False
) -> tuple[Path, list[int]]:
    """A folder of Hugging Face's layout, and the text's tokens.

    With `plain` the positions are not scaled, which mistral.rs does from GGUF for none, and
    a Mistral has no window.
    """
    config = config_of(name)
    if plain:
        config |= {"rope_scaling": None}
        config |= {"sliding_window": None} if name == "mistral" else {}
    tokens = tokenizer.encode(TEXT)
    steps, rate = TRAINING.get(name, (30, 1e-2))
    model = trained(config, tokens, 0 if untrained else steps, rate)
    folder = place / ("Mistral-7B-x" if name == "mistral" else "model")
    folder.mkdir()
    tokenizer.save_pretrained(str(folder))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tokens


SLOW = pytest.mark.slow
# One of each form; CI runs them all.
FEW = ("llama",)


ADAPTED = ("llama-3-rope", "qwen3", "gemma3_text", "gemma4", "qwen3_5")


def each(names):
    return [name if name in FEW else pytest.param(name, marks=SLOW) for name in names]


ALL = each(MODELS)


@pytest.fixture(scope="module", params=ALL)
def source(request, tokenizer, tmp_path_factory):
    return written(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


def logprobs(model: nn.Module, tokens: list[int]) -> np.ndarray:
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_f32_gives_the_log_probabilities_of_mlx(source, tmp_path):
    folder, tokens = source
    made = convert(str(folder), tmp_path / "m.gguf", file_type="f32")
    assert made.verified.readback.worst_error < 1e-6  # a norm's +1 rounds
    assert made.verified.llamacpp.mean_kl < 1e-3
    want = logprobs(load_model(ModelSource("x", folder)).model, tokens)
    places = [1, 2, 3, 17, 33, len(tokens) - 1]
    for place, (ids, got) in zip(places, next_tokens(made.path, tokens, places), strict=True):
        assert np.abs(want[place - 1][ids] - got).max() < 1e-3, place
    # The way back: the file itself in MLX, and as a folder that mlx-lm loads.
    again = load_model(resolve_model(str(made.path))).model
    assert np.abs(logprobs(again, tokens) - want).max() < 1e-3
    convert_to_folder(str(made.path), tmp_path / "folder")
    loaded, _ = mlx_lm.utils.load_model(tmp_path / "folder")
    assert np.abs(logprobs(loaded, tokens) - want).max() < 1e-3


def arguments(config: dict[str, Any]) -> list[dict[str, Any]]:
    """What mlx-lm makes of a config, and of the language model's part where it has one."""
    model_class, args_class = mlx_lm.utils._get_classes(config)
    args = args_class.from_dict(copy.deepcopy(config))
    if not hasattr(args, "text_config"):
        return [vars(args)]
    inner = sys.modules[model_class.__module__].TextModelArgs
    rest = {key: value for key, value in vars(args).items() if key != "text_config"}
    return [rest, vars(inner.from_dict(args.text_config))]


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_of_a_gguf_is_read_by_mlx_as_the_file_is(name, tokenizer, tmp_path):
    folder, _ = written(name, tokenizer, tmp_path, untrained=True)
    path = convert(str(folder), tmp_path / "m.gguf", file_type="f32", verify=False).path
    convert_to_folder(str(path), tmp_path / "folder", verify=False)
    plain = {k: v for k, v in read_config(GGUFFile(path))[1].items() if v is not None}
    full = json.loads((tmp_path / "folder/config.json").read_text())
    assert full | plain == full
    # More is said, in the names of published models, and none of it changes the model.
    assert {"attention_dropout", "initializer_range"} <= full.keys() - plain.keys()
    assert arguments(full) == arguments(plain)


@SLOW
@pytest.mark.parametrize(("name", "kind"), [("gemma3_text", "gemma3"), ("gemma4", "gemma4")])
@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_a_language_model_beside_what_looks_at_images(name, kind, layout, tokenizer, tmp_path):
    """As Gemma 3 of 4B and more is published, by older and newer transformers."""
    folder, tokens = written(name, tokenizer, tmp_path)
    text = json.loads((folder / "config.json").read_text())
    if kind == "gemma3":
        text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
        (folder / "config.json").write_text(json.dumps(text))
    want = logprobs(load_model(ModelSource("x", folder)).model, tokens)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name.replace("model.", layout, 1): array for name, array in weights.items()}
    for name in ("vision_tower.a.weight", "multi_modal_projector.b.weight"):
        name = name if layout.startswith("language") else f"model.{name}"
        weights[name] = mx.zeros((3, 3))
    mx.save_safetensors(str(whole / "model.safetensors"), weights, {"format": "mlx"})
    config = {"model_type": kind, "vocab_size": text["vocab_size"], "text_config": text}
    (whole / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 1}}))
    # mlx-lm itself loads Gemma 3 by its older names alone.
    runs = kind == "gemma4" or layout.startswith("language")
    made = convert(str(whole), tmp_path / "m.gguf", file_type="f32", verify=runs)
    assert not runs or made.verified.llamacpp.mean_kl < 1e-3
    places = [1, 2, 3, 17, 33, len(tokens) - 1]
    for place, (ids, got) in zip(places, next_tokens(made.path, tokens, places), strict=True):
        assert np.abs(want[place - 1][ids] - got).max() < 1e-3, place
    convert_to_folder(str(made.path), tmp_path / "back")
    convert_to_folder(str(whole), tmp_path / "out")
    for path in (made.path, tmp_path / "back", tmp_path / "out"):
        again = load_model(resolve_model(str(path))).model
        assert np.abs(logprobs(again, tokens) - want).max() < 1e-3


@pytest.mark.parametrize("file_type", ["q8_0", "q4_k_m"])
def test_quantized_files_say_the_same(source, tmp_path, file_type):
    folder, tokens = source
    made = convert(str(folder), tmp_path / "m.gguf", file_type=file_type, verify=False)
    want = logprobs(load_model(ModelSource("x", folder)).model, tokens)
    # Where MLX's two best tokens nearly tie, eight bits decide, whoever computes.
    second, first = np.sort(want[:-1], axis=-1)[:, -2:].T
    places = (np.flatnonzero(first - second > 0.5) + 1).tolist()
    assert len(places) >= 15
    found = next_tokens(made.path, tokens, places, count=1)
    same = [
        ids[0] == want[place - 1].argmax() for place, (ids, _) in zip(places, found, strict=True)
    ]
    read = load_model(resolve_model(str(made.path))).model  # packed where MLX can hold it
    said = logprobs(read, tokens)
    same_in_mlx = [said[place - 1].argmax() == want[place - 1].argmax() for place in places]
    least = {"q8_0": 0.99, "q4_k_m": 0.9}[file_type]
    assert np.mean(same) >= least
    assert np.mean(same_in_mlx) >= least


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=SLOW) for name in ADAPTED)],
)
def test_an_adapter_as_gguf_does_in_llama_cpp_what_it_does_in_mlx(name, tokenizer, tmp_path):
    folder, tokens = written(name, tokenizer, tmp_path)
    base = convert(str(folder), tmp_path / "m.gguf", file_type="f32", verify=False).path
    loaded = load_model(ModelSource(str(folder), folder)).model
    plain = logprobs(loaded, tokens)
    paths = [path for path in projections(loaded) if ".layers." in path or path == "lm_head"]
    adapted = with_adapters(loaded, paths)
    save_adapter(tmp_path / "adapter", adapted, base=str(folder))
    made = export_adapter(tmp_path / "adapter", "gguf", output=tmp_path / "out")
    want = logprobs(adapted, tokens)
    assert np.abs(want - plain).max() > 0.05
    places = [1, 9, len(tokens) - 1]
    found = next_tokens(base, tokens, places, adapter=made.folder / "adapter.gguf")
    for place, (ids, got) in zip(places, found, strict=True):
        assert np.abs(want[place - 1][ids] - got).max() < 1e-3, place


# What mistral.rs reads of GGUF among these; docs/export.md says what keeps it from others.
@pytest.fixture(
    scope="module",
    params=[
        *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
        *("phi3", "smollm3", "gemma2", "gemma3_text"),
    ],
)
def plain_source(request, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    return written(request.param, tokenizer, place, plain=True)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["f32", "q8_0", "q4_k_m"])
def test_mistral_rs_goes_on_as_mlx_does(plain_source, tokenizer, tmp_path, file_type):
    mistralrs = pytest.importorskip("mistralrs")
    folder, tokens = plain_source
    made = convert(str(folder), tmp_path / "m.gguf", file_type=file_type, verify=False)
    which = mistralrs.Which.GGUF(
        quantized_model_id=str(tmp_path), quantized_filename=made.path.name
    )
    runner = mistralrs.Runner(which=which)
    same = sure = 0
    # It rounds what goes into a packed product to eight bits, MLX does not: what counts is
    # where the file in MLX is sure.
    plain = file_type == "f32"
    least = 0.0 if plain else 0.5
    given = ModelSource("x", folder) if plain else resolve_model(str(made.path))
    model = load_model(given).model
    for start in (0,) if plain else range(0, 30, 3):
        known = tokens[start : start + 10]
        text = tokenizer.decode(known)
        assert runner.tokenize_text(text, False, None) == known
        answer = runner.send_completion_request(
            mistralrs.CompletionRequest(
                prompt=text, model="default", max_tokens=12, temperature=0.0
            )
        )
        want = list(itertools.takewhile(lambda one: one[1] > least, greedy(model, known, 12)))
        said = tokenizer.decode([token for token, _ in want])
        sure += bool(want)
        same += bool(want) and answer.choices[0].text.startswith(said)
    assert same >= 0.9 * sure > 0


def greedy(model: nn.Module, tokens: list[int], count: int) -> list[tuple[int, float]]:
    """mlx-lm's own generation, and by how much each token is better than the second best."""
    found = []
    for token, row in generate_step(mx.array(tokens), model, max_tokens=count):
        second, first = mx.sort(row)[-2:].tolist()
        found.append((int(token), first - second))
    return found
