"""Where MLX's attention keeps no scores, and proofs that hold on GPUs that round in TF32."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.data.passes import Layout, passes
from mlxtune.errors import ModelError
from mlxtune.models import attention as own
from mlxtune.models.enable import enable_packs, enable_packs_by, pack_kind
from mlxtune.models.fused_attention import keeps_no_scores, prepare_backward
from mlxtune.models.packed import OwnAttention
from mlxtune.train.step import LossFunction, batch_arrays
from support.compare import random_samples
from support.models import tiny_llama


@pytest.mark.parametrize(
    ("config", "fused"),
    [
        ({"hidden_size": 576, "num_attention_heads": 9}, True),  # 64: SmolLM2
        ({"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}, True),  # Qwen3
        ({"text_config": {"hidden_size": 640, "num_attention_heads": 4, "head_dim": 256}}, True),
        ({"hidden_size": 512, "num_attention_heads": 16}, False),  # 32
        ({"model_type": "mamba"}, False),
    ],
)
def test_widths_of_heads_say_whether_scores_are_kept(config, fused):
    assert keeps_no_scores(config) == fused


def test_rows_of_one_sample_go_to_the_models_own_attention_with_the_same_loss():
    samples = random_samples((60, 58, 61, 57))
    model = tiny_llama()
    enable_packs(model)
    loss = LossFunction(model.train())
    totals = {}
    for causal in (False, True):
        batches = passes(samples, 4, Layout(few_shapes=True, causal_rows=causal))
        assert all(batch.packed != causal for batch in batches)
        arrays = [(batch_arrays(b), b.prefix, b.packed) for b in batches]
        totals[causal] = sum(loss(*given)[0].item() for given in arrays)
    assert totals[True] == pytest.approx(totals[False], rel=1e-5)
    # With a shared beginning, or several samples in a row, a causal mask is not enough.
    for others in (random_samples((30, 30, 30), prefix=20, untrained=20), samples_in_a_row()):
        assert all(b.packed for b in passes(others, 8, Layout(few_shapes=True, causal_rows=True)))


def samples_in_a_row():
    return random_samples((120, 20, 20, 20, 20, 20, 20), seed=4)


def test_models_with_attention_sinks_are_differentiated_step_by_step_on_metal(monkeypatch):
    class Sinks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sinks = mx.zeros((4,))

    name = "MLX_SDPA_VJP_FALLBACK"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    prepare_backward(Sinks())
    assert name not in os.environ, "nothing is amiss on a CPU"
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    prepare_backward(tiny_llama())
    assert name not in os.environ
    prepare_backward(Sinks())
    assert os.environ[name] == "1"


def in_tf32(x: mx.array) -> mx.array:
    """Float32 rounded to the ten bits of fraction that TF32 has."""
    bits = np.array(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x1000) & np.uint32(0xFFFFE000)).astype(np.uint32)
    return mx.array(rounded.view(np.float32))


@pytest.fixture
def rounding_gpu(monkeypatch):
    """Products of float32 as on a GPU that rounds them to TF32; those of the CPU are exact."""
    on_cpu = [False]

    @contextmanager
    def stream(device):
        before, on_cpu[0] = on_cpu[0], device == mx.cpu
        try:
            yield
        finally:
            on_cpu[0] = before

    def linear(self, x):
        if not on_cpu[0]:
            return in_tf32(x) @ in_tf32(self.weight).T
        return x @ self.weight.T

    attention, fused = own.attention, mx.fast.scaled_dot_product_attention

    def rounded(call):
        def run(q, k, v, **options):
            given = (q, k, v) if on_cpu[0] else map(in_tf32, (q, k, v))
            return call(*given, **options)

        return run

    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(nn.Linear, "__call__", linear)
    monkeypatch.setattr("mlxtune.models.packed.attention", rounded(attention))
    # Another kernel, which multiplies in another order, rounds otherwise.
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, **o: rounded(fused)(q * 1.0003, k / 1.0003, v, **o),
    )


def test_own_attention_is_proven_where_the_gpu_rounds_to_tf32(rounding_gpu):
    model = tiny_llama()
    enable_packs_by(model, {k: v for k, v in asdict(model.args).items() if v is not None})
    assert pack_kind(model) is OwnAttention


def test_the_simulated_rounding_is_more_than_the_bound_allows(rounding_gpu):
    """So the test above fails where the proof is not computed on the CPU."""
    model = tiny_llama()
    try:
        enable_packs(model)
    except ModelError:
        return
    assert pack_kind(model) is not OwnAttention
