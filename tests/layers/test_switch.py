"""Experts against a plain loop over them and mlx-lm's own layers, alone and in a model."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear as MlxQuantizedSwitchLinear
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear as MlxLoRASwitchLinear

from mlxtune.data.pack import pack
from mlxtune.errors import ModelError, RecipeError
from mlxtune.fuse import fuse_run
from mlxtune.layers.dense import dense_tensors
from mlxtune.layers.inject import (
    dequantize_layers,
    fuse_lora,
    own_quantized_layers,
    projections,
    quantize_projections,
)
from mlxtune.layers.quantized import PackedLayer, QuantizedLinear, Route, packing_named
from mlxtune.layers.switch import LoRASwitchLinear, QuantizedSwitchLinear
from mlxtune.models.enable import enable_packs
from mlxtune.models.targets import find_targets
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.metrics import Silent
from mlxtune.train.optim import make_optimizer
from mlxtune.train.session import fine_tune, open_run
from mlxtune.train.step import TrainStep
from support.compare import (
    distance,
    loss_of_batch,
    loss_of_each_alone,
    random_samples,
    trainable,
    value_and_gradients,
)
from support.files import SHELL_TRAIN, write_jsonl
from support.models import QWEN3_MOE, tiny, with_adapters

EXPERTS, OUT, IN, TOKENS, EACH = 6, 48, 64, 40, 3
PACKINGS = (4, "mxfp4", "mxfp8", "nvfp4", "nf4")


def experts(*, bias: bool = True) -> SwitchLinear:
    mx.random.seed(0)
    layer = SwitchLinear(IN, OUT, EXPERTS, bias=bias)
    if bias:
        layer.bias = mx.random.normal((EXPERTS, OUT))
    return layer


def rows_and_experts(ordered: bool) -> tuple[mx.array, mx.array]:
    """Input and indices as `SwitchGLU` gives them, for few tokens and, in order, for many."""
    mx.random.seed(1)
    x = mx.random.normal((TOKENS, 1, 1, IN))
    indices = mx.argsort(mx.random.uniform(shape=(TOKENS, EXPERTS)), axis=-1)[:, :EACH]
    if not ordered:
        return x, indices
    order = mx.argsort(indices.flatten())
    return x.flatten(0, -3)[order // EACH], indices.flatten()[order]


def looped(weight: mx.array, bias: mx.array, x: mx.array, indices: mx.array) -> mx.array:
    """Each row by the weight of its expert, one at a time."""
    flat = mx.broadcast_to(x, (*indices.shape, 1, IN)).reshape(-1, IN)
    rows = [
        row @ weight[expert].T + bias[expert]
        for row, expert in zip(flat, indices.flatten().tolist(), strict=True)
    ]
    return mx.stack(rows).reshape(*indices.shape, 1, -1)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("route", [Route(None, None), Route(0, 0)], ids=["packed", "expanded"])
@pytest.mark.parametrize("name", PACKINGS)
def test_packed_experts_and_their_input_gradient_are_a_loop_over_experts(name, route, ordered):
    plain = experts()
    layer = QuantizedSwitchLinear.from_weight(plain, packing_named(name))
    layer.route = route
    x, indices = rows_and_experts(ordered)
    weight = layer.dequantized()
    if name != "nf4":
        theirs = plain.to_quantized(layer.group_size, layer.bits, mode=layer.mode)
        assert distance(layer(x, indices, ordered), theirs(x, indices, ordered)) < 1e-5
    assert distance(layer(x, indices, ordered), looped(weight, plain.bias, x, indices)) < 1e-5
    factors = mx.random.normal((*indices.shape, 1, OUT))
    got = mx.grad(lambda x: (layer(x, indices, ordered) * factors).sum())(x)
    want = mx.grad(lambda x: (looped(weight, plain.bias, x, indices) * factors).sum())(x)
    assert distance(got, want) < 1e-5


def test_experts_expand_when_each_meets_enough_rows(monkeypatch):
    layer = QuantizedSwitchLinear.from_weight(experts(bias=False), packing_named(4))
    x, indices = rows_and_experts(ordered=True)
    taken = []
    product = layer.product

    def noted(*args, expand, **kw):
        taken.append(expand)
        return product(*args, expand=expand, **kw)

    monkeypatch.setattr(layer, "product", noted)
    each = TOKENS * EACH // EXPERTS
    for least, want in [(each, True), (each + 1, False)]:
        layer.route = Route(least, least)
        layer(x, indices, True)
        assert taken.pop() is want


def pair_of_adapters(*, packed: bool, dropout: float = 0.0):
    """Ours and mlx-lm's, with the same arrays."""
    base = experts()
    if packed:
        base = base.to_quantized(64, 4)
    theirs = MlxLoRASwitchLinear.from_base(base, r=5, scale=1.7, dropout=dropout)
    own = QuantizedSwitchLinear.from_mlx(base) if packed else base
    ours = LoRASwitchLinear.from_base(own, rank=5, scale=1.7, dropout=dropout)
    assert ours.lora_a.shape == theirs.lora_a.shape
    assert ours.lora_b.shape == theirs.lora_b.shape
    ours.lora_a = theirs.lora_a
    ours.lora_b = theirs.lora_b = mx.random.normal(theirs.lora_b.shape) * 0.1
    base.freeze()
    return ours, theirs


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_lora_on_experts_and_its_gradients_are_those_of_mlx_lm_and_of_a_loop(packed, ordered):
    ours, theirs = pair_of_adapters(packed=packed)
    x, indices = rows_and_experts(ordered)
    factors = mx.random.normal((*indices.shape, 1, OUT))
    weight = ours.linear.dequantized() if packed else ours.linear.weight
    bias = ours.linear.bias

    def by_loop(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
        return looped(weight + 1.7 * (b @ a), bias, x, indices)

    def by_layer(layer: nn.Module):
        def run(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
            layer.lora_a, layer.lora_b = a, b
            return layer(x, indices, sorted_indices=ordered)

        return run

    results = []
    parameters = (ours.lora_a, ours.lora_b, x)
    for run in (by_layer(ours), by_layer(theirs), by_loop):
        loss = mx.grad(lambda *p, run=run: (run(*p) * factors).sum(), argnums=(0, 1, 2))
        results.append([run(*parameters), *loss(*parameters)])
    for want in results[1:]:
        for got, expected in zip(results[0], want, strict=True):
            assert distance(got, expected) < 1e-5


def test_a_new_adapter_changes_nothing_and_only_it_is_trained():
    layer = LoRASwitchLinear.from_base(
        QuantizedSwitchLinear.from_weight(experts(), packing_named(4)), rank=4, scale=2.0
    )
    x, indices = rows_and_experts(ordered=False)
    assert mx.array_equal(layer(x, indices), layer.linear(x, indices)).item()
    layer.unfreeze()
    assert trainable(layer).keys() == {"lora_a", "lora_b"} == {*layer.trained()}


def test_dropout_on_experts_is_mlx_own():
    ours, theirs = pair_of_adapters(packed=False, dropout=0.5)
    x, indices = rows_and_experts(ordered=False)
    results = []
    for layer in (ours, theirs):
        mx.random.seed(21)
        results.append(layer(x, indices))
    assert distance(*results) < 1e-5
    ours.eval()
    assert not mx.allclose(ours(x, indices), results[0]).item()


@pytest.mark.parametrize("packed", [False, True])
def test_fused_experts_compute_what_the_live_adapter_computes(packed):
    ours, theirs = pair_of_adapters(packed=packed)
    x, indices = rows_and_experts(ordered=True)
    fused = ours.fuse()
    assert type(fused) is SwitchLinear and fused.weight.dtype == mx.float32
    assert distance(fused(x, indices, True), ours(x, indices, True)) < 1e-5
    assert distance(fused(x, indices, True), theirs.fuse(dequantize=True)(x, indices, True)) < 1e-5


# ------------------------------------------------------------------------ in a model

IDS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1] * 4])
EXPERT_LAYERS = [f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]


