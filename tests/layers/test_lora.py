"""LoRA layers against mlx-lm's, how they enter a model, and which layers a name means."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear

from mlxtune.errors import TargetError
from mlxtune.layers.inject import (
    add_lora,
    fuse_lora,
    lora_layers,
    projections,
    quantize_projections,
)
from mlxtune.layers.lora import LoRALinear
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import QuantizedLinear
from mlxtune.models.targets import find_targets
from mlxtune.recipe.schema import LoraSection
from support.compare import distance, trainable
from support.models import tiny_llama

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Below and above the number of rows from which a CPU multiplies by the expanded weight.
ROWS = (3, 24)
TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])


def linear(*, bias: bool, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    layer = nn.Linear(256, 96, bias=bias)
    layer.set_dtype(dtype)
    return layer


def bases(bias: bool, dtype: mx.Dtype) -> list[nn.Linear | QuantizedLinear]:
    plain = linear(bias=bias, dtype=dtype)
    return [plain, QuantizedLinear.from_weight(plain, Packing("affine", 4, 64))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_new_adapter_computes_exactly_its_base_in_its_type(dtype, bias):
    for base in bases(bias, dtype):
        adapted = LoRALinear.from_base(base, rank=8, scale=20.0)
        for rows in ROWS:
            x = mx.random.normal((rows, 256)).astype(dtype)
            y = adapted(x)
            assert y.dtype == dtype
            assert mx.array_equal(y, base(x)).item()


def test_a_trained_adapter_stays_in_its_base_type_and_is_kept_in_float32():
    for base in bases(False, mx.bfloat16):
        adapted = LoRALinear.from_base(base, rank=8, scale=1.0)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
        assert adapted(mx.random.normal((4, 256)).astype(mx.bfloat16)).dtype == mx.bfloat16
        assert adapted.lora_a.dtype == adapted.lora_b.dtype == mx.float32


def pair_of_adapters(*, packed: bool, bias: bool, dropout: float = 0.0):
    """Ours and mlx-lm's, with the same arrays."""
    base = linear(bias=bias)
    if packed:
        base = nn.QuantizedLinear.from_linear(base, group_size=64, bits=4)
    theirs = MlxLoRALinear.from_base(base, r=6, scale=1.7, dropout=dropout)
    own = QuantizedLinear.from_mlx(base) if packed else base
    ours = LoRALinear.from_base(own, rank=6, scale=1.7, dropout=dropout)
    ours.lora_a = theirs.lora_a
    ours.lora_b = theirs.lora_b = mx.random.normal((6, 96)) * 0.1
    base.freeze()
    return ours, theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_lora_forward_and_gradients_are_those_of_mlx_lm(rows, packed, bias):
    pair = pair_of_adapters(packed=packed, bias=bias)
    x = mx.random.normal((rows, 256))
    factors = mx.random.normal((rows, 96))
    outputs, of_input, of_parameters = [], [], []
    for layer in pair:
        outputs.append(layer(x))
        of_input.append(mx.grad(lambda v, layer=layer: (layer(v) * factors).sum())(x))
        gradient = nn.value_and_grad(layer, lambda v, layer=layer: (layer(v) * factors).sum())
        of_parameters.append(dict(tree_flatten(gradient(x)[1])))
    assert distance(*outputs) < 1e-5
    assert distance(*of_input) < 1e-5
    ours, theirs = of_parameters
    assert ours.keys() == theirs.keys() == {"lora_a", "lora_b"}
    for name in ours:
        assert distance(ours[name], theirs[name]) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_lora_in_sixteen_bits_is_as_near_to_float32_as_mlx_lm(dtype, packed):
    pair = pair_of_adapters(packed=packed, bias=True)
    x = mx.random.normal((24, 256)).astype(dtype)
    exact = pair[1](x.astype(mx.float32))
    for layer in pair:
        layer.linear.set_dtype(dtype)
    pair[1].set_dtype(dtype)
    ours, theirs = (layer(x) for layer in pair)
    assert ours.dtype == dtype
    assert distance(ours, exact) < 1.5 * distance(theirs, exact)
    gradient = nn.value_and_grad(pair[0], lambda v: pair[0](v).astype(mx.float32).square().sum())
    assert {g.dtype for _, g in tree_flatten(gradient(x)[1])} == {mx.float32}


