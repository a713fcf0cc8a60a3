"""A step for a GPU has few operations, which is what small models are bound by there."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune.arrays import intercept_gradients
from mlxtune.bench.cost import launches_of
from mlxtune.bench.graph import Graph
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.step import StepModel
from mlxtune.data.pack import pack, pad
from mlxtune.device import as_on_gpu
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import QuantizedLinear
from mlxtune.models.known import known_config
from mlxtune.recipe.load import parse_recipe
from mlxtune.train import optim
from mlxtune.train.stacks import stacks_of

# SmolLM2-135M's sizes, but for the number of blocks.
BLOCKS = 6
CONFIG = known_config("HuggingFaceTB/SmolLM2-135M-Instruct") | {"num_hidden_layers": BLOCKS}
LENGTHS = (100, 80, 60, 120, 90, 70, 150, 40)


def graph_of(layout=pack, **changes) -> Graph:
    recipe = {"name": "t", "model": {"path": "t"}, "data": [{"path": "t"}]}
    with as_on_gpu():
        step = StepModel(parse_recipe(recipe, where="t"), CONFIG | changes, None, "bfloat16")
        return step.graph(layout(samples_of(LENGTHS)))


def test_joined_updates_halve_the_launches_of_a_step(monkeypatch):
    blocks = 20
    joined = launches_of(graph_of(num_hidden_layers=blocks))
    monkeypatch.setattr(optim, "stacks_of", lambda arrays, _: stacks_of(arrays, lambda _: False))
    alone = launches_of(graph_of(num_hidden_layers=blocks))
    assert joined < 0.5 * alone
    # A block has seven adapted projections: some 200 kernels forward and backward.
    assert joined / blocks < 210


def test_norms_and_rotations_are_one_kernel_each_in_a_graph_for_a_gpu():
    names = [operation.name for operation in graph_of().order]
    assert not {"Sin", "Cos"} & set(names)
    assert names.count("Sqrt") < 10  # the optimizer's


@pytest.mark.parametrize("heads", [9, 18])
def test_causal_attention_keeps_no_scores_where_metals_does_not(heads):
    """Heads of 64 have kernels with a backward pass, heads of 32 have none."""
    graph = graph_of(pad, num_attention_heads=heads, num_key_value_heads=heads)
    rows, width = pad(samples_of(LENGTHS)).tokens.shape
    softmaxes = [op for op in graph.order if op.name == "Softmax"]
    # One a block, forward, whose result is kept; and the backward pass reads that.
    assert len(softmaxes) == (BLOCKS if heads == 18 else 0)
    scores = [graph.shapes[op.outputs[0]].size for op in softmaxes]
    assert all(size == rows * heads * width * width for size in scores)


def test_a_projection_that_is_not_trained_has_no_gradient_of_our_own():
    """Each generated token builds the graph anew, and a GPU waits for it."""
    layer = QuantizedLinear.from_weight(nn.Linear(128, 128, bias=False), Packing("affine", 4, 64))
    calls = []

    def counted(function, _vjp, args):
        calls.append(args)
        return function(*args)

    with intercept_gradients(counted):
        layer.train()(mx.ones((1, 128)))
        assert len(calls) == 1
        layer.eval()(mx.ones((1, 128)))
        assert len(calls) == 1
