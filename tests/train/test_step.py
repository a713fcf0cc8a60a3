"""One step: the loss, accumulation, clipping, the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from mlxtune.data.pack import Batch, pack, pad
from mlxtune.data.passes import Layout, passes
from mlxtune.data.render import Sample
from mlxtune.losses.cross_entropy import weighted_cross_entropy
from mlxtune.models.enable import enable_packs
from mlxtune.models.heads import split_head
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.heldout import held_out_loss
from mlxtune.train.schedule import learning_rate
from mlxtune.train.step import LossFunction, TrainStep
from support.compare import (
    distance,
    loss_of_batch,
    loss_of_each_alone,
    random_samples,
    trainable,
    value_and_gradients,
)
from support.models import GEMMA4, QWEN3_5, tiny, tiny_llama, with_adapters

LAYOUTS = pytest.mark.parametrize("lay_out", [pack, pad])
RAGGED = random_samples((40, 12, 31, 19, 50, 22, 14, 61), prefix=9, untrained=10)


def packable_llama(*, dropout: float = 0.0) -> nn.Module:
    model = tiny_llama()
    enable_packs(model)
    return with_adapters(model, dropout=dropout)


# ------------------------------------------------------------------------ loss


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_weighted_cross_entropy_is_mlx_own_in_value_and_gradient(dtype):
    logits = (mx.random.normal((33, 70)) * 5).astype(dtype)
    targets = mx.random.randint(0, 70, (33,))
    weights = mx.random.uniform(shape=(33,)) * (mx.arange(33) % 3 > 0)

    def ours(x: mx.array) -> mx.array:
        return weighted_cross_entropy(x, targets, weights)

    def theirs(x: mx.array) -> mx.array:
        exact = x.astype(mx.float32)
        return nn.losses.cross_entropy(exact, targets, weights, reduction="sum")

    assert ours(logits).dtype == mx.float32
    assert distance(ours(logits), theirs(logits)) < 1e-5
    assert distance(mx.grad(ours)(logits), mx.grad(theirs)(logits)) < 1e-5


def test_the_sum_over_a_batch_and_its_weight_make_the_mean():
    batch = pack(RAGGED)
    model = packable_llama()
    whole = loss_of_batch(model, batch).item()
    loss_of = LossFunction(model)
    arrays = loss_of.arrays(batch)
    loss, figures = loss_of(arrays, batch.prefix, batch.packed)
    assert figures == {}
    mean = (loss / loss_of.total(arrays)).item()
    assert mean == pytest.approx(whole / batch.weight, rel=1e-5)
    assert mean == pytest.approx(
        loss_of_each_alone(model, RAGGED).item() / sum(float(s.weights.sum()) for s in RAGGED),
        rel=1e-5,
    )


@pytest.mark.slow
def test_float16_holds_the_gradient_of_a_mean_over_thousands_of_tokens():
    """Each token's share of it is below what float16 can hold."""
    words, generator = 8192, np.random.default_rng(0)
    samples = [
        Sample(generator.integers(0, words, 512).astype(np.int32), np.ones(512, np.float32), record)
        for record in range(12)
    ]
    batch = pack(samples)
    assert batch.weight > 6000

    def moved(dtype: mx.Dtype) -> mx.array:
        model = tiny("llama", vocab_size=words, tie_word_embeddings=True)
        model.set_dtype(dtype)
        enable_packs(with_adapters(model))
        before = trainable(model)
        TrainStep(model, optim.SGD(1.0), max_grad_norm=0.0)([batch], 1.0)
        after = trainable(model)
        return mx.concatenate([(after[name] - before[name]).reshape(-1) for name in before])

    want, got = moved(mx.float32), moved(mx.float16)
    assert mx.linalg.norm(got - want).item() < 0.005 * mx.linalg.norm(want).item()


