"""Checkpoints as AutoAWQ and GPTQModel publish them, packed by their published layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _packed(codes: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """(rows, n) codes as int32 words; `order` says which of a word's columns lies in which bits."""
    columns = codes.astype(np.uint32).reshape(len(codes), -1, len(order))
    words = np.zeros(columns.shape[:2], np.uint32)
    for place, column in enumerate(order):
        words |= columns[..., column] << np.uint32(bits * place)
    return words.view(np.int32)


def quantized(
    method: str, rows: int, inputs: int, bits: int, seed: int, *, v2: bool = False
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A random layer: its arrays, and the float32 (rows, inputs) that they stand for."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (inputs, rows))
    # A zero of none occurs too: GPTQ's first layout then borrows from the code beside it.
    zeros = random.integers(0, 2**bits, (inputs // GROUP, rows))
    scales = (random.random((inputs // GROUP, rows)) * 0.02 / 2**bits + 0.01 / 2**bits).astype(
        np.float16
    )
    group = np.arange(inputs) // GROUP
    dense = (codes - zeros[group]) * scales[group].astype(np.float32)
    plain = tuple(range(32 // bits))
    if method == "awq":
        arrays = {
            "qweight": _packed(codes, bits, _AWQ_ORDER),
            "qzeros": _packed(zeros, bits, _AWQ_ORDER),
        }
    else:
        words = _packed(zeros, bits, plain)
        ones = sum(1 << place for place in range(0, 32, bits))
        arrays = {
            "qweight": np.ascontiguousarray(_packed(np.ascontiguousarray(codes.T), bits, plain).T),
            "qzeros": words if v2 else (words.view(np.uint32) - np.uint32(ones)).view(np.int32),
            "g_idx": group.astype(np.int32),
        }
    return arrays | {"scales": scales}, np.ascontiguousarray(dense.T.astype(np.float32))


def quantized_weights(
    given: dict[str, Any], method: str, bits: int = 4, *, v2: bool = False
) -> tuple[dict[str, mx.array], dict[str, np.ndarray]]:
    """Weights of which the projections of blocks are quantized at random, and what they stand for.

    Routers of experts are left as they are.
    """
    weights: dict[str, np.ndarray] = {}
    dense: dict[str, np.ndarray] = {}
    for seed, (name, values) in enumerate(sorted(given.items())):
        if values.ndim != 2 or ".layers." not in name or name.endswith(".gate.weight"):
            weights[name] = dense[name] = np.array(values.astype(mx.float32))
            continue
        module = name.removesuffix(".weight")
        arrays, dense[name] = quantized(method, *values.shape, bits, seed, v2=v2)
        weights |= {f"{module}.{kind}": array for kind, array in arrays.items()}
    return {name: mx.array(values) for name, values in weights.items()}, dense


def save_quantized(
    source: Path, folder: Path, method: str, bits: int = 4, **said: Any
) -> dict[str, np.ndarray]:
    """A model's folder with the projections of its blocks quantized at random.

    Returns:
        What its weights stand for, by name.
    """
    shutil.copytree(source, folder)
    v2 = said.get("checkpoint_format") == "gptq_v2"
    loaded: dict[str, Any] = mx.load(str(source / "model.safetensors"))
    weights, dense = quantized_weights(loaded, method, bits, v2=v2)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method,
        "bits": bits,
        "group_size": GROUP,
        **({"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": False}),
        **said,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dense
