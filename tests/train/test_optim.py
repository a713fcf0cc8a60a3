"""Optimizers are the papers', in NumPy; every choice of a recipe reaches the training."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlxtune.data.pack import pack
from mlxtune.models.enable import enable_packs
from mlxtune.recipe.schema import TrainSection
from mlxtune.train.optim import make_optimizer, update
from mlxtune.train.schedule import learning_rate
from mlxtune.train.step import TrainStep
from support.compare import random_samples, trainable
from support.models import tiny_llama, with_adapters
from support.optim import DECAY, RATE, One, adamw

STEPS = 4


def lion(w, gradients):
    m = np.zeros_like(w)
    for g in gradients:
        step = np.sign(0.9 * m + 0.1 * g)
        w = w * (1 - RATE * DECAY) - RATE * step
        m = 0.99 * m + 0.01 * g
    return w


def sgd(w, gradients):
    v = np.zeros_like(w)
    for g in gradients:
        v = 0.9 * v + (g + DECAY * w)
        w = w - RATE * v
    return w


def muon(w, gradients):
    v = np.zeros_like(w)
    for g in gradients:
        g = g + DECAY * w
        v = 0.95 * v + 0.05 * g
        x = 0.05 * g + 0.95 * v
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):  # Newton-Schulz
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = w - RATE * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x
    return w


def adafactor(w, gradients):
    row = column = None
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        square = g * g + 1e-30
        kept = 0.0 if row is None else row
        row = beta * kept + (1 - beta) * square.mean(axis=1)
        kept = 0.0 if column is None else column
        column = beta * kept + (1 - beta) * square.mean(axis=0)
        step = g / np.sqrt(np.outer(row / row.mean(), column))
        step = step / max(1.0, np.sqrt((step * step).mean()))
        w = w * (1 - RATE * DECAY) - RATE * step
    return w


PAPERS = {
    "adamw": adamw,
    "adamw_8bit": adamw,  # at this size its moments are kept in full
    "lion": lion,
    "sgd": sgd,
    "muon": muon,
    "adafactor": adafactor,
}


def test_these_are_all_that_a_recipe_can_name():
    assert set(TrainSection.model_fields["optimizer"].annotation.__args__) == PAPERS.keys()
    with pytest.raises(ValueError, match="no optimizer is called 'adamwx'"):
        make_optimizer("adamwx", One(np.zeros((2, 2))), weight_decay=0.0)


@pytest.mark.parametrize("name", PAPERS)
def test_a_few_steps_are_those_of_the_paper(name):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 6))
    gradients = generator.normal(size=(STEPS, 4, 6))
    model = One(weight.astype(np.float32))
    optimizer = make_optimizer(name, model, weight_decay=DECAY)
    for gradient in gradients:
        optimizer.learning_rate = mx.array(RATE)
        update(optimizer, model, {"weight": mx.array(gradient.astype(np.float32))})
    expected = PAPERS[name](weight, gradients)
    assert np.abs(np.array(model.weight) - expected).max() < 2e-5


class Two(dict):
    """A 'model' of a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__(matrix=mx.full((64, 64), 2.0), vector=mx.full((4096,), 2.0))

    def trainable_parameters(self) -> dict[str, mx.array]:
        return self


@pytest.mark.parametrize("name", PAPERS)
def test_decay_reaches_matrices_and_not_vectors(name):
    moved = {}
    for decay in (0.0, 0.5):
        model = Two()
        optimizer = make_optimizer(name, model, weight_decay=decay)
        optimizer.learning_rate = mx.array(RATE)
        rising = {n: mx.arange(v.size).reshape(v.shape) / v.size for n, v in model.items()}
        update(optimizer, model, rising)
        moved[decay] = dict(model)
    assert mx.array_equal(moved[0.0]["vector"], moved[0.5]["vector"]).item()
    assert not mx.allclose(moved[0.0]["vector"], mx.array(2.0)).item()
    lost = moved[0.0]["matrix"] - moved[0.5]["matrix"]
    assert mx.abs(lost).max().item() > 1e-4
    if name not in ("muon", "sgd"):  # a share of the weights
        assert mx.allclose(lost, mx.array(RATE * 0.5 * 2.0), rtol=1e-3).item()


def torch_adamw(weight, gradients, **options):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor(weight))
    optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=DECAY, **options)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy()


def lion_with(beta1, beta2):
    def run(w, gradients):
        m = np.zeros_like(w)
        for g in gradients:
            w = w * (1 - RATE * DECAY) - RATE * np.sign(beta1 * m + (1 - beta1) * g)
            m = beta2 * m + (1 - beta2) * g
        return w

    return run