HEADS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: tiny_llama(tied=True),
    "untied": lambda: tiny_llama(tied=False),
    "capped": lambda: tiny("gemma2", final_logit_softcapping=0.5),
    "scaled up": lambda: tiny("cohere", logit_scale=3.0, layer_norm_eps=1e-5),
    "scaled down": lambda: tiny(
        "granite",
        logits_scaling=8.0,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_body_and_head_together_are_the_model(kind):
    model = HEADS[kind]()
    tokens = mx.array([[5, 17, 99, 3], [42, 64, 7, 1]])
    body, head = split_head(model)
    hidden = body(tokens)
    assert hidden.shape == (2, 4, 64)
    assert distance(head(hidden), model(tokens)) < 1e-6


def test_a_model_whose_head_does_more_than_is_known_is_not_split():
    model = tiny(
        "minicpm",
        num_key_value_heads=4,
        dim_model_base=32,
        scale_depth=1.4,
        scale_emb=2.0,
        tie_word_embeddings=False,
    )
    assert split_head(model) is None


def test_dropout_does_not_keep_a_model_from_being_split():
    model = packable_llama(dropout=0.5)
    model.train()
    assert split_head(model) is not None


def test_making_a_step_or_measuring_held_out_loss_draws_no_random_numbers():
    model = packable_llama(dropout=0.5)
    model.train()
    before = np.array(mx.random.state[0])
    TrainStep(model, optim.SGD(0.0), max_grad_norm=0)
    assert np.array_equal(np.array(mx.random.state[0]), before)
    held_out_loss(model, RAGGED, batch_size=4, layout=Layout())
    assert np.array_equal(np.array(mx.random.state[0]), before)
    assert model.training


# ------------------------------------------------------------------------ the step


def after_one_step(
    batches: list[Batch], *, rate: float = 0.5, max_grad_norm: float = 0.0
) -> tuple[dict[str, mx.array], float, float]:
    """Adapters after a step of plain SGD, the loss and the norm."""
    model = packable_llama()
    step = TrainStep(model, optim.SGD(0.0), max_grad_norm=max_grad_norm)
    result = step(batches, rate)
    mx.eval(model.parameters())
    return trainable(model), result.loss.item(), result.grad_norm.item()


@LAYOUTS
def test_one_batch_of_eight_is_eight_batches_of_one(lay_out):
    packing = lay_out is pack
    want, want_loss, want_norm = after_one_step([lay_out(RAGGED)])
    for size in (1, 3):
        batches = passes(RAGGED, size, Layout(packing))
        got, loss, norm = after_one_step(batches)
        assert loss == pytest.approx(want_loss, rel=1e-5)
        assert norm == pytest.approx(want_norm, rel=1e-5)
        for name in want:
            assert mx.abs(got[name] - want[name]).max().item() < 1e-5


@LAYOUTS
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1e3])
def test_a_step_is_the_mean_gradient_clipped_as_mlx_clips_it(lay_out, max_grad_norm):
    model = packable_llama()
    weight = sum(float(s.weights.sum()) for s in RAGGED)
    mean, gradients = value_and_gradients(model, lambda: loss_of_each_alone(model, RAGGED) / weight)
    clipped, want_norm = optim.clip_grad_norm(
        tree_unflatten(list(gradients.items())), max_grad_norm or float("inf")
    )
    clipped = dict(tree_flatten(clipped))
    before = trainable(model)
    after, loss, norm = after_one_step([lay_out(RAGGED)], max_grad_norm=max_grad_norm)
    assert loss == pytest.approx(mean, rel=1e-5)
    assert norm == pytest.approx(want_norm.item(), rel=1e-4)
    for name, gradient in clipped.items():
        assert distance(before[name] - after[name], 0.5 * gradient) < 1e-2
        assert mx.abs(before[name] - 0.5 * gradient - after[name]).max().item() < 1e-6
    moved = sum((before[n] - after[n]).square().sum() for n in before) ** 0.5
    if max_grad_norm == 1e-3:
        assert moved.item() == pytest.approx(0.5e-3, rel=1e-2)


