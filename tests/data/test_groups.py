"""Groups: what they share is computed once, and each sample fares as if it stood alone."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data.batches import Part, Plan
from mlxtune.data.groups import grouped
from mlxtune.data.pack import NO_PARENT, filled_up, pack, pad
from mlxtune.data.passes import Layout, passes
from mlxtune.data.store import Groups
from mlxtune.models.enable import enable_packs, pack_kind
from mlxtune.models.packed import OwnAttention, PackedRope
from mlxtune.train.neftune import noise_sizes
from support.compare import (
    distance,
    loss_of_batch,
    loss_of_each_alone,
    random_groups,
    random_samples,
    value_and_gradients,
)
from support.models import GEMMA4, tiny, tiny_llama, with_adapters
from support.properties import examples

MODELS = {
    "llama": tiny_llama,
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
    "gemma2, capped": lambda: tiny("gemma2", attn_logit_softcapping=0.2, query_pre_attn_scalar=1.0),
    "gemma4, blocks that share keys": lambda: tiny("gemma4_text", **GEMMA4),
    "cohere2, a block without positions": lambda: tiny(
        "cohere2", sliding_window=6, sliding_window_pattern=2
    ),
}
GROUPS = {
    "pairs that begin alike": random_groups((40, 33, 52), prefix=18),
    "pairs of their own": random_groups((30, 21, 44)),
    "many answers": random_groups((31, 24), (9, 4, 17, 6, 12), prefix=12),
    "one group": random_groups((37,), (8, 15, 5)),
    "prompts too short to share": random_groups((5, 6, 4)),
}
CASES = [
    pytest.param(kind, case, marks=[pytest.mark.slow] * slow, id=f"{case}-{kind}")
    for kind in MODELS
    for case in GROUPS
    for slow in [
        kind != "llama"
        and case != "pairs that begin alike"
        and (kind, case) != ("llama, sliding window", "pairs of their own")
    ]
]


@pytest.mark.parametrize("own", [True, False], ids=["own attention", "mlx-lm's"])
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_loss_and_gradients_are_those_of_each_sample_alone(kind, case, own):
    model, samples = MODELS[kind](), GROUPS[case]
    enable_packs(model)
    for rope in model.modules():
        if isinstance(rope, PackedRope):
            rope.own = rope.own and own
    assert (pack_kind(model) is OwnAttention) == own
    with_adapters(model)
    want, wanted = value_and_gradients(model, lambda: loss_of_each_alone(model, samples))
    for batch in (pack(samples), pad(samples)):
        got, gradients = value_and_gradients(model, lambda b=batch: loss_of_batch(model, b))
        assert got == pytest.approx(want, rel=1e-4)
        for name, gradient in gradients.items():
            assert distance(gradient, wanted[name]) < 1e-4, name


def test_a_prompt_stands_once_before_its_answers():
    samples = random_groups((40, 33), (7, 12), prefix=18)
    batch = pack(samples)
    own = sum(len(sample.tokens) for sample in samples)
    shared = 18 + (40 - 18) + (33 - 18)
    answers = sum(len(s.tokens) for s in samples) - 2 * (40 + 33)
    assert int((batch.segments >= 0).sum()) == shared + answers < own
    assert batch.token_count == own
    # Four answers see the two prompts before them.
    assert len(np.unique(batch.parents[batch.parents != NO_PARENT])) == 2
    assert int((batch.parents != NO_PARENT).sum()) == answers


def test_samples_by_themselves_have_no_tree():
    for samples in (
        random_samples((40, 12, 31)),
        random_samples((40, 33), prefix=18, untrained=19),
    ):
        batch = pack(samples)
        assert batch.parents is None
        assert (batch.groups, batch.sides) == (len(samples), 1)


@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    answers=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    prefix=st.integers(0, 30),
    few_shapes=st.booleans(),
    batch_size=st.integers(1, 4),
)
@examples(15)
def test_no_group_is_divided_and_targets_know_whose_they_are(
    prompts, answers, prefix, few_shapes, batch_size
):
    prompts = [prompt + prefix for prompt in prompts]
    samples = random_groups(prompts, answers, prefix=prefix)
    made = passes(samples, batch_size, Layout(few_shapes=few_shapes))
    seen = []
    for batch in made:
        assert batch.groups <= batch_size and batch.sides == len(answers)
        records = np.array(batch.records)
        counts = np.unique(records, return_counts=True)
        assert set(counts[1]) == {len(answers)}
        # Targets of a slot are those of one sample, in its order.
        by_slot = {}
        for record, place in zip(batch.records, batch.places(), strict=True):
            [slot] = set(batch.owners[place].tolist())
            by_slot[slot] = record, batch.targets[place], batch.references[place]
        for record in set(batch.records):
            slots = sorted(slot for slot, (r, *_) in by_slot.items() if r == record)
            group = [sample for sample in samples if sample.record == record]
            assert [slot % batch.sides for slot in slots] == [s.side for s in group]
            assert len({slot // batch.sides for slot in slots}) == 1
            for slot, sample in zip(slots, group, strict=True):
                trained = np.flatnonzero(sample.weights)
                assert np.array_equal(by_slot[slot][1], sample.tokens[trained])
                assert np.array_equal(by_slot[slot][2], sample.references[trained])
            seen.append(record)
    assert sorted(seen) == list(range(1, len(prompts) + 1))


def test_a_batch_that_is_filled_up_says_the_same():
    model = tiny_llama()
    enable_packs(model)
    batch = pack(random_groups((40, 33, 52), prefix=18))
    rows, width = batch.tokens.shape
    more = filled_up(batch, rows + 1, width + 8, len(batch.targets) + 32, batch.groups + 2)
    assert more.groups == batch.groups + 2 and more.filled_groups == batch.groups
    assert loss_of_batch(model, more).item() == pytest.approx(
        loss_of_batch(model, batch).item(), rel=1e-5
    )


def test_noise_is_of_each_samples_own_length_and_of_the_mean_where_it_is_shared():
    samples = random_groups((40, 33), (7, 12), prefix=18)
    batch = pack(samples)
    sizes = noise_sizes(batch)
    own = [1 / np.sqrt(len(sample.tokens)) for sample in samples]
    found = sorted(set(np.round(sizes[batch.segments > 0], 6).tolist()))
    groups = [np.mean(own[:2]), np.mean(own[2:])]
    assert found == pytest.approx(sorted({*own, *groups}), abs=1e-5)
    assert sizes[batch.segments == 0] == pytest.approx(np.mean(own), rel=1e-5)


def test_an_order_has_groups_and_each_worker_whole_ones():
    samples = random_groups(range(20, 31))
    part = Part(samples)
    assert len(part.groups) == part.per_epoch == 11
    assert [len(group) for group in grouped(samples)] == [2] * 11
    assert Groups(samples).lengths().tolist() == [
        len(a.tokens) + len(b.tokens) for a, b in zip(samples[::2], samples[1::2], strict=True)
    ]
    seen = []
    for rank in range(2):
        plan = Plan([part], 2, 1, 0, Layout(), rank, 2)
        assert plan.groups_per_step == 4 and plan.steps_per_epoch == 3
        seen += [r for step in plan.steps(0, 3) for batch in step for r in batch.records]
    assert sorted(seen) == sorted([*range(1, 12)] * 2)


def test_what_a_group_shares_is_never_trained():
    samples = random_groups((40, 40))
    # The prompt of the first pair is trained from its tenth token on.
    samples[0] = replace(samples[0], weights=np.where(np.arange(len(samples[0].tokens)) > 9, 1, 0))
    batch = pack(samples)
    shared = batch.segments[np.isin(batch.segments, np.unique(batch.parents))]
    assert len(shared) == 10 + 40
    assert mx.array(batch.targets).size >= batch.supervised
