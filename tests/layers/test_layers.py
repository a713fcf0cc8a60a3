"""Packed projections and embeddings, against MLX's own."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxtune.errors import ModelError
from mlxtune.layers.inject import dequantize_layers, own_quantized_layers, quantize_projections
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import QuantizedEmbedding, QuantizedLinear
from support.compare import distance, trainable
from support.models import tiny_llama

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Below and above the number of rows from which a CPU multiplies by the expanded weight.
ROWS = (3, 24)
TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])


def linear(*, bias: bool = False, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    layer = nn.Linear(256, 96, bias=bias)
    layer.set_dtype(dtype)
    return layer


def mlx_packed(*, bits: int = 4, group_size: int = 64, **kw) -> nn.QuantizedLinear:
    return nn.QuantizedLinear.from_linear(linear(**kw), group_size=group_size, bits=bits)


def forward_and_input_gradient(layer: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    """The output, and the gradient of a sum in which every output has its own weight."""
    factors = mx.random.normal((x.shape[0], 96), key=mx.random.key(11))
    return layer(x), mx.grad(lambda rows: (layer(rows) * factors).sum())(x)


def packed_llama(seed: int, *, tied: bool = True, bits: int = 4, group_size: int = 32):
    model = tiny_llama(seed=seed, tied=tied)
    nn.quantize(model, group_size=group_size, bits=bits)
    return model


# ------------------------------------------------------------------------ packed weights


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_expand_equals_mlx_dequantize_bit_for_bit(bits, group_size):
    for dtype in FLOATS:
        weight = mx.random.normal((48, 256)).astype(dtype)
        packing = Packing("affine", bits, group_size)
        packed = mx.quantize(weight, group_size=group_size, bits=bits)
        ours = packing.expand(dict(zip(packing.names, packed, strict=True)), dtype)
        theirs = mx.dequantize(*packed, group_size=group_size, bits=bits)
        assert ours.dtype == theirs.dtype == dtype
        assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_quantized_linear_and_its_input_gradient_are_mlx_own(bits, group_size):
    theirs = mlx_packed(bits=bits, group_size=group_size, bias=True)
    ours = QuantizedLinear.from_mlx(theirs)
    for rows in ROWS:
        x = mx.random.normal((rows, 256))
        for got, want in zip(
            forward_and_input_gradient(ours, x), forward_and_input_gradient(theirs, x), strict=True
        ):
            assert distance(got, want) < 1e-5


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_quantized_linear_in_sixteen_bits_is_as_near_to_float32_as_mlx_own(dtype, rows):
    theirs = mlx_packed(dtype=dtype)
    ours = QuantizedLinear.from_mlx(theirs)
    exact = mx.dequantize(theirs.weight, theirs.scales, theirs.biases).astype(mx.float32)
    x = mx.random.normal((rows, 256)).astype(dtype)
    want = x.astype(mx.float32) @ exact.T
    assert ours(x).dtype == dtype
    assert distance(ours(x), want) < 2 * max(distance(theirs(x), want), 1e-3)


def test_quantized_linear_takes_any_leading_shape():
    theirs = mlx_packed(bias=True)
    ours = QuantizedLinear.from_mlx(theirs)
    for shape in [(256,), (1, 256), (2, 5, 256), (2, 1, 3, 256)]:
        x = mx.random.normal(shape)
        assert distance(ours(x), theirs(x)) < 1e-5


def test_bias_is_added_as_it_is():
    plain = linear(bias=True)
    ours = QuantizedLinear.from_weight(plain, Packing("affine", 8, 64))
    assert mx.array_equal(ours(mx.zeros((1, 256)))[0], plain.bias).item()
    assert "bias" not in QuantizedLinear.from_weight(linear(), Packing("affine", 8, 64))


def test_from_linear_packs_as_mlx_packs_and_knows_its_shape():
    plain = linear()
    for bits in BITS:
        ours = QuantizedLinear.from_weight(plain, Packing("affine", bits, 32))
        theirs = mx.quantize(plain.weight, group_size=32, bits=bits)
        for got, want in zip((ours.weight, ours.scales, ours.biases), theirs, strict=True):
            assert mx.array_equal(got, want).item()
        assert ours.shape == plain.weight.shape


def test_a_checkpoint_of_mlx_loads_by_name(tmp_path):
    written = packed_llama(seed=1, tied=False)
    written.save_weights(str(tmp_path / "model.safetensors"))
    ours = packed_llama(seed=2, tied=False)
    own_quantized_layers(ours)
    ours.load_weights(str(tmp_path / "model.safetensors"), strict=True)
    assert distance(ours(TOKENS), written(TOKENS)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_owning_quantized_layers_takes_over_the_arrays_and_keeps_the_logits(tied):
    model = packed_llama(seed=3, tied=tied)
    before = dict(tree_flatten(model.parameters()))
    logits = model(TOKENS)
    own_quantized_layers(model)
    kinds = {type(m) for m in model.modules()}
    assert not kinds & {nn.QuantizedLinear, nn.QuantizedEmbedding}
    assert dict(tree_flatten(model.parameters())).keys() == before.keys()
    assert distance(model(TOKENS), logits) < 1e-5


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_embedding_looks_up_and_projects_as_mlx_own(bits):
    plain = nn.Embedding(128, 64)
    theirs = nn.QuantizedEmbedding.from_embedding(plain, group_size=32, bits=bits)
    ours = QuantizedEmbedding.from_mlx(theirs)
    for ids in (mx.array([7]), mx.array([0, 127, 5]), mx.array([[1, 2, 3], [3, 2, 1]])):
        assert mx.array_equal(ours(ids), theirs(ids)).item()
    for rows in ROWS:
        hidden = mx.random.normal((rows, 64))
        assert distance(ours.as_linear(hidden), theirs.as_linear(hidden)) < 1e-5


def test_dequantized_layers_are_plain_and_compute_the_same():
    model = packed_llama(seed=4)
    logits = model(TOKENS)
    own_quantized_layers(model)
    dequantize_layers(model, mx.float32)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert type(model.model.embed_tokens) is nn.Embedding
    assert distance(model(TOKENS), logits) < 1e-5


# ------------------------------------------------------------------------ what is trained


def test_packed_weights_are_never_trainable():
    model = packed_llama(seed=5)
    own_quantized_layers(model)
    assert not any(name.endswith((".scales", ".biases")) for name in trainable(model))
    layer = model.layers[0].mlp.up_proj
    layer.unfreeze()
    assert not trainable(layer)


def test_unfreezing_the_whole_model_does_not_thaw_packed_weights():
    model = packed_llama(seed=5)
    own_quantized_layers(model)
    packed = [p for p, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    model.freeze()
    model.unfreeze()
    thawed = {n for n in trainable(model) if n.rpartition(".")[0] in packed}
    assert not thawed


@pytest.mark.parametrize("tied", [True, False])
def test_quantizing_packs_the_projections_of_blocks_and_nothing_else(tied):
    ours, theirs = tiny_llama(tied=tied), tiny_llama(tied=tied)
    quantize_projections(ours, Packing("affine", 4, 32))
    nn.quantize(
        theirs,
        group_size=32,
        bits=4,
        class_predicate=lambda path, m: ".layers." in path and isinstance(m, nn.Linear),
    )
    packed = {p for p, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert packed == {p for p, m in theirs.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert len(packed) == 2 * 7
    assert type(ours.model.embed_tokens) is nn.Embedding
    assert distance(ours(TOKENS), theirs(TOKENS)) < 1e-5


def test_a_width_that_does_not_divide_into_groups_is_refused_by_path():
    with pytest.raises(ModelError, match="96 input features") as caught:
        quantize_projections(tiny_llama(dims=96), Packing("affine", 4, 64))
    assert "model.layers.0" in (caught.value.where or "")