def adamw_uncorrected(weight, gradients):
    """Algorithm 2 of the paper without its lines 9 and 10, which correct the moments."""
    w, m, v = weight.astype(np.float64), 0.0, 0.0
    for g in gradients:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - RATE * (m / (np.sqrt(v) + 1e-8) + DECAY * w)
    return w


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("adamw", {"bias_correction": False}, adamw_uncorrected),
        ("adamw", {"beta1": 0.5}, lambda *a: torch_adamw(*a, betas=(0.5, 0.999))),
        ("adamw", {"beta2": 0.9}, lambda *a: torch_adamw(*a, betas=(0.9, 0.9))),
        ("adamw", {"epsilon": 0.1}, lambda *a: torch_adamw(*a, eps=0.1)),
        (
            "adamw_8bit",
            {"beta1": 0.5, "beta2": 0.9, "epsilon": 0.1},
            lambda *a: torch_adamw(*a, betas=(0.5, 0.9), eps=0.1),
        ),
        ("lion", {"beta1": 0.3}, lion_with(0.3, 0.99)),
        ("lion", {"beta2": 0.5}, lion_with(0.9, 0.5)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_betas_and_epsilon_are_those_that_are_given(name, options, want):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 6)).astype(np.float32)
    gradients = generator.normal(size=(STEPS, 4, 6)).astype(np.float32)

    def ours(**given):
        model = One(weight)
        optimizer = make_optimizer(name, model, weight_decay=DECAY, **given)
        optimizer.learning_rate = mx.array(RATE)
        for gradient in gradients:
            update(optimizer, model, {"weight": mx.array(gradient)})
        return np.array(model.weight)

    assert np.abs(ours(**options) - want(weight, gradients)).max() < 2e-5
    assert np.abs(ours(**options) - ours()).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lion", "adam_epsilon"),
        ("lion", "adam_bias_correction"),
        *product(["adafactor", "muon", "sgd"], ["adam_beta1", "adam_beta2", "adam_epsilon"]),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused(name, key):
    with pytest.raises(ValueError, match=f"{key} goes with adamw, adamw_8bit.*not {name}"):
        value = True if key == "adam_bias_correction" else 0.5
        TrainSection.model_validate({"optimizer": name, key: value})
    with pytest.raises(ValueError, match=f"{name} has no"):
        make_optimizer(name, Two(), weight_decay=0.0, **{key.removeprefix("adam_"): 0.5})


def trained(**settings):
    """Adapters before and after two steps with these settings."""
    model = tiny_llama()
    enable_packs(model)
    with_adapters(model)
    name = settings.pop("optimizer", "adamw")
    optimizer = make_optimizer(name, model, weight_decay=0.0)
    before = trainable(model)
    step = TrainStep(model, optimizer, max_grad_norm=1.0, **settings)
    model.train()
    batch = pack(random_samples((30, 20, 25, 18), prefix=9, untrained=10))
    losses = [step([batch], 1e-3).loss.item() for _ in range(2)]
    return before, trainable(model), losses


@pytest.mark.parametrize("name", PAPERS)
def test_every_optimizer_lowers_the_loss_of_a_model(name):
    first, second = trained(optimizer=name)[2]
    assert second < first


def test_lora_plus_moves_the_b_matrices_so_many_times_farther():
    before, plain, _ = trained()
    _, faster, _ = trained(lora_plus_ratio=4.0)
    model = tiny_llama()
    enable_packs(model)
    with_adapters(model)
    optimizer = make_optimizer("adamw", model, weight_decay=0.0)
    # One step from the same place: the same direction, four times as far.
    step = TrainStep(model, optimizer, max_grad_norm=1.0, lora_plus_ratio=4.0)
    model.train()
    step([pack(random_samples((30, 20, 25, 18), prefix=9, untrained=10))], 1e-3)
    for name, once in trainable(model).items():
        moved = mx.abs(once - before[name]).max().item()
        # AdamW's first step is the learning rate in every weight that has a gradient.
        assert moved == pytest.approx(4e-3 if name.endswith("lora_b") else 1e-3, rel=1e-2)
        assert not mx.allclose(plain[name], faster[name]).item()


def test_a_stable_schedule_decays_at_the_end_alone():
    rates = [
        learning_rate(
            step,
            peak=1.0,
            total_steps=100,
            warmup_steps=10,
            kind="warmup_stable_decay",
            decay_steps=20,
        )
        for step in range(100)
    ]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == pytest.approx([n / 20 for n in range(20, 0, -1)])
