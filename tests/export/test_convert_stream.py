"""A conversion holds one tensor at a time: peak memory, in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxtune.gguf.reader import GGUFFile
from mlxtune.models.safetensors import from_bfloat16, read_safetensors
from support.files import ROOT

SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("convert_bench", ROOT / "benchmarks/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="measures with fork")
def test_the_peak_is_that_of_the_largest_tensor_whatever_the_model_weighs(bench, tmp_path: Path):
    measured = bench.memory(tmp_path, SIZES)
    assert measured["parameters"] > 200e6  # 800 MB in float32
    assert measured["peak"] < measured["bound"] < 4 * measured["parameters"]
    assert measured["peak_with_reading_back"] < measured["bound"]
    stored = read_safetensors(tmp_path / "model/model.safetensors")
    file = GGUFFile(tmp_path / "out.gguf")
    name, own = "model.layers.9.mlp.down_proj.weight", "blk.9.ffn_down.weight"
    assert len(stored) == len(file.tensors)
    blocks = file.data(own)[:8].reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    read = (scales * blocks[:, 2:].view(np.int8)).reshape(8, -1)
    assert np.abs(read - stored[name].float32()[:8]).max() < 1e-3
    bits = stored[name].read()
    want = mx.array(bits).view(mx.bfloat16).astype(mx.float32)
    assert np.array_equal(from_bfloat16(bits), np.array(want))
