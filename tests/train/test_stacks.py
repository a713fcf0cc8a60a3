"""Parameters that are updated together come out as if each were updated by itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxtune.arrays import flat
from mlxtune.layers.inject import add_lora, projections
from mlxtune.models.enable import enable_packs
from mlxtune.train.optim import make_optimizer, stacks_for, update
from mlxtune.train.stacks import MOST, joined, split, stacks_of
from support.compare import trainable
from support.models import tiny_llama


def adapted(rank: int):
    model = tiny_llama()
    enable_packs(model)
    mx.random.seed(3)
    add_lora(model, projections(model), rank=rank, scale=2.0)
    return model


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion", "sgd", "adafactor", "muon"])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_each_parameter_ends_where_it_would_alone(name, ratio):
    model = adapted(64)
    optimizer = make_optimizer(name, model, weight_decay=0.1)
    start, generator = trainable(model), np.random.default_rng(0)
    alone = {path: {"own": array} for path, array in start.items()}
    single = {}
    for path, tree in alone.items():
        single[path] = type(optimizer)(
            0.0, weight_decay=0.1, **({"bias_correction": True} if "adamw" in name else {}),
            **({"relative_step": False, "scale_parameter": False} if name == "adafactor" else {}),
            **({"momentum": 0.9} if name == "sgd" else {}),
        )  # fmt: skip
        single[path].init(tree)
    for _ in range(3):
        gradients = {
            path: mx.array(generator.normal(size=array.shape).astype(np.float32))
            for path, array in start.items()
        }
        optimizer.learning_rate = mx.array(1e-2)
        tree = tree_unflatten(list(gradients.items()))
        update(optimizer, model, tree, lora_plus_ratio=ratio)
        for path, gradient in gradients.items():
            single[path].learning_rate = mx.array(1e-2)
            old = alone[path]["own"]
            new = single[path].apply_gradients({"own": gradient}, alone[path])["own"]
            faster = ratio if path.endswith("lora_b") else 1.0
            alone[path] = {"own": old + faster * (new - old) if faster != 1 else new}
    after = trainable(model)
    for path in start:
        assert mx.array_equal(after[path], alone[path]["own"]).item(), path


def test_many_parameters_become_a_few_arrays_and_come_apart_again():
    model = adapted(8)
    parameters = flat(model.trainable_parameters())
    stacks = stacks_for(make_optimizer("adamw", model, weight_decay=0.0), model)
    assert len(stacks) < len(parameters) / 2
    again = split(stacks, joined(stacks, parameters))
    assert again.keys() == parameters.keys()
    assert all(mx.array_equal(again[name], parameters[name]).item() for name in parameters)
    # Each name is a key of the optimizer's state, which a checkpoint takes apart at dots.
    assert all("." not in stack.name for stack in stacks if len(stack.paths) > 1)


def test_what_an_optimizer_looks_at_as_a_whole_stays_alone():
    for name in ("muon", "adafactor"):
        model = adapted(8)
        stacks = stacks_for(make_optimizer(name, model, weight_decay=0.0), model)
        assert all(len(stack.paths) == 1 for stack in stacks), name
    # 63 x 64 weights end in the middle of a block of 256, 64 x 64 do not.
    for rank, alone in ((63, True), (64, False)):
        model = adapted(rank)
        stacks = stacks_for(make_optimizer("adamw_8bit", model, weight_decay=0.0), model)
        assert all(len(stack.paths) == 1 for stack in stacks) == alone


def test_copies_are_bounded():
    large = {f"{n}.w": mx.zeros((MOST // 4, 1)) for n in range(6)}
    stacks = stacks_of(large, lambda _: True)
    assert [len(stack.paths) for stack in stacks] == [4, 2]
