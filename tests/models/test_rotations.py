"""Packs of many architectures under every rotation that mlx-lm knows, against each record alone."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.rope_utils import initialize_rope
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from mlxtune.arrays import flat
from mlxtune.data.pack import pack
from mlxtune.errors import ModelError
from mlxtune.evaluate.answers import answers
from mlxtune.models.enable import enable_packs, enable_packs_by, pack_kind
from mlxtune.models.load import load_model
from mlxtune.models.packed import OwnAttention, PackCache
from mlxtune.models.resolve import resolve_model
from mlxtune.models.rotation import DynamicRope, take_positions
from mlxtune.models.skeleton import block_kinds, built, tiny_twin
from support import models
from support.compare import distance, loss_of_batch, loss_of_each_alone, random_samples

# Records of some dozen tokens are longer than what these stretch.
ORIGINAL = {"original_max_position_embeddings": 16}
ROTATIONS = {
    "plain": None,
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | ORIGINAL,
    "yarn": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7} | ORIGINAL,
    "longrope": {
        "type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + 0.2 * n for n in range(16)],
    }
    | ORIGINAL,
    "mrope": {"type": "mrope", "mrope_section": [4, 6, 6]},
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
SCALES = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}
STRETCHED = ("linear", "dynamic", "llama3", "yarn", "longrope", "mrope")
# Architectures, what they need beside the sizes of `models.tiny`, and the rotations they know.
KINDS = {
    "llama": (WINDOWS, STRETCHED),
    "internlm2": ({"bias": False}, ("plain", "linear", "dynamic")),
    "internlm3": ({}, ("plain", "linear", "dynamic")),
    "phi3": ({"original_max_position_embeddings": 16}, ("plain", "longrope")),
    "qwen2": ({}, STRETCHED),
    "qwen3": ({}, STRETCHED),
    "gpt_oss": (EXPERTS | WINDOWS, ("plain", "linear", "llama3", "yarn")),
    "granite": (SCALES, STRETCHED),
    "olmo2": ({"attention_bias": False}, STRETCHED),
    "olmo3": (WINDOWS, STRETCHED),
    "gemma3_text": ({"sliding_window": 6, "sliding_window_pattern": 2}, STRETCHED),
    "mixtral": (EXPERTS, STRETCHED),
    "qwen3_moe": (EXPERTS, STRETCHED),
    "minicpm": ({"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}, STRETCHED),
    "seed_oss": ({"attention_bias": False}, STRETCHED),
    "mimo": ({}, STRETCHED),
    "gemma2": ({"query_pre_attn_scalar": 1.0, "attn_logit_softcapping": 5.0}, ("plain",)),
    "cohere2": ({"sliding_window": 6, "sliding_window_pattern": 2}, ("plain",)),
    "smollm3": ({"no_rope_layer_interval": 2}, ("plain",)),
}
# The published ones, those with factors for each dimension, and one of each other rotation.
QUICK = [
    ("internlm2", "dynamic"),
    ("internlm3", "dynamic"),
    ("phi3", "longrope"),
    ("gpt_oss", "yarn"),
    ("llama", "llama3"),
    ("gemma3_text", "linear"),
    ("qwen2", "mrope"),
]
PAIRS = [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else [pytest.mark.slow])
    for kind, (_, names) in KINDS.items()
    for name in names
]
SAMPLES = random_samples((40, 23, 31, 19, 50, 22), prefix=17, untrained=18)


def config_of(kind, rotation, **changes):
    """Heads of 32 dimensions, which a small model does not have."""
    config = {"model_type": kind, "hidden_size": 128, "num_hidden_layers": 2}
    config |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 128, "rope_theta": 10000.0}
    config |= {"max_position_embeddings": 512, "tie_word_embeddings": False}
    said = ROTATIONS[rotation]
    if said is not None:
        config["rope_scaling"] = said | {"rope_type": said["type"]}
    return config | KINDS[kind][0] | changes


def random_model(config):
    """A model of a config as mlx-lm makes it, none of whose weights are zeros or ones."""
    mx.random.seed(0)
    theirs, arguments = mlx_lm.utils._get_classes(config)
    model = theirs(arguments.from_dict(config))
    noise = [(k, a + 0.1 * mx.random.normal(a.shape)) for k, a in flat(model.parameters()).items()]
    model.update(tree_unflatten(noise))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(("kind", "rotation"), PAIRS)
def test_a_pack_gives_what_each_record_gives_alone(kind, rotation):
    config = config_of(kind, rotation)
    model, untouched = random_model(config), random_model(config)
    enable_packs_by(model, config)
    want = loss_of_each_alone(untouched, SAMPLES)
    assert loss_of_batch(model, pack(SAMPLES)).item() == pytest.approx(want.item(), rel=1e-5)


def rotations_of(model):
    return {type(layer.self_attn.rope) for layer in model.layers}


@pytest.mark.parametrize("rotation", STRETCHED)
def test_a_twin_has_the_rotation_of_its_model(rotation):
    config = config_of("llama", rotation)
    twin, model = tiny_twin(config), built(config)
    assert rotations_of(twin) == rotations_of(model)
    assert not any(isinstance(rope, type(None)) for rope in rotations_of(twin))
    assert twin.args.rope_scaling["type"] == rotation


def test_a_window_that_packs_do_not_keep_is_seen_however_wide_it_is(monkeypatch):
    config = config_of("llama", "plain", sliding_window=4096)
    enable_packs_by(random_model(config), config)
    mask = PackCache.mask
    monkeypatch.setattr(PackCache, "mask", lambda self, _window=None, block=None: mask(self))
    with pytest.raises(ModelError, match="logits differ"):
        enable_packs_by(random_model(config), config)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
        ("deepseek", {"first_k_dense_replace": 3, "n_routed_experts": 4, "n_shared_experts": 1}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}),
        (
            "llama",
            {"sliding_window": 64, "layer_types": ["full_attention"] * 7 + ["sliding_attention"]},
        ),
    ],
)
def test_a_twin_has_a_block_of_each_kind(kind, changes):
    config = config_of("llama", "plain", model_type=kind, num_hidden_layers=8) | changes
    if kind == "deepseek":
        config |= {"num_experts_per_tok": 2, "moe_layer_freq": 1, "moe_intermediate_size": 32}
    config.pop("layer_types" if "layer_types" not in changes else "", None)
    assert set(block_kinds(tiny_twin(config))) == set(block_kinds(built(config)))


def test_weights_of_a_twin_hide_nothing():
    """Sinks of GPT-OSS are zeros at first, as gates of others are."""
    twin = tiny_twin(config_of("gpt_oss", "plain"))
    constant = [
        k
        for k, a in flat(twin.parameters()).items()
        if a.size > 1 and mx.all(a == a.flatten()[0]).item()
    ]
    assert not constant


# ------------------------------------------------------------------- dynamic NTK scaling


def dynamic(limit=64):
    scaling = {"type": "dynamic", "factor": 2.0}
    theirs = initialize_rope(16, 10000.0, False, scaling, max_position_embeddings=limit)
    return theirs, DynamicRope(theirs)


@pytest.mark.parametrize(("length", "offset"), [(5, 0), (5, 7), (80, 0), (1, 90)])
def test_one_text_turns_as_mlx_lm_turns_it(length, offset):
    theirs, ours = dynamic()
    x = mx.random.normal((1, 2, length, 16), key=mx.random.key(0))
    assert mx.array_equal(ours(x, offset=offset), theirs(x, offset=offset)).item()
    # Told as a position for each entry, it is the same but for rounding.
    assert distance(ours(x, offset=mx.array([offset])), theirs(x, offset=offset)) < 1e-4


@pytest.mark.parametrize("longest", [40, 100, 200])
def test_a_batch_turns_as_transformers_turns_it(longest):
    """The longest of a batch decides for all of it: transformers takes its last position."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = Qwen2Config(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters=scaling,
    )
    positions = [3, longest - 1, 17]
    embedding = Qwen2RotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.tensor(positions)[:, None])
    x = mx.random.normal((3, 1, 1, 16), key=mx.random.key(1))
    turned = mx.concatenate([-x[..., 8:], x[..., :8]], axis=-1)
    cos, sin = (mx.array(a.numpy())[:, None] for a in (cos, sin))
    _, ours = dynamic()
    assert distance(ours(x, offset=mx.array(positions)), x * cos + turned * sin) < 1e-4


