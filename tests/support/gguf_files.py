"""Small GGUF files, written by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType


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
