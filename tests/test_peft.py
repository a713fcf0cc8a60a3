"""Our adapters against PEFT's own, in torch: layers, and files both ways."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
from mlx.utils import tree_flatten

from mlxtune.layers.dora import DoRALinear
from mlxtune.layers.lora import LoRALinear

RANK = 6


def difference(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


class Masked(torch.nn.Module):
    """Dropout that drops the elements it is told to."""

    def __init__(self, kept: np.ndarray, p: float) -> None:
        super().__init__()
        self.factors = torch.tensor(kept / (1 - p), dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors


def pair(kind: str, *, bias: bool, dropout: float):
    """A projection of PEFT's and one of ours with the same numbers, B and m trained."""
    mx.random.seed(4)
    torch.manual_seed(4)
    base = nn.Linear(256, 96, bias=bias)
    holder = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=bias))
    state = {f"0.{n}": torch.tensor(np.array(a)) for n, a in tree_flatten(base.parameters())}
    holder.load_state_dict(state)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=9,
        lora_dropout=dropout,
        target_modules=["0"],
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
    )
    theirs = peft.get_peft_model(holder, config).base_model.model[0]
    scale = 9 / (RANK**0.5 if kind == "rslora" else RANK)
    ours_kind = DoRALinear if kind == "dora" else LoRALinear
    ours = ours_kind.from_base(base, rank=RANK, scale=scale, dropout=dropout)
    ours.lora_b = mx.random.normal(ours.lora_b.shape) * 0.1
    theirs.lora_A["default"].weight.data = torch.tensor(np.array(ours.lora_a).T)
    theirs.lora_B["default"].weight.data = torch.tensor(np.array(ours.lora_b).T)
    if kind == "dora":
        # PEFT's own start, ||W||, times a factor.
        factors = mx.random.uniform(0.5, 1.5, ours.m.shape)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        assert difference(np.array(ours.m), magnitude.detach().numpy()) < 1e-6
        magnitude.data *= torch.tensor(np.array(factors))
        ours.m = ours.m * factors
    return ours, theirs


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_forward_and_gradients_are_those_of_peft(kind, bias, dropout):
    ours, theirs = pair(kind, bias=bias, dropout=dropout)
    x, factors = mx.random.normal((24, 256)), mx.random.normal((24, 96))
    if dropout:
        key = mx.random.key(7)
        ours.dropout.draw_with(key)
        kept = mx.random.bernoulli(1 - dropout, x.shape, key=key)
        theirs.lora_dropout["default"] = Masked(np.array(kept), dropout)
    torch_x = torch.tensor(np.array(x), requires_grad=True)
    want = theirs(torch_x)
    (want * torch.tensor(np.array(factors))).sum().backward()
    assert difference(np.array(ours(x)), want.detach().numpy()) < 1e-5
    of_x = mx.grad(lambda v: (ours(v) * factors).sum())(x)
    assert difference(np.array(of_x), torch_x.grad.numpy()) < 1e-5
    _, tree = nn.value_and_grad(ours, lambda v: (ours(v) * factors).sum())(x)
    gradients = {name: np.array(array) for name, array in tree_flatten(tree)}
    expected = {
        "lora_a": theirs.lora_A["default"].weight.grad.numpy().T,
        "lora_b": theirs.lora_B["default"].weight.grad.numpy().T,
    }
    if kind == "dora":
        expected["m"] = theirs.lora_magnitude_vector["default"].weight.grad.numpy()
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert difference(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_fused_weight_is_the_one_that_peft_merges(kind):
    ours, theirs = pair(kind, bias=True, dropout=0.0)
    theirs.merge()
    merged = theirs.base_layer.weight.detach().numpy()
    assert difference(np.array(ours.fused_weight()), merged) < 1e-5