def test_answers_of_several_prompts_at_once_are_those_of_each_alone(tmp_path):
    """mlx-lm's own rotation cannot be given a position for each of several prompts."""
    models.save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0, "rope_type": "dynamic"}
    config["max_position_embeddings"] = 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(resolve_model(str(tmp_path)))
    prompts = [loaded.tokenizer.encode(text) for text in ("list files", "who", "a b c d")]
    together = answers(loaded.model, loaded.tokenizer, prompts, max_tokens=6)
    alone = [answers(loaded.model, loaded.tokenizer, [p], max_tokens=6)[0] for p in prompts]
    assert together == alone


def test_a_model_that_takes_positions_generates_as_before():
    config = config_of("internlm2", "dynamic", max_position_embeddings=8)
    model, untouched = random_model(config), random_model(config)
    take_positions(model)
    ours, theirs = make_prompt_cache(model), make_prompt_cache(untouched)
    tokens = mx.array([list(range(1, 13))])
    for part in (tokens, tokens[:, :1], tokens[:, 1:2]):
        assert mx.array_equal(model(part, cache=ours), untouched(part, cache=theirs)).item()


# config.json of internlm/internlm2_5-7b-chat and internlm/internlm3-8b-instruct.
INTERNLM = {
    "internlm2": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "vocab_size": 92544,
    },
    "internlm3": {
        "hidden_size": 4096,
        "head_dim": 128,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "qkv_bias": False,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        "rope_theta": 50000000,
        "vocab_size": 128512,
    },
}


@pytest.mark.parametrize("kind", INTERNLM)
def test_internlm_as_published_takes_packs(kind):
    config = INTERNLM[kind] | {"model_type": kind, "num_attention_heads": 32, "bias": False}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
    config |= {"tie_word_embeddings": False}
    twin = tiny_twin(config)
    assert twin.args.rope_scaling == config["rope_scaling"]
    enable_packs(twin)
    assert pack_kind(twin) is OwnAttention