def test_steps_lower_the_loss():
    model = packable_llama()
    step = TrainStep(model, optim.Adam(0.0), max_grad_norm=1.0)
    losses = [step([pack(RAGGED)], 3e-3).loss.item() for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------ checkpointed blocks


def same_when_recomputed(build, batch) -> None:
    results = []
    for recompute in (False, True):
        model = build()
        if recompute:
            checkpoint_blocks(model, range(len(model.layers)))
        results.append(value_and_gradients(model, lambda m=model: loss_of_batch(m, batch)))
    (want, want_gradients), (got, gradients) = results
    assert got == pytest.approx(want, rel=1e-6)
    for name in want_gradients:
        assert distance(gradients[name], want_gradients[name]) < 1e-5


@LAYOUTS
def test_recomputed_blocks_give_the_same_loss_and_gradients(lay_out):
    same_when_recomputed(packable_llama, lay_out(RAGGED))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gemma4_text", GEMMA4),  # later blocks attend to keys and values of earlier ones
        ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2}),
        ("gpt_oss", {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_5", QWEN3_5),
    ],
)
def test_recomputed_blocks_pass_gradients_through_all_that_they_hand_on(kind, sizes):
    same_when_recomputed(lambda: with_adapters(tiny(kind, **sizes)), pad(RAGGED))


def test_recomputed_blocks_of_a_pack_hand_on_keys_and_values():
    def build() -> nn.Module:
        model = tiny("gemma4_text", **GEMMA4)
        enable_packs(model)
        return with_adapters(model)

    same_when_recomputed(build, pack(RAGGED))


@LAYOUTS
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_that_of_the_features_that_were_dropped(lay_out, recompute):
    """With the seed fixed, the loss is a function whose slope can be measured."""
    batch, model = lay_out(RAGGED), packable_llama(dropout=0.5)
    if recompute:
        checkpoint_blocks(model, range(len(model.layers)))
    model.train()
    loss_of = LossFunction(model)
    arrays = loss_of.arrays(batch)

    def loss() -> mx.array:
        mx.random.seed(13)
        return loss_of(arrays, batch.prefix, batch.packed)[0] / loss_of.total(arrays)

    start = trainable(model)
    _, gradients = value_and_gradients(model, loss)
    norm = sum(g.square().sum() for g in gradients.values()).item() ** 0.5

    def at(distance: float) -> float:
        moved = [(n, start[n] + distance / norm * g) for n, g in gradients.items()]
        model.load_weights(moved, strict=False)
        return loss().item()

    assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_step_drops_other_features(recompute):
    model = packable_llama(dropout=0.5)
    if recompute:
        checkpoint_blocks(model, range(len(model.layers)))
    model.train()
    step = TrainStep(model, optim.SGD(0.0), max_grad_norm=0)
    losses = {step([pad(RAGGED)], 0.0).loss.item() for _ in range(4)}
    assert len(losses) == 4


def test_recomputing_is_for_one_model_only():
    other = tiny_llama()
    model = tiny_llama()
    call = llama.TransformerBlock.__call__
    checkpoint_blocks(model, range(len(model.layers)))
    assert llama.TransformerBlock.__call__ is call
    for untouched in (other, tiny_llama()):
        assert {type(block) for block in untouched.layers} == {llama.TransformerBlock}
    assert all(isinstance(block, llama.TransformerBlock) for block in model.layers)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), other(tokens)).item()


# ------------------------------------------------------------------------ learning rate


def rates(kind: str, *, warmup: int = 0, total: int = 50) -> list[float]:
    return [
        learning_rate(s, peak=2e-4, total_steps=total, warmup_steps=warmup, kind=kind)
        for s in range(total)
    ]


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("cosine", optim.cosine_decay(2e-4, 50)),
        ("linear", optim.linear_schedule(2e-4, 0.0, 50)),
        ("constant", lambda _step: mx.array(2e-4)),
    ],
)
def test_learning_rates_are_those_of_mlx_schedules(kind, schedule):
    want = [schedule(mx.array(step)).item() for step in range(50)]
    assert rates(kind) == pytest.approx(want, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_rises_evenly_to_the_peak_and_then_the_schedule_begins(kind):
    warm = rates(kind, warmup=10, total=60)
    assert warm[:10] == pytest.approx([2e-5 * n for n in range(1, 11)])
    assert warm[10:] == pytest.approx(rates(kind, total=50))


def test_the_last_step_of_a_cosine_is_near_zero_and_never_below():
    last = rates("cosine", warmup=3, total=1000)
    assert 0 <= last[-1] < 2e-4 * 1e-5
    assert min(last) >= 0
