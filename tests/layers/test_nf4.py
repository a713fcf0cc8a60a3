"""NF4 against the paper, the quantiles that it comes from, and bitsandbytes."""

from __future__ import annotations

from statistics import NormalDist

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxtune.layers.nf4 import LEVELS, NormalFloat4, dynamic_levels
from mlxtune.layers.quantized import QuantizedEmbedding, QuantizedLinear
from support.compare import distance

# Made with bitsandbytes 0.50.2 on a CPU, `quantize_4bit(w, blocksize=64,
# compress_statistics=True, quant_type="nf4")` of `weights()` below.
BYTES = (
    "75b7287e74a7176c7387f75b7186d7497076c7287e74a7176d7397f75b7186e7497076c7287e75a7186d7397"
    "075b7287e74a7176d7397f75b7186e7497076c7287e75a7186d7397f75b7287e74a7176c7387f75b7186d749"
    "7076c7287e74a7176d7397f75b7286e7497076c7287e75a7186d7397075b7287e74a7176c7387f75"
)
SCALES = "1b42c8d632df0dbfa5e437d000cd3be85dc20adb2fd9c452ea1f3dcbd235e211afb6e134d403ca1d"
BLOCK_SCALES = [0.0035168305039405823]
MEAN = 0.09734641760587692


def weights(*shape: int) -> np.ndarray:
    """Numbers that are the same everywhere, with a heavy tail."""
    count = int(np.prod(shape))
    phase = (np.arange(1, count + 1, dtype=np.float64) * 0.6180339887498949) % 1
    return ((phase * 2 - 1) ** 3 * 0.1).astype(np.float32).reshape(shape)


def test_the_levels_are_quantiles_of_the_normal_distribution():
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    normal = NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    want = sorted([*above, *below, 0.0])
    want = [level / max(want) for level in want]
    assert len(LEVELS) == 16
    assert list(LEVELS) == pytest.approx(want, abs=2e-6)


def test_a_block_of_levels_comes_back_exactly():
    exact = NormalFloat4(double_quantization=False)
    weight = mx.array(list(LEVELS) * 4)[None] * mx.array([[3.0], [0.5]])
    assert mx.array_equal(exact.expand(exact.pack(weight), mx.float32), weight).item()


def test_each_weight_becomes_the_nearest_level_of_its_block():
    weight = weights(3, 192)
    packing = NormalFloat4(double_quantization=False)
    got = np.array(packing.expand(packing.pack(mx.array(weight)), mx.float32))
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    levels = np.array(LEVELS, np.float32)
    nearest = np.abs(blocks[..., None] / largest[..., None] - levels).argmin(axis=-1)
    assert np.array_equal(got, (levels[nearest] * largest).reshape(weight.shape))


def test_bytes_and_scales_are_those_of_bitsandbytes():
    arrays = NormalFloat4().pack(mx.array(weights(20, 128)))
    assert bytes(np.array(arrays["weight"].view(mx.uint8))[:2]).hex() == BYTES
    assert bytes(np.array(arrays["scales"])).hex() == SCALES
    assert np.array(arrays["block_scales"]) == pytest.approx(BLOCK_SCALES, rel=1e-5)
    assert arrays["mean"].item() == pytest.approx(MEAN, rel=1e-5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(8, 256), (130, 1216)])
def test_bitsandbytes_itself_packs_and_expands_the_same(shape, double):
    pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    from torch import from_numpy

    weight = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
    theirs, state = functional.quantize_4bit(
        from_numpy(weight), blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    packing = NormalFloat4(double_quantization=double)
    arrays = packing.pack(mx.array(weight))
    assert np.array_equal(np.array(arrays["weight"].view(mx.uint8)).ravel(), theirs.numpy().ravel())
    assert np.array_equal(np.array(mx.array(LEVELS)), state.code.numpy())
    got = np.array(packing.expand(arrays, mx.float32))
    want = functional.dequantize_4bit(theirs, state).numpy()
    if not double:
        assert np.array_equal(got, want)
        return
    levels = state.state2.code.numpy()
    assert np.array(dynamic_levels()) == pytest.approx(levels, abs=1e-7)
    # Sums of means round differently, which may move a scale in a thousand to its neighbour.
    moved = np.array(arrays["scales"]).ravel() != state.absmax.numpy().ravel()
    assert moved.mean() < 2e-3
    same = ~np.repeat(moved, 64).reshape(shape)
    assert np.abs(got - want)[same].max() < 1e-6


def test_double_quantization_takes_the_bits_of_the_paper_and_costs_little():
    weight = mx.array(weights(512, 1024))
    sizes, errors = [], []
    for double in (False, True):
        packing = NormalFloat4(double_quantization=double)
        arrays = packing.pack(weight)
        sizes.append(8 * sum(a.nbytes for a in arrays.values()) / weight.size)
        errors.append(mx.abs(packing.expand(arrays, mx.float32) - weight).mean().item())
    assert sizes == pytest.approx([4.5, 4 + 8 / 64 + 32 / (64 * 256)], abs=1e-4)
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros_and_rows_are_taken_with_their_scales(double):
    packing = NormalFloat4(double_quantization=double)
    weight = mx.concatenate([mx.array(weights(9, 320)), mx.zeros((1, 320))])
    arrays = packing.pack(weight)
    whole = packing.expand(arrays, mx.float32)
    assert not mx.any(mx.isnan(whole)).item()
    assert mx.abs(whole[-1]).max() < 1e-3
    for rows in (slice(3, 7), mx.array([8, 0, 3]), mx.array([[1], [2]])):
        part = packing.expand(packing.rows(arrays, rows), mx.float32)
        assert mx.array_equal(part, whole[rows]).item()


@pytest.mark.parametrize("rows", [1, 24])
def test_an_nf4_layer_multiplies_by_the_expanded_weight_in_both_directions(rows):
    plain = nn.Linear(256, 96)
    layer = QuantizedLinear.from_weight(plain, NormalFloat4())
    x, factors = mx.random.normal((rows, 256)), mx.random.normal((rows, 96))
    weight = layer.dequantized()
    assert weight.dtype == mx.float32
    assert distance(layer(x), x @ weight.T + plain.bias) < 1e-5
    gradient = mx.grad(lambda x: (layer(x) * factors).sum())(x)
    assert distance(gradient, factors @ weight) < 1e-5


def test_an_nf4_embedding_looks_up_rows_of_its_table():
    layer = QuantizedEmbedding.from_weight(nn.Embedding(50, 64), NormalFloat4())
    ids = mx.array([[3, 49], [0, 3]])
    assert mx.array_equal(layer(ids), layer.dequantized()[ids]).item()
