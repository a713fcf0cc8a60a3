"""Comparisons, and random ragged samples, that several test files use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from mlx.utils import tree_flatten

from mlxtune.data.pack import Batch
from mlxtune.data.render import Sample
from mlxtune.layers.inject import add_lora, lora_layers, projections
from mlxtune.train.step import LossFunction, batch_arrays

# What `tiny` needs beside to make one of these.
QWEN3_5 = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}

GEMMA4 = {
    "num_hidden_layers": 5,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "sliding_window": 8,
    "layer_types": [*["full_attention", "sliding_attention"] * 2, "full_attention"],
}


def distance(got: mx.array, want: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    assert got.shape == want.shape
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()


def trainable(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def tiny(kind: str, **changes: object) -> nn.Module:
    """A random two-block model of one of mlx-lm's architectures."""
    module = import_module(f"mlx_lm.models.{kind}")
    sizes = {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(sizes | changes))
    mx.eval(model.parameters())
    return model


def with_adapters(
    model: nn.Module,
    paths: Iterable[str] | None = None,
    *,
    dropout: float = 0.0,
    dora: bool = False,
) -> nn.Module:
    """The model with LoRA, on every projection by default, that has an effect."""
    mx.random.seed(3)
    paths = paths or projections(model)
    add_lora(model, paths, rank=4, scale=2.0, dropout=dropout, dora=dora)
    for _, layer in lora_layers(model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.05
    mx.eval(model.parameters())
    return model


def random_samples(
    lengths: Iterable[int], *, prefix: int = 0, untrained: int = 1, seed: int = 0
) -> list[Sample]:
    """Samples of these lengths that share their first `prefix` tokens and differ after.

    The first target is the token at `untrained`, and about half of those after it are
    targets too, with random weights.
    """
    generator = np.random.default_rng(seed)
    common = generator.integers(0, 128, prefix)
    samples = []
    for record, length in enumerate(lengths, start=1):
        tokens = generator.integers(0, 128, length).astype(np.int32)
        tokens[:prefix] = common
        tokens[prefix] = (record * 7) % 128
        weights = generator.uniform(0.2, 2.0, length) * (generator.random(length) < 0.5)
        weights[:untrained] = 0
        weights[untrained] = 1
        samples.append(Sample(tokens, weights.astype(np.float32), record))
    return samples


def loss_of_each_alone(model: nn.Module, samples: Iterable[Sample]) -> mx.array:
    """The weighted sum, each sample through the model by itself, with MLX's own loss."""
    total = mx.array(0.0)
    for sample in samples:
        logits = model(mx.array(sample.tokens[None]))[0, :-1]
        targets, weights = mx.array(sample.tokens[1:]), mx.array(sample.weights[1:])
        total = total + nn.losses.cross_entropy(logits, targets, weights, reduction="sum")
    return total


def loss_of_batch(model: nn.Module, batch: Batch) -> mx.array:
    return LossFunction(model)(batch_arrays(batch), batch.prefix, batch.packed)


def value_and_gradients(
    model: nn.Module, loss: Callable[..., mx.array], *args: Any
) -> tuple[float, dict[str, mx.array]]:
    value, gradients = nn.value_and_grad(model, loss)(*args)
    return value.item(), dict(tree_flatten(gradients))


def random_weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def write_gguf_with_package(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Type]], arch: str
) -> None:
    """A GGUF from the `gguf` package: texts, numbers and lists, and tensors as bytes."""
    kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for name, (data, type_) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SMALL_GGUF = {
    "token_embd.weight": (24, Type.Q8_0),
    "blk.0.attn_norm.weight": (None, Type.F32),
    "blk.0.attn_q.weight": (64, Type.Q4_0),
    "blk.0.attn_k.weight": (32, Type.Q5_1),
    "blk.0.attn_v.weight": (32, Type.BF16),
    "blk.0.attn_output.weight": (64, Type.F16),
    "blk.0.ffn_up.weight": (32, Type.Q5_0),
    "output.weight": (24, Type.Q4_1),
}


def write_small_gguf(path: Path, metadata: dict[str, Any] | None = None, arch: str = "llama"):
    """A GGUF of one llama block with tensors of many types, 64 wide."""
    values: dict[str, Any] = {
        "general.languages": ["en", "de"],
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(24)],
        "tokenizer.ggml.token_type": [1] * 24,
        "tokenizer.ggml.bos_token_id": 1,
    }
    sizes: dict[str, Any] = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    values |= {f"{arch}.{key}": value for key, value in sizes.items()} | (metadata or {})
    tensors = {}
    for seed, (name, (rows, type_)) in enumerate(SMALL_GGUF.items()):
        weights = random_weights(*([rows] if rows else []), 64, seed=seed)
        tensors[name] = (gguf.quants.quantize(weights, type_), type_)
    write_gguf_with_package(path, values, tensors, arch)
