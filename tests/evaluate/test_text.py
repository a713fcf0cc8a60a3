"""Text metrics against hand-made cases and others' code; intervals against scipy's."""

from __future__ import annotations

import difflib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.evaluate.bootstrap import mean_interval, paired_difference, ratio_interval
from mlxtune.evaluate.text import (
    bits_per_byte,
    edit_similarity,
    exact_match,
    normalise_code,
    normalise_squad,
    perplexity,
    token_f1,
)
from support.properties import examples


def test_exact_match_looks_past_white_space_around_only():
    assert exact_match(" ls -la\n", "ls -la") == 1
    assert exact_match("ls  -la", "ls -la") == 0
    assert exact_match("LS -la", "ls -la") == 0


def test_code_is_normalised_by_white_space_alone():
    assert normalise_code("  ls \t -la\n\n| wc ") == "ls -la | wc"
    assert normalise_code("Echo 'The A'") == "Echo 'The A'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an  apple, a pear; the end.", "apple pear end"),
        ("anthem theatre", "anthem theatre"),  # articles are words, not beginnings
        ("U.S.A.", "usa"),
        ("", ""),
        ("Ärger — «ja»", "ärger — «ja»"),  # only ASCII punctuation goes, as in SQuAD
    ],
)
def test_prose_is_normalised_as_squad_does(text, expected):
    assert normalise_squad(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("cat sat", "cat sat", 1),
        ("cat", "dog", 0),
        ("cat sat on mat", "cat mat", 2 / 3),  # precision 1/2, recall 1
        ("a a a", "a", 1 / 2),  # counted once: precision 1/3, recall 1
        ("", "", 1),
        ("", "cat", 0),
    ],
)
def test_token_f1_by_hand(answer, expected, f1):
    assert token_f1(answer, expected) == pytest.approx(f1)


def test_f1_is_that_of_lm_eval():
    theirs = pytest.importorskip("lm_eval.tasks.qasper.metrics")
    for answer, expected in [
        ("The cat sat.", "a cat sat down"),
        ("in the year 1999", "1999"),
        ("No, the blue one!", "blue"),
        ("one two two", "two two two"),
    ]:
        assert normalise_squad(answer) == theirs.normalize_answer(answer)
        ours = token_f1(normalise_squad(answer), normalise_squad(expected))
        assert ours == pytest.approx(theirs.f1_abstractive([answer], [expected]))


def plain_levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@given(st.text(max_size=12), st.text(max_size=12))
@examples(80)
def test_edit_similarity_is_that_of_the_textbook(a, b):
    a, b = a.strip(), b.strip()
    longest = max(len(a), len(b))
    expected = 1 - plain_levenshtein(a, b) / longest if longest else 1
    assert edit_similarity(a, b) == pytest.approx(expected)


def test_edit_similarity_by_hand():
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity(" ls ", "ls") == 1
    assert difflib.SequenceMatcher(None, "abc", "xyz").ratio() == edit_similarity("abc", "xyz") == 0


def test_perplexity_and_bits_per_byte():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf
    # A uniform choice among 256 for each byte costs eight bits a byte, however tokens lie.
    assert bits_per_byte(math.log(256), 10, 10) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(256), 5, 10) == pytest.approx(8)
    assert bits_per_byte(1.0, 3, 0) is None


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for values in (
        np.random.default_rng(1).random(40),
        (np.random.default_rng(2).random(84) < 0.6).astype(float),
    ):
        ours = mean_interval(values.tolist(), resamples=20_000)
        theirs = stats.bootstrap(
            (values,), np.mean, method="percentile", n_resamples=20_000, rng=3
        ).confidence_interval
        assert ours is not None and ours.mean == pytest.approx(values.mean())
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_the_interval_of_a_ratio_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    weights = random.integers(2, 40, 60).astype(float)
    totals = weights * random.gamma(2, 1, 60)
    ours = ratio_interval(totals.tolist(), weights.tolist(), resamples=20_000)
    theirs = stats.bootstrap(
        (totals, weights), lambda t, w, axis: t.sum(axis) / w.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=3,
    ).confidence_interval  # fmt: skip
    assert ours.mean == pytest.approx(totals.sum() / weights.sum()) and ours.count == 60
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ratio_interval([], []) is None


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(size=4000)
    interval = mean_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.004)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.004)


def test_a_paired_difference_leaves_out_what_was_not_measured():
    before = [0, 0, 1, None, 0]
    after = [1, 1, 1, 1, None]
    difference = paired_difference(before, after)
    assert difference.count == 3 and difference.mean == pytest.approx(2 / 3)
    assert paired_difference([None], [1]) is None and mean_interval([]) is None
    # Records that are hard for both cancel: every difference is the same here.
    hard = list(np.linspace(0, 0.5, 30))
    same = paired_difference(hard, [v + 0.1 for v in hard])
    assert same.low == pytest.approx(0.1) and same.high == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4)
    assert mean_interval([1.0] * 3) == mean_interval([1.0] * 3, seed=9)