def moe(**changes) -> nn.Module:
    return tiny("qwen3_moe", **(QWEN3_MOE | changes))


def targets(model: nn.Module, *names: str) -> list[str]:
    return find_targets(projections(model), names, layer_count=2)


def test_all_linear_means_experts_and_no_router():
    found = targets(moe(), "all-linear")
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    want = {f"model.layers.{i}.{name}" for i in (0, 1) for name in attention + EXPERT_LAYERS}
    assert set(found) == want
    assert targets(moe(), "mlp.gate") == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert targets(moe(), "switch_mlp.up_proj") == targets(moe(), "up_proj")


@pytest.mark.parametrize(
    ("kind", "router"),
    [("granitemoe", "block_sparse_moe.router.layer"), ("qwen2_moe", "mlp.shared_expert_gate")],
)
def test_routers_of_other_architectures_are_known_too(kind, router):
    sizes = QWEN3_MOE | {
        "shared_expert_intermediate_size": 64,
        "num_local_experts": 8,
        "logits_scaling": 1.0,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    }
    model = tiny(kind, **sizes)
    path = f"model.layers.0.{router}"
    assert path in projections(model)
    found = targets(model, "all-linear")
    assert path not in found and "model.layers.0.mlp.gate" not in found
    assert any("switch_mlp" in path for path in found)


