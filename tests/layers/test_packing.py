"""Packed weights of every kind, against MLX's own functions and layers."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten

from mlxtune.layers import quantized
from mlxtune.layers.inject import (
    add_lora,
    dequantize_layers,
    own_quantized_layers,
    projections,
    quantize_projections,
)
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    Route,
    expanded_product,
    packing_named,
)
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.model import load_base
from support.compare import distance, trainable
from support.models import tiny_llama

NAMES = (2, 3, 4, 5, 6, 8, "mxfp4", "mxfp8", "nvfp4")
MODES = NAMES[6:]
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
PACKED, EXPANDED = Route(None, None), Route(0, 0)
TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def theirs_of(packing: Packing, weight: mx.array) -> list[mx.array]:
    return list(mx.quantize(weight, packing.group_size, packing.bits, mode=packing.mode))


def dequantized(packing: Packing, packed: list[mx.array], dtype: mx.Dtype) -> mx.array:
    biases = packed[2] if len(packed) > 2 else None
    options = (packing.group_size, packing.bits, packing.mode)
    return mx.dequantize(packed[0], packed[1], biases, *options, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_is_packed_and_expanded_as_mlx_does_bit_for_bit(name, dtype):
    packing = packing_named(name)
    # Weights of many magnitudes, whole groups of zeros among them.
    weight = random(48, 256) * mx.exp(4 * random(48, 1, seed=1))
    weight = mx.concatenate([weight, mx.zeros((2, 256)), mx.full((1, 256), 1e-30)]).astype(dtype)
    arrays, theirs = packing.pack(weight), theirs_of(packing, weight)
    assert list(arrays) == list(packing.names[: len(theirs)])
    for got, want in zip(arrays.values(), theirs, strict=True):
        assert mx.array_equal(got, want).item()
    expanded = packing.expand(arrays, dtype)
    assert expanded.dtype == dtype
    assert mx.array_equal(expanded, dequantized(packing, theirs, dtype)).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", [PACKED, EXPANDED], ids=["packed", "expanded"])
@pytest.mark.parametrize("rows", [1, 24])
def test_both_products_and_their_gradients_are_those_of_mlx(name, route, rows):
    plain = nn.Linear(256, 96)
    packing = packing_named(name)
    layer = QuantizedLinear.from_weight(plain, packing)
    layer.route = route
    x, factors = random(rows, 256), random(rows, 96, seed=2)
    weight = dequantized(packing, theirs_of(packing, plain.weight), mx.float32)
    assert distance(layer(x), x @ weight.T + plain.bias) < 1e-5
    gradient = mx.grad(lambda x: (layer(x) * factors).sum())(x)
    assert distance(gradient, factors @ weight) < 1e-5


def test_a_route_decides_each_direction_by_the_rows(monkeypatch):
    layer = QuantizedLinear.from_weight(nn.Linear(64, 32, bias=False), packing_named(4))
    taken = []

    def product(x, *, forward, expand):
        taken.append((forward, expand))
        return mx.zeros((*x.shape[:-1], 32 if forward else 64))

    monkeypatch.setattr(layer, "product", product)
    for layer.route, rows, want in [
        (Route(4, 2), 3, [(True, False), (False, True)]),
        (Route(4, 2), 4, [(True, True), (False, True)]),
        (Route(1, None), 1, [(True, True), (False, False)]),
        (Route(None, None), 4096, [(True, False), (False, False)]),
        (Route(0, 0), 1, [(True, True), (False, True)]),
    ]:
        taken.clear()
        mx.eval(mx.grad(lambda x: layer(x).sum())(mx.zeros((rows, 64))))
        assert taken == want


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("name", [4, 3, "mxfp8", "nf4"])
def test_a_large_weight_is_multiplied_in_slices_and_never_whole(name, transpose, monkeypatch):
    packing = packing_named(name)
    arrays = packing.pack(random(2048, 256))
    x = random(4, 256 if transpose else 2048, seed=3)
    mx.eval(x, arrays)

    def product_and_peak() -> tuple[mx.array, int]:
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        product = expanded_product(x, packing, arrays, transpose=transpose)
        mx.eval(product)
        return product, mx.get_peak_memory() - before

    whole, much = product_and_peak()
    monkeypatch.setattr(quantized, "BYTES_AT_ONCE", 100 * 256 * 4)  # 2048 is no multiple
    sliced, little = product_and_peak()
    assert distance(sliced, whole) < 1e-5
    assert much > 2048 * 256 * 4
    assert little < much / 2


def test_expanding_four_bits_takes_less_memory_than_mlx():
    arrays = packing_named(4).pack(random(1024, 512))
    mx.eval(arrays)
    peaks = []
    for expand in (packing_named(4).expand, lambda a, _dtype: mx.dequantize(*a.values())):
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(expand(arrays, mx.float32))
        peaks.append((mx.get_peak_memory() - before) / (1024 * 512 * 4))
    assert peaks[0] < 1.2 < peaks[1]


@pytest.mark.parametrize("name", [4, *MODES])
def test_an_embedding_looks_up_and_projects_as_mlx_own(name):
    packing = packing_named(name)
    theirs = nn.QuantizedEmbedding.from_embedding(
        nn.Embedding(128, 64), packing.group_size, packing.bits, packing.mode
    )
    ours = QuantizedEmbedding.from_mlx(theirs)
    for ids in (mx.array([7]), mx.array([0, 127, 5]), mx.array([[1, 2, 3], [3, 2, 1]])):
        assert ours(ids).dtype == theirs(ids).dtype
        assert mx.array_equal(ours(ids), theirs(ids)).item()
    in_float = QuantizedEmbedding.from_mlx(theirs, mx.float32)
    assert in_float(mx.array([3])).dtype == mx.float32
    for rows in (3, 24):
        hidden = random(rows, 64)
        assert distance(ours.as_linear(hidden), theirs.as_linear(hidden)) < 1e-5


def mlx_packed_llama(mode: str, *, tied: bool) -> nn.Module:
    model = tiny_llama(seed=3, tied=tied)
    nn.quantize(model, mode=mode)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_packed_by_mlx_keeps_its_logits_and_trains(mode, tied):
    model = mlx_packed_llama(mode, tied=tied)
    before = dict(tree_flatten(model.parameters()))
    # MLX's own embedding gives bfloat16 in these modes, which the float32 here is not.
    plain = mlx_packed_llama(mode, tied=tied)
    own_quantized_layers(plain, mx.float32)
    dequantize_layers(plain, mx.float32)
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    own_quantized_layers(model, mx.float32)
    assert dict(tree_flatten(model.parameters())).keys() == before.keys()
    assert not any(type(m) in (nn.QuantizedLinear, nn.QuantizedEmbedding) for m in model.modules())
    assert distance(model(TOKENS), mlx_packed_llama(mode, tied=tied)(TOKENS)) < 2e-2
    assert distance(model(TOKENS), plain(TOKENS)) < 1e-5
    paths = [path for path in projections(model) if ".layers." in path]
    add_lora(model, paths, rank=4, scale=2.0)
    _, gradients = nn.value_and_grad(model, lambda t: model(t).square().sum())(TOKENS)
    assert dict(tree_flatten(gradients)).keys() == trainable(model).keys()


@pytest.mark.parametrize("mode", ["affine", *MODES])
def test_a_folder_packed_by_mlx_is_read_as_it_is(tmp_path, tiny_folder, mode):
    folder = tmp_path / "packed"
    shutil.copytree(tiny_folder, folder)
    theirs, config = mlx_lm.utils.load_model(tiny_folder)
    theirs, config = mlx_lm.utils.quantize_model(theirs, config, None, None, mode=mode)
    theirs.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_base(ModelSection(path=str(folder)))
    layer = loaded.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear) and layer.mode == mode
    assert isinstance(loaded.model.model.embed_tokens, QuantizedEmbedding)
    # MLX's embeddings give bfloat16 in modes without a float type; ours what the model is in.
    assert distance(loaded.model(TOKENS), theirs(TOKENS)) < (1e-5 if mode == "affine" else 2e-2)
    assert loaded.model(TOKENS).dtype == mx.float32
    alike = load_base(ModelSection(path=str(folder), dequantize=True))
    assert distance(loaded.model(TOKENS), alike.model(TOKENS)) < 1e-5


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "nf4"])
def test_quantizing_by_name_packs_the_projections_of_blocks(name):
    model, plain = tiny_llama(), tiny_llama()
    quantize_projections(model, packing_named(name))
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 2 * 7
    assert {m.mode for m in packed.values()} == {name}
    for path, layer in packed.items():
        original = dict(plain.named_modules())[path].weight
        assert layer.shape == original.shape
        # Few bits are far from exact, and far nearer than nothing.
        assert mx.abs(layer.dequantized() - original).mean() < 0.2 * mx.abs(original).mean()
    assert not any(".layers." in name for name in trainable(model) if "norm" not in name)
