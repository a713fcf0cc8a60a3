"""Gated activations against the step-by-step ones that models come with."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.layers.gated import geglu, swiglu, use_gated_activations
from mlxtune.layers.inject import quantize_projections
from mlxtune.layers.packing import Packing
from mlxtune.models.heads import split_head
from support.compare import distance, trainable
from support.models import tiny, with_adapters

PLAIN = {
    swiglu: lambda gate, up: nn.silu(gate) * up,
    geglu: lambda gate, up: nn.gelu_approx(gate) * up,
}
TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1, 90, 33, 2, 8]])


@pytest.mark.parametrize("ours", PLAIN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 60.0])
def test_values_and_gradients_are_the_plain_ones(ours, scale):
    gate, up, weights = (mx.random.normal((7, 64), key=mx.random.key(k)) for k in range(3))
    gate = gate * scale

    def both(activation):
        def loss(gate, up):
            return (activation(gate, up) * weights).sum()

        return [activation(gate, up), *mx.grad(loss, argnums=(0, 1))(gate, up)]

    for got, want in zip(both(ours), both(PLAIN[ours]), strict=True):
        assert mx.isfinite(got).all().item()
        assert distance(got, want) < 2e-6


def test_far_ends_are_finite():
    gate = mx.array([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    for activation, plain in PLAIN.items():
        got = mx.grad(lambda g, f=activation: f(g, mx.ones(7)).sum())(gate)
        assert mx.allclose(activation(gate, mx.ones(7)), plain(gate, mx.ones(7)), atol=1e-5).item()
        assert mx.allclose(got, mx.array([0, 0, 0, 0.5, 1, 1, 1]), atol=1e-5).item()


def loss_and_gradients(model: nn.Module):
    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:]).sum()

    value, gradients = nn.value_and_grad(model, loss)(model)
    return value, dict(nn.utils.tree_flatten(gradients))


@pytest.mark.parametrize(
    ("kind", "mlps"),
    [("llama", 2), ("qwen3", 2), ("gemma2", 2), ("gemma3_text", 2), ("phi3", 0)],
)
def test_models_compute_the_same_with_them(kind, mlps):
    model = with_adapters(tiny(kind, tie_word_embeddings=True, sliding_window_pattern=2))
    loss, gradients = loss_and_gradients(model)
    assert use_gated_activations(model) == mlps
    again, ours = loss_and_gradients(model)
    assert distance(again, loss) < 1e-6
    assert gradients.keys() == ours.keys() == trainable(model).keys()
    for name in gradients:
        assert distance(ours[name], gradients[name]) < 2e-5


def test_packed_projections_take_one_too():
    model = tiny("llama", hidden_size=64)
    quantize_projections(model, Packing("affine", 4, 32))
    before = model(TOKENS)
    assert use_gated_activations(model) == 2
    assert distance(model(TOKENS), before) < 1e-5


def test_another_activation_is_left_alone():
    model = tiny("llama")
    original = type(model.layers[0].mlp)

    class Squared(original):
        def __call__(self, x):
            return self.down_proj(nn.relu2(self.gate_proj(x)) * self.up_proj(x))

    for layer in model.layers:
        layer.mlp.__class__ = Squared
    assert use_gated_activations(model) == 0
    assert type(model.layers[0].mlp) is Squared


def test_less_is_kept_for_the_backward_pass():
    def peak(ours: bool) -> int:
        model = with_adapters(tiny("llama", num_hidden_layers=8, intermediate_size=2048))
        if ours:
            use_gated_activations(model)
        body, _ = split_head(model)
        tokens = mx.tile(TOKENS, (1, 20))
        step = nn.value_and_grad(model, lambda model: body(tokens).sum())
        mx.eval(model.parameters())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(model))
        return mx.get_peak_memory() - before

    # Three arrays of the MLP's width instead of five.
    assert peak(True) < 0.75 * peak(False)