def test_dropout_is_mlx_own_in_training_and_absent_otherwise():
    ours, theirs = pair_of_adapters(packed=False, bias=False, dropout=0.5)
    x = mx.random.normal((8, 256))
    results = []
    for layer in (ours, theirs):
        mx.random.seed(21)
        results.append(layer(x))
    assert distance(*results) < 1e-5
    assert not mx.allclose(ours(x), ours(x)).item()
    dropped = ours(x)
    ours.eval(), theirs.eval()
    assert mx.array_equal(ours(x), ours(x)).item()
    assert distance(ours(x), theirs(x)) < 1e-5
    assert not mx.allclose(ours(x), dropped).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_fused_layers_compute_what_the_live_adapter_computes(packed, bias):
    ours, theirs = pair_of_adapters(packed=packed, bias=bias)
    x = mx.random.normal((16, 256))
    fused = ours.fuse()
    assert type(fused) is nn.Linear
    assert fused.weight.dtype == mx.float32
    assert distance(fused(x), ours(x)) < 1e-5
    assert distance(fused(x), theirs.fuse(dequantize=True)(x)) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_fused_weight_is_the_formula_in_numpy(packed):
    ours, theirs = pair_of_adapters(packed=packed, bias=False)
    base = theirs.linear
    weight = mx.dequantize(base.weight, base.scales, base.biases) if packed else base.weight
    a, b = (np.array(m, np.float64) for m in (ours.lora_a, ours.lora_b))
    want = np.array(weight, np.float64) + 1.7 * (a @ b).T
    assert np.abs(np.array(ours.fused_weight()) - want).max() < 1e-6


def test_the_recipe_scales_by_rank_and_rslora_by_its_root():
    assert LoraSection(rank=16, alpha=8.0).scale == 0.5
    assert LoraSection(rank=16, alpha=8.0, rslora=True).scale == 2.0
    model = tiny_llama()
    section = LoraSection(rank=16, alpha=8.0, rslora=True)
    add_lora(model, projections(model), rank=section.rank, scale=section.scale)
    layer = model.layers[0].self_attn.q_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    x = mx.random.normal((4, 64))
    update = x @ layer.lora_a @ layer.lora_b * (8.0 / 16**0.5)
    assert distance(layer(x) - layer.linear(x), update) < 1e-5


# ------------------------------------------------------------------------ in a model