@pytest.mark.parametrize("name", [None, 4, "nf4"])
def test_packed_samples_give_the_loss_and_gradients_of_each_alone(name):
    model = moe()
    if name is not None:
        quantize_projections(model, packing_named(name))
    with_adapters(model, targets(model, "all-linear"))
    samples = random_samples((31, 32, 41, 29, 36, 30), prefix=24, untrained=25)
    want, of_each = value_and_gradients(model, lambda: loss_of_each_alone(model, samples))
    enable_packs(model)
    batch = pack(samples)
    assert batch.packed and batch.prefix == 24
    got, of_batch = value_and_gradients(model, lambda: loss_of_batch(model, batch))
    assert got == pytest.approx(want, rel=1e-4)
    assert of_batch.keys() == of_each.keys()
    for key in of_each:
        assert distance(of_batch[key], of_each[key]) < 1e-4, key
    checkpoint_blocks(model, range(len(model.layers)))
    again, recomputed = value_and_gradients(model, lambda: loss_of_batch(model, batch))
    assert again == pytest.approx(got, rel=1e-6)
    for key in of_each:
        assert distance(recomputed[key], of_batch[key]) < 1e-5, key


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_packed_experts_of_mlx_lm_are_taken_over_and_expand(mode):
    model, theirs = moe(), moe()
    for one in (model, theirs):
        nn.quantize(
            one, mode=mode, class_predicate=lambda _, m: isinstance(m, nn.Linear | SwitchLinear)
        )
    own_quantized_layers(model, mx.float32)
    assert not any(isinstance(m, MlxQuantizedSwitchLinear) for m in model.modules())
    assert sum(isinstance(m, QuantizedSwitchLinear) for m in model.modules()) == 6
    assert dict(tree_flatten(model.parameters())).keys() == {
        name for name, _ in tree_flatten(theirs.parameters())
    }
    assert distance(model(IDS), theirs(IDS)) < 1e-4
    dequantize_layers(model, mx.float32)
    assert not any(isinstance(m, PackedLayer) for m in model.modules())
    assert distance(model(IDS), theirs(IDS)) < 1e-4


def test_experts_with_a_scale_over_the_whole_tensor_are_refused_by_path():
    model = moe()
    layer = model.layers[0].mlp.switch_mlp.up_proj
    packed = layer.to_quantized(16, 4, mode="nvfp4")
    packed.global_scale = mx.ones((8,))
    model.layers[0].mlp.switch_mlp.up_proj = packed
    with pytest.raises(ModelError, match="scale over the whole tensor") as caught:
        own_quantized_layers(model)
    assert caught.value.where == "model.layers.0.mlp.switch_mlp.up_proj"


def test_quantizing_packs_experts_and_leaves_routers_as_they_are():
    model, plain = moe(), moe()
    quantize_projections(model, packing_named("nf4"))
    assert type(model.layers[0].mlp.gate) is nn.Linear
    assert isinstance(model.layers[0].self_attn.q_proj, QuantizedLinear)
    layer = model.layers[0].mlp.switch_mlp.up_proj
    want = plain.layers[0].mlp.switch_mlp.up_proj.weight
    assert layer.shape == want.shape
    assert mx.abs(layer.dequantized() - want).mean() < 0.2 * mx.abs(want).mean()


