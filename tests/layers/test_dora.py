"""DoRA layers against mlx-lm's and the formula, in a model, in training and fused."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear as MlxDoRALinear

from mlxtune.data.pack import pack
from mlxtune.layers.dense import dense_tensors
from mlxtune.layers.dora import DoRALinear
from mlxtune.layers.inject import add_lora, fuse_lora, lora_layers, projections
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import QuantizedLinear
from mlxtune.models.enable import enable_packs
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.optim import make_optimizer
from mlxtune.train.step import TrainStep
from support.compare import (
    distance,
    loss_of_batch,
    loss_of_each_alone,
    random_samples,
    trainable,
    value_and_gradients,
)
from support.models import tiny_llama, with_adapters

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
BITS = (None, 2, 3, 4, 5, 6, 8)
# Below and above the number of rows from which a CPU multiplies by the expanded weight.
ROWS = (3, 24)
TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])


def base_of(bits: int | None, *, bias: bool, dtype: mx.Dtype = mx.float32):
    """A plain or packed projection, and its dense weight in float64."""
    mx.random.seed(1)
    plain = nn.Linear(256, 96, bias=bias)
    plain.set_dtype(dtype)
    if bits is None:
        return plain, np.array(plain.weight.astype(mx.float32), np.float64)
    packed = QuantizedLinear.from_weight(plain, Packing("affine", bits, 64))
    weight = mx.dequantize(packed.weight, packed.scales, packed.biases, bits=bits)
    return packed, np.array(weight.astype(mx.float32), np.float64)


def trained(layer: DoRALinear, size: float = 0.1) -> DoRALinear:
    """The layer with a B and magnitudes that have an effect."""
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * size
    layer.m = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
    mx.eval(layer.parameters())
    return layer


def by_hand(layer: DoRALinear, weight: np.ndarray) -> np.ndarray:
    """m / ||W + s (A B)^T|| * (W + s (A B)^T) in float64."""
    a, b, m = (np.array(v, np.float64) for v in (layer.lora_a, layer.lora_b, layer.m))
    weight = weight + layer.scale * (a @ b).T
    return m[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_new_layer_computes_exactly_its_base_in_its_type(dtype, bits, bias):
    base, weight = base_of(bits, bias=bias, dtype=dtype)
    layer = DoRALinear.from_base(base, rank=8, scale=20.0)
    for rows in ROWS:
        x = mx.random.normal((rows, 256)).astype(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert mx.array_equal(y, base(x)).item()
    assert layer.m.dtype == mx.float32
    assert np.abs(np.array(layer.m) / np.linalg.norm(weight, axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_the_live_and_the_fused_layer_are_the_formula(bits, bias, size):
    base, weight = base_of(bits, bias=bias)
    layer = trained(DoRALinear.from_base(base, rank=6, scale=1.7), size)
    want = by_hand(layer, weight)
    assert np.abs(np.array(layer.fused_weight()) - want).max() < 1e-5 * np.abs(want).max()
    x = mx.random.normal((24, 256))
    expected = np.array(x, np.float64) @ want.T + (np.array(base.bias) if bias else 0)
    for rows in ROWS:
        got = np.array(layer(x[:rows]))
        assert np.abs(got - expected[:rows]).max() < 1e-5 * np.abs(expected).max()
    fused = layer.fuse()
    assert type(fused) is nn.Linear
    assert distance(fused(x), layer(x)) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_forward_and_gradients_are_those_of_mlx_lm(rows, packed, bias):
    base = nn.Linear(256, 96, bias=bias)
    if packed:
        base = nn.QuantizedLinear.from_linear(base, group_size=64, bits=4)
    theirs = MlxDoRALinear.from_base(base, r=6, scale=1.7)
    ours = DoRALinear.from_base(
        QuantizedLinear.from_mlx(base) if packed else base, rank=6, scale=1.7
    )
    trained(ours)
    theirs.lora_a, theirs.lora_b, theirs.m = ours.lora_a, ours.lora_b, ours.m
    base.freeze()
    x, factors = mx.random.normal((rows, 256)), mx.random.normal((rows, 96))
    outputs, of_input, of_parameters = [], [], []
    for layer in (ours, theirs):
        outputs.append(layer(x))
        of_input.append(mx.grad(lambda v, layer=layer: (layer(v) * factors).sum())(x))
        gradient = nn.value_and_grad(layer, lambda v, layer=layer: (layer(v) * factors).sum())
        of_parameters.append(dict(tree_flatten(gradient(x)[1])))
    assert distance(*outputs) < 1e-5
    assert distance(*of_input) < 1e-5
    assert of_parameters[0].keys() == of_parameters[1].keys() == {"lora_a", "lora_b", "m"}
    for name, gradient in of_parameters[0].items():
        assert distance(gradient, of_parameters[1][name]) < 1e-5, name


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_in_sixteen_bits_it_is_as_near_to_the_formula_as_mlx_lm(size, dtype, bits):
    plain = nn.Linear(256, 96)
    plain.set_dtype(dtype)
    base = nn.QuantizedLinear.from_linear(plain, bits=bits) if bits else plain
    theirs = MlxDoRALinear.from_base(base, r=6, scale=1.7)
    own = QuantizedLinear.from_mlx(base) if bits else base
    ours = trained(DoRALinear.from_base(own, rank=6, scale=1.7), size)
    theirs.lora_a, theirs.lora_b, theirs.m = ours.lora_a, ours.lora_b, ours.m
    x = mx.random.normal((64, 256)).astype(dtype)
    weight = own.dequantized() if bits else own.weight
    exact = by_hand(ours, np.array(weight.astype(mx.float32), np.float64))
    exact = np.array(x.astype(mx.float32)) @ exact.T + np.array(plain.bias.astype(mx.float32))

    def error(layer: nn.Module) -> float:
        return float(np.square(np.array(layer(x).astype(mx.float32)) - exact).mean() ** 0.5)

    assert ours(x).dtype == dtype
    assert error(ours) < 1.2 * error(theirs)
    gradient = nn.value_and_grad(ours, lambda v: ours(v).astype(mx.float32).square().sum())
    assert {g.dtype for _, g in tree_flatten(gradient(x)[1])} == {mx.float32}


def test_a_row_of_zeros_stays_zero_and_is_no_nan():
    base = nn.Linear(256, 96, bias=False)
    base.weight[3] = 0
    layer = DoRALinear.from_base(base, rank=4, scale=2.0)
    x = mx.random.normal((5, 256))
    assert mx.array_equal(layer(x), base(x)).item()
    gradient = nn.value_and_grad(layer, lambda v: layer(v).square().sum())
    for _, array in tree_flatten(gradient(x)[1]):
        assert mx.isfinite(array).all().item()
    assert mx.isfinite(layer.fused_weight()).all().item()
    assert (layer.fused_weight()[3] == 0).all().item()


def test_no_full_update_is_made_of_the_low_ranks():
    base, _ = base_of(None, bias=False)
    layer = DoRALinear.from_base(base, rank=4, scale=2.0)
    x = mx.random.normal((2, 256))
    mx.eval(layer(x))
    wide = nn.Linear(4096, 4096, bias=False)
    layer = DoRALinear.from_base(wide, rank=4, scale=2.0)
    x = mx.random.normal((2, 4096))
    mx.eval(x, layer.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x))
    # A (out, in) array of float32 would be as large as the weight.
    assert mx.get_peak_memory() - before < wide.weight.nbytes / 8


# ------------------------------------------------------------------------ in a model


def with_dora(model: nn.Module, *, dropout: float = 0.0) -> nn.Module:
    """DoRA that has an effect on every projection."""
    with_adapters(model, dropout=dropout, dora=True)
    for _, layer in lora_layers(model):
        layer.m = layer.m * mx.random.uniform(0.7, 1.3, layer.m.shape)
    mx.eval(model.parameters())
    return model


def test_it_goes_in_changes_nothing_at_first_and_fuses_into_plain_layers():
    model = tiny_llama(tied=False)
    logits = model(TOKENS)
    add_lora(model, projections(model), rank=4, scale=2.0, dora=True)
    assert mx.array_equal(model(TOKENS), logits).item()
    expected = {f"{p}.{n}" for p, _ in lora_layers(model) for n in ("lora_a", "lora_b", "m")}
    assert trainable(model).keys() == expected
    model = with_dora(tiny_llama(tied=False))
    changed = model(TOKENS)
    assert distance(changed, logits) > 1e-3
    tensors = {t.name: t.load() for t in dense_tensors(model)}
    assert tensors.keys() == dict(tree_flatten(tiny_llama(tied=False).parameters())).keys()
    fuse_lora(model)
    assert not dict(lora_layers(model))
    assert distance(model(TOKENS), changed) < 1e-5
    plain = tiny_llama(tied=False)
    plain.load_weights(list(tensors.items()))
    assert distance(plain(TOKENS), changed) < 1e-5


def test_a_pack_gives_loss_and_gradients_of_each_alone():
    model = with_dora(tiny_llama())
    enable_packs(model)
    samples = random_samples((30, 20, 25, 18), prefix=9, untrained=10)
    value, packed = value_and_gradients(model, lambda: loss_of_batch(model, pack(samples)))
    alone_value, alone = value_and_gradients(model, lambda: loss_of_each_alone(model, samples))
    assert value == pytest.approx(alone_value, rel=1e-5)
    assert packed.keys() == alone.keys()
    assert sum(name.endswith(".m") for name in packed) == 14
    for name in alone:
        assert distance(packed[name], alone[name]) < 1e-4, name


def test_a_checkpointed_block_gives_the_same_gradients():
    results = []
    for checkpointed in (False, True):
        model = with_dora(tiny_llama())
        if checkpointed:
            checkpoint_blocks(model, range(len(model.layers)))
        results.append(value_and_gradients(model, lambda m=model: m(TOKENS).square().mean()))
    (value, plain), (again, recomputed) = results
    assert again == pytest.approx(value, rel=1e-6)
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert distance(recomputed[name], gradient) < 1e-5, name


def test_a_checkpointed_block_drops_the_same_elements_again():
    """The gradient, from the second pass, is the slope of what the first pass computes."""
    model = with_dora(tiny_llama(), dropout=0.4)
    model.train()
    checkpoint_blocks(model, range(len(model.layers)))

    def loss() -> mx.array:
        mx.random.seed(8)
        return model(TOKENS).square().mean()

    _, gradients = value_and_gradients(model, loss)
    layer = model.layers[0].mlp.up_proj
    direction = mx.random.normal(layer.m.shape)
    start, step, values = layer.m, 1e-2, []
    for sign in (1, -1):
        layer.m = start + sign * step * direction
        values.append(loss().item())
    slope = (gradients["model.layers.0.mlp.up_proj.m"] * direction).sum().item()
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_a_step_trains_a_b_and_the_magnitude_and_lora_plus_speeds_b_alone():
    samples = random_samples((30, 20, 25, 18), prefix=9, untrained=10)
    moved = {}
    for ratio in (1.0, 4.0):
        model = with_dora(tiny_llama())
        enable_packs(model)
        before = trainable(model)
        optimizer = make_optimizer("adamw", model, weight_decay=0.0)
        step = TrainStep(model, optimizer, max_grad_norm=1.0, lora_plus_ratio=ratio)
        model.train()
        step([pack(samples)], 1e-3)
        after = trainable(model)
        moved[ratio] = {n: mx.abs(after[n] - before[n]).max().item() for n in after}
    for name, once in moved[1.0].items():
        # AdamW's first step is the learning rate in every weight that has a gradient.
        assert once == pytest.approx(1e-3, rel=2e-2), name
        factor = 4 if name.endswith("lora_b") else 1
        assert moved[4.0][name] == pytest.approx(factor * once, rel=2e-2), name