def test_adapters_go_in_change_nothing_at_first_and_fuse_into_plain_layers():
    model = tiny_llama(tied=False)
    logits = model(TOKENS)
    paths = ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    add_lora(model, paths, rank=4, scale=2.0)
    assert {path for path, _ in lora_layers(model)} == set(paths)
    assert mx.array_equal(model(TOKENS), logits).item()
    for _, layer in lora_layers(model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    changed = model(TOKENS)
    assert not mx.allclose(changed, logits).item()
    fuse_lora(model)
    assert not dict(lora_layers(model))
    assert mx.allclose(model(TOKENS), changed, rtol=1e-4, atol=1e-5).item()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_exist_for_adapters_only(packed):
    model = tiny_llama()
    if packed:
        quantize_projections(model, Packing("affine", 4, 32))
    paths = list(projections(model))
    add_lora(model, paths, rank=4, scale=2.0)
    expected = {f"{path}.{name}" for path in paths for name in ("lora_a", "lora_b")}
    assert trainable(model).keys() == expected
    loss = nn.value_and_grad(model, lambda t: model(t).square().sum())
    _, gradients = loss(TOKENS)
    assert {name for name, _ in tree_flatten(gradients)} == expected


def targets(*names: str, layers=None, exclude=()) -> list[str]:
    found = projections(tiny_llama(tied=False))
    return find_targets(dict(found), names, exclude=exclude, layers=layers, layer_count=2)


def test_all_linear_means_every_projection_of_the_blocks_and_not_the_head():
    model = tiny_llama(tied=False)
    want = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"]
    assert sorted(targets("all-linear")) == sorted(want)
    assert len(want) == 14


def test_targets_are_named_by_the_end_of_their_paths():
    both = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert targets("q_proj") == both
    assert targets("self_attn.q_proj") == both
    assert targets("1.self_attn.q_proj") == both[1:]
    in_order = [p for p in targets("all-linear") if p.endswith((".q_proj", "mlp.up_proj"))]
    assert targets("mlp.up_proj", "q_proj", "q_proj") == in_order


def test_patterns_match_whole_paths():
    attention = [p for p in targets("all-linear") if ".self_attn." in p]
    assert len(attention) == 8
    assert targets("*.self_attn.*") == attention
    assert targets("model.layers.?.self_attn.[qv]_proj") == targets("q_proj", "v_proj")
    assert targets("*.1.mlp.*_proj", "k_proj") == [
        p for p in targets("all-linear") if ".1.mlp." in p or p.endswith("k_proj")
    ]
    # `q*` would be all paths that begin so, and none does.
    for pattern in ("q*", "*.SELF_ATTN.*", "embed_*"):
        with pytest.raises(TargetError, match="no layer of this model") as caught:
            targets(pattern)
        assert "paths such as model.layers.0." in caught.value.remedy


def test_excluded_modules_are_left_out_again():
    everything = targets("all-linear")
    assert targets("all-linear", exclude=("down_proj",)) == [
        p for p in everything if not p.endswith("down_proj")
    ]
    assert targets("all-linear", exclude=("*.mlp.*", "0.self_attn.q_proj")) == [
        p for p in everything if ".self_attn." in p and not p.endswith("0.self_attn.q_proj")
    ]
    with pytest.raises(TargetError) as caught:
        targets("all-linear", exclude=("donw_proj",))
    assert caught.value.where == "lora.exclude_modules"
    assert "did you mean down_proj?" in caught.value.remedy
    with pytest.raises(TargetError, match="leave nothing of q_proj"):
        targets("q_proj", exclude=("*.self_attn.*",))


def test_layers_takes_a_list_of_numbers_and_ranges():
    paths = [f"model.layers.{n}.mlp.up_proj" for n in range(12)]
    layers = dict.fromkeys(paths)

    def chosen(*parts):
        found = find_targets(layers, ("up_proj",), layers=parts, layer_count=12)
        return [paths.index(path) for path in found]

    assert chosen(0, 1, "8-11") == [0, 1, 8, 9, 10, 11]
    assert chosen("3-3", 5, "4 - 6") == [3, 4, 5, 6]
    for part in (12, "8-12", "0-999999999999"):
        with pytest.raises(TargetError, match="12 layers are numbered 0 to 11") as caught:
            chosen(0, part)
        assert caught.value.where == "lora.layers"


def test_layers_takes_the_last_blocks():
    assert targets("v_proj", layers=1) == ["model.layers.1.self_attn.v_proj"]
    assert targets("v_proj", layers=2) == targets("v_proj")
    with pytest.raises(TargetError, match="3 layers were asked for, and the model has 2"):
        targets("v_proj", layers=3)


def test_names_and_layers_that_leave_nothing_to_adapt_are_refused():
    with pytest.raises(TargetError):
        targets("0.self_attn.v_proj", layers=1)


def test_the_output_layer_is_adapted_where_it_is_named():
    blocks = targets("all-linear")
    assert sorted(targets("all-linear", "lm_head")) == sorted([*blocks, "lm_head"])
    assert targets("lm_*") == ["lm_head"]
    assert set(targets("v_proj", "lm_head", layers=1)) == {
        *targets("1.self_attn.v_proj"),
        "lm_head",
    }
    with pytest.raises(TargetError, match="no layer of this model is called 'lm_head'"):
        find_targets(dict(projections(tiny_llama(tied=True))), ["lm_head"], layer_count=2)


@pytest.mark.parametrize("name", ["q_prj", "attn.q_proj", "proj", "head"])
def test_a_name_that_matches_nothing_is_refused_with_the_names_there_are(name):
    with pytest.raises(TargetError) as caught:
        targets("v_proj", name)
    assert name in caught.value.what
    for there in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert there in caught.value.remedy
