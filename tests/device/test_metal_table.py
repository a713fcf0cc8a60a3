"""Training steps as they are taken on a GPU: nothing in them that MLX has no Metal kernel for."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxtune.bench.graph import trace
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.step import StepModel
from mlxtune.data.pack import pack, pad
from mlxtune.device import as_on_gpu
from mlxtune.train.neftune import add_embedding_noise
from mlxtune.train.step import LossFunction
from support.compare import random_groups
from support.metal import not_on_metal
from support.models import GEMMA4, QWEN3_5, QWEN3_MOE, tiny_config
from support.plans import recipe_of

GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": {},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_5": QWEN3_5,
    "gemma2": {},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "gemma4_text": GEMMA4 | {"hidden_size_per_layer_input": 64},
    "gpt_oss": GPT_OSS,
}
RECIPES = {
    "lora": {},
    "dora": {"lora": {"dora": True}},
    "qlora": {"model": {"quantize": 4}},
    "nf4": {"model": {"quantize": "nf4"}},
    "nf4, dora, 8 bits": {
        "model": {"quantize": "nf4"},
        "lora": {"dora": True},
        "train": {"optimizer": "adamw_8bit"},
    },
    **{mode: {"model": {"quantize": mode}} for mode in ("mxfp4", "mxfp8", "nvfp4")},
    "expanded": {"model": {"quantize": 8, "quantized_matmul": "expand"}},
    "dropout": {"lora": {"dropout": 0.1}, "train": {"neftune_noise_alpha": 5.0}},
    "padded": {"train": {"packing": False}},
    "twice": {"train": {"gradient_checkpointing": True}},
    "dpo": {"objective": "dpo", "dpo": {"sft_weight": 0.5}},
    "dpo, ipo": {"objective": "dpo", "dpo": {"loss_type": "ipo"}},
    **{
        name: {"train": {"optimizer": name}}
        for name in ("adamw_8bit", "adafactor", "lion", "muon", "sgd")
    },
}


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


def step_of(kind: str, sections: dict, dtype: str = "bfloat16"):
    """What a step computes on a GPU."""
    recipe = recipe_of(**sections)
    with as_on_gpu():
        model = StepModel(recipe, tiny_config(kind, **MODELS[kind]), None, dtype)
        if recipe.train.neftune_noise_alpha:
            add_embedding_noise(model.model, recipe.train.neftune_noise_alpha)
        pairs = recipe.objective == "dpo"
        samples = random_groups((30, 20, 40)) if pairs else samples_of((30, 20, 40, 7))
        batch = (pack if model.packing else pad)(samples)
        twice = recipe.train.gradient_checkpointing is True
        return model.graph(batch, range(model.blocks if twice else 0))


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_each_recipe_is_computed_on_metal(name):
    assert not_on_metal(step_of("llama", RECIPES[name])) == set()


@pytest.mark.parametrize("dtype", [slow("float16"), "float32"])
@pytest.mark.parametrize("name", ["lora", "qlora", "nf4"])
def test_a_step_in_each_type_is_computed_on_metal(name, dtype):
    assert not_on_metal(step_of("llama", RECIPES[name], dtype)) == set()


@pytest.mark.parametrize("name", [slow("lora"), slow("qlora"), "nf4"])
@pytest.mark.parametrize(
    "kind", [slow(kind) if kind == "qwen3_5" else kind for kind in MODELS if kind != "llama"]
)
def test_a_step_of_each_model_is_computed_on_metal(kind, name):
    assert not_on_metal(step_of(kind, RECIPES[name])) == set()


def scattered(x: mx.array) -> mx.array:
    return mx.zeros(8, mx.int64).at[mx.array([1, 1, 2, 3])].add(x.astype(mx.int64))


# What is computed of a loss, four times.
FAULTS = {
    "Cholesky: no such kernel is known": lambda x: mx.linalg.cholesky(mx.diag(x), stream=mx.cpu),
    "Multiply: float64": lambda x: mx.multiply(x.astype(mx.float64), 2, stream=mx.cpu),
    "Scatter: int64": scattered,
    "FFT: no such kernel is known": lambda x: mx.abs(mx.fft.rfft(x)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_metal_does_not_compute_is_found_in_a_loss(monkeypatch, fault):
    own = LossFunction.__call__

    def faulty(self, *arguments):
        loss, figures = own(self, *arguments)
        wrong = FAULTS[fault](mx.broadcast_to(mx.stop_gradient(loss), (4,)))
        return loss + wrong.sum().astype(mx.float32), figures

    monkeypatch.setattr(LossFunction, "__call__", faulty)
    assert fault in not_on_metal(step_of("llama", {}))


def test_the_table_is_asked_for_every_array():
    graph = trace(lambda x: [x.astype(mx.complex64).real], mx.zeros(3))
    assert "AsType: complex64" in not_on_metal(graph)
