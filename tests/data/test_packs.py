"""Layouts of a batch: nothing is lost, and a sample fares as if it stood alone."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data.pack import PADDING, PREFIX, Batch, common_prefix, pack, pad
from mlxtune.data.render import Sample
from mlxtune.errors import ModelError
from mlxtune.models.enable import enable_packs
from mlxtune.models.packed import PackCache
from support.compare import (
    distance,
    loss_of_batch,
    loss_of_each_alone,
    random_samples,
    value_and_gradients,
)
from support.models import GEMMA4, tiny, tiny_llama, with_adapters
from support.properties import examples

TOKENS = mx.array([[5, 17, 99, 3, 42, 64, 7, 1]])

ALONE = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
PROPORTIONAL = {
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS = {
    "llama, tied": lambda: tiny_llama(tied=True),
    "llama, untied": lambda: tiny_llama(tied=False),
    "llama, sliding window": lambda: tiny(
        "llama",
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=6,
    ),
    "qwen3": lambda: tiny("qwen3", tie_word_embeddings=True),
    "gemma3, sliding window": lambda: tiny(
        "gemma3_text", sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=16.0
    ),
    "gemma2, capped": lambda: tiny(
        "gemma2",
        final_logit_softcapping=0.5,
        attn_logit_softcapping=0.2,
        query_pre_attn_scalar=1.0,
    ),
    "gemma4, blocks that share keys": lambda: tiny("gemma4_text", **GEMMA4),
    "gemma4, values from keys": lambda: tiny(
        "gemma4_text",
        **GEMMA4 | ALONE,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "gemma4, experts": lambda: tiny(
        "gemma4_text",
        **GEMMA4 | ALONE,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "gemma4, some dimensions turned": lambda: tiny(
        "gemma4_text", **GEMMA4, rope_parameters=PROPORTIONAL
    ),
    "cohere2, a block without positions": lambda: tiny(
        "cohere2", sliding_window=6, sliding_window_pattern=2
    ),
    "smollm3, a block without positions": lambda: tiny(
        "smollm3", tie_word_embeddings=True, no_rope_layer_interval=2
    ),
    "minicpm, whose head does not come apart": lambda: tiny(
        "minicpm",
        num_key_value_heads=4,
        dim_model_base=32,
        scale_depth=1.4,
        scale_emb=2.0,
        tie_word_embeddings=False,
    ),
}
SAMPLES = {
    "nothing in common": random_samples((40, 23, 31, 19, 50)),
    "common prefix": random_samples((40, 23, 31, 19, 50, 22), prefix=17, untrained=18),
    "first target right after the prefix": random_samples((30, 22, 19), prefix=17, untrained=17),
    "prefix longer than a row": random_samples((46, 44, 45, 43), prefix=40, untrained=41),
    "prefix as long as a row": random_samples((32, 32), prefix=16, untrained=16),
    "one token after the prefix": random_samples((21, 21, 21), prefix=20, untrained=20),
    "one sample": random_samples((27,), untrained=5),
}


# Each kind of model on one layout, and each layout with one kind; the rest is slow.
PAIRS = [
    pytest.param(kind, case, marks=[pytest.mark.slow] * slow, id=f"{case}-{kind}")
    for kind in MODELS
    for case in SAMPLES
    for slow in [kind != "llama" and case != "common prefix"]
]


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_loss_and_gradients_are_those_of_each_sample_alone(kind, case):
    model, samples = MODELS[kind](), SAMPLES[case]
    enable_packs(model)
    with_adapters(model)
    want, want_gradients = value_and_gradients(model, lambda: loss_of_each_alone(model, samples))
    for lay_out in (pack, pad):
        batch = lay_out(samples)
        got, gradients = value_and_gradients(model, lambda b=batch: loss_of_batch(model, b))
        assert got == pytest.approx(want, rel=1e-4)
        for name, gradient in gradients.items():
            assert distance(gradient, want_gradients[name]) < 1e-4, (lay_out.__name__, name)


def test_the_cases_are_laid_out_as_they_are_called():
    layouts = {case: pack(samples) for case, samples in SAMPLES.items()}
    widths = {case: batch.tokens.shape[1] for case, batch in layouts.items()}
    prefixes = {case: batch.prefix for case, batch in layouts.items()}
    assert prefixes["nothing in common"] == prefixes["one sample"] == 0
    assert prefixes["common prefix"] == 17
    assert prefixes["prefix longer than a row"] == 40 > widths["prefix longer than a row"]
    assert prefixes["prefix as long as a row"] == 16 == widths["prefix as long as a row"]
    assert prefixes["one token after the prefix"] == 20


def test_samples_trained_from_their_first_token_on_may_begin_alike():
    model = with_adapters(_packable())
    samples = random_samples((20, 25, 31), prefix=12, untrained=0)
    batch = pack(samples)
    want = loss_of_each_alone(model, samples).item()
    assert loss_of_batch(model, batch).item() == pytest.approx(want, rel=1e-5)


def test_random_ragged_batches_come_out_as_each_sample_alone():
    model = with_adapters(_packable())
    generator = np.random.default_rng(5)
    for seed in range(12):
        prefix = int(generator.integers(0, 30))
        lengths = generator.integers(prefix + 2, prefix + 60, size=generator.integers(1, 9))
        samples = random_samples(lengths, prefix=prefix, untrained=prefix + 1, seed=seed)
        want = loss_of_each_alone(model, samples).item()
        assert loss_of_batch(model, pack(samples)).item() == pytest.approx(want, rel=1e-5)
        assert loss_of_batch(model, pad(samples)).item() == pytest.approx(want, rel=1e-5)


def _packable() -> nn.Module:
    model = tiny_llama()
    enable_packs(model)
    return model


# ------------------------------------------------------------------------ nothing is lost


@st.composite
def ragged_samples(draw: st.DrawFn) -> list[Sample]:
    """Samples of few different tokens, so that they often begin alike."""
    token = st.integers(0, 2)
    start = draw(st.lists(token, max_size=24))
    samples = []
    for record in range(1, draw(st.integers(1, 7)) + 1):
        tokens = start + draw(st.lists(token, min_size=1, max_size=40))
        untrained = draw(st.integers(1, len(tokens)))
        weight = st.sampled_from([0.0, 0.5, 1.0])
        weights = [0.0] * untrained + [draw(weight) for _ in tokens[untrained:]]
        samples.append(Sample(np.array(tokens, np.int32), np.array(weights, np.float32), record))
    return samples


@examples(150)
@given(ragged_samples(), st.sampled_from([pack, pad]))
def test_every_token_and_target_has_its_place(samples, lay_out):
    batch = lay_out(samples)
    assert sorted(batch.records) == [s.record for s in samples]
    by_record = {s.record: s for s in samples}
    placed = [by_record[record] for record in batch.records]
    width = batch.tokens.shape[1]
    for number, sample in enumerate(placed, start=1):
        own = np.flatnonzero(batch.segments.ravel() == number)
        assert len(own) > 0
        assert np.array_equal(own, np.arange(own[0], own[0] + len(own)))
        assert own[0] // width == own[-1] // width
        whole = np.concatenate([np.arange(batch.prefix), own])
        assert np.array_equal(batch.tokens.ravel()[whole], sample.tokens)
        assert np.array_equal(batch.positions.ravel()[whole], np.arange(len(sample.tokens)))
    laid_out = batch.prefix + sum(len(s.tokens) - batch.prefix for s in samples)
    assert (batch.segments != PADDING).sum() == laid_out
    assert (batch.segments == PREFIX).sum() == batch.prefix
    assert batch.token_count == sum(len(s.tokens) for s in samples)
    _check_targets(batch, placed)


def _check_targets(batch: Batch, placed: list[Sample]) -> None:
    """Targets stand in the order of the samples, each after the token that predicts it."""
    at = 0
    for number, sample in enumerate(placed, start=1):
        for place in range(1, len(sample.tokens)):
            if sample.weights[place] == 0:
                continue
            source = batch.sources[at]
            assert batch.targets[at] == sample.tokens[place]
            assert batch.weights[at] == sample.weights[place]
            assert batch.positions.ravel()[source] == place - 1
            assert batch.segments.ravel()[source] in (number, PREFIX)
            at += 1
    assert batch.supervised == at
    assert not batch.weights[at:].any()
    assert batch.weight == pytest.approx(sum(float(s.weights[1:].sum()) for s in placed))


@examples(100)
@given(ragged_samples())
def test_the_common_prefix_is_common_untrained_and_leaves_something_over(samples):
    prefix = common_prefix(samples)
    for sample in samples:
        assert np.array_equal(sample.tokens[:prefix], samples[0].tokens[:prefix])
        assert len(sample.tokens) > prefix
        assert not sample.weights[1:prefix].any()


# ------------------------------------------------------------------------ what is refused


def test_a_call_of_our_own_that_does_not_fit_is_taken_back(monkeypatch):
    model = tiny("gemma2")
    logits, before = model(TOKENS), type(model.layers[0].self_attn)
    monkeypatch.setattr(PackCache, "_with_prefix", lambda self, x: self.rows(x)[:, :, ::-1])
    with pytest.raises(ModelError):
        enable_packs(model)
    assert type(model.layers[0].self_attn) is before
    assert mx.array_equal(model(TOKENS), logits).item()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mamba", {"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}),
        ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 16}),
    ],
)
def test_an_architecture_that_packs_do_not_fit_is_refused_and_left_as_it_was(kind, changes):
    model = tiny(kind, time_step_rank=4, **changes)
    logits = model(TOKENS)
    classes = {path: type(m) for path, m in model.named_modules()}
    with pytest.raises(ModelError):
        enable_packs(model)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert mx.array_equal(model(TOKENS), logits).item()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_takes_packs_still_generates_as_before(kind):
    from mlx_lm.models.cache import make_prompt_cache

    model, plain = MODELS[kind](), MODELS[kind]()
    enable_packs(model)
    assert mx.array_equal(model(TOKENS), plain(TOKENS)).item()
    ours, theirs = make_prompt_cache(model), make_prompt_cache(plain)
    for part in (TOKENS, TOKENS[:, :1], TOKENS[:, 1:2]):
        assert mx.array_equal(model(part, cache=ours), plain(part, cache=theirs)).item()


def test_packs_change_no_class_of_mlx_lm():
    plain = tiny_llama()
    before = type(plain.layers[0].self_attn.rope)
    enable_packs(tiny_llama())
    assert type(tiny_llama().layers[0].self_attn.rope) is before
    assert type(plain.layers[0].self_attn.rope) is before