@pytest.mark.parametrize("name", [None, 4])
def test_a_fused_model_computes_what_the_adapters_compute(name):
    model, fresh = moe(), moe()
    if name is not None:
        quantize_projections(model, packing_named(name))
    with_adapters(model, targets(model, "all-linear"))
    want = model(IDS)
    dense = {tensor.name: tensor for tensor in dense_tensors(model)}
    fresh.load_weights([(name, tensor.load()) for name, tensor in dense.items()], strict=True)
    assert all(tensor.load().shape == tensor.shape for tensor in dense.values())
    assert distance(fresh(IDS), want) < 1e-4
    fuse_lora(model)
    assert distance(model(IDS), want) < 1e-4


# ------------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def moe_folder(tiny_folder, tmp_path_factory) -> Path:
    """A random two-block qwen3_moe with a tokenizer of bytes, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    shutil.copytree(tiny_folder, folder)
    model = moe(vocab_size=258)
    model.save_weights(str(folder / "model.safetensors"))
    config = {name: value for name, value in asdict(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 257}))
    return folder


@pytest.mark.parametrize(
    ("model", "train"),
    [({}, {}), ({"quantize": 4}, {"gradient_checkpointing": True}), ({"quantize": "nf4"}, {})],
    ids=str,
)
def test_a_mixture_of_experts_trains_and_goes_to_mlx_lm(moe_folder, tmp_path, model, train):
    lines = SHELL_TRAIN.read_text().splitlines()[::60]
    data = write_jsonl(tmp_path / "few.jsonl", map(json.loads, lines))
    values = {
        "name": "moe",
        "model": {"path": str(moe_folder)} | model,
        "lora": {"rank": 4},
        "data": [{"path": str(data)}],
        "train": {"batch_size": 4, "max_steps": 5, "learning_rate": 1e-2} | train,
        "log": {"steps": 1},
    }
    run = fine_tune(parse_recipe(values, where="test"), tmp_path / "run", Silent())
    losses = [entry["loss"] for entry in run.metrics()]
    assert losses[-1] < 0.95 * losses[0]
    report = fuse_run(run.path, tmp_path / "fused")
    assert report.max_logit_difference < 1e-3
    _, live = open_run(run.path)
    want = live.model(IDS)
    fused, _ = mlx_lm.utils.load_model(tmp_path / "fused")
    assert distance(fused(IDS), want) < 1e-3
    if not model:
        theirs, _ = mlx_lm.utils.load_model(moe_folder)
        theirs = mlx_lm.utils.load_adapters(theirs, str(run.adapter))
        theirs.eval()
        assert distance(theirs(IDS), want) < 1e-4


@pytest.mark.slow
def test_a_compiled_step_with_packed_experts_is_the_plain_step():
    results = []
    for compiled in (False, True):
        model = moe()
        quantize_projections(model, packing_named("nf4"))
        with_adapters(model, targets(model, "all-linear"))
        enable_packs(model)
        optimizer = make_optimizer("sgd", model, weight_decay=0.0)
        step = TrainStep(model, optimizer, max_grad_norm=1.0, compiled=compiled)
        model.train()
        batch = pack(random_samples((31, 32, 41, 29, 36, 30), prefix=24, untrained=25))
        results.append([step([batch], 0.1).loss.item() for _ in range(3)])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0][-1] < results[0][0]


def test_an_optimizer_that_would_mix_experts_is_refused():
    model = nn.Sequential(LoRASwitchLinear.from_base(experts(), rank=4, scale=2.0))
    model.freeze()
    model.layers[0].unfreeze(keys=["lora_a", "lora_b"])
    assert {a.ndim for a in trainable(model).values()} == {3}
    with pytest.raises(RecipeError, match="adapters of experts"):
        make_optimizer("muon", model, weight_decay=0.0)
    assert make_optimizer("adamw", model, weight_decay=0.0)
