"""Duplicates: against brute force on real rows, and what is kept."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data.records import Conversation, Segment, ToolCall, Turn
from mlxtune.data.sources import read_conversations
from mlxtune.prep.dedup import Duplicate, Near, clusters, find_duplicates, jaccard, shingles
from mlxtune.prep.texts import compared
from support.properties import examples


def kept_of(texts, near, worth=None, **more) -> list[int]:
    gone = {d.row for d in find_duplicates(texts, worth or [0] * len(texts), near, **more)}
    return [i for i in range(len(texts)) if i not in gone]


def brute_pairs(texts, near) -> set[tuple[int, int]]:
    """All near pairs, by comparing all, with sets made here."""
    size = near.shingle
    sets = [{t[i : i + size] for i in range(len(t) - size + 1)} or {t} for t in texts]
    return {
        (a, b)
        for a, b in combinations(range(len(texts)), 2)
        if len(sets[a] & sets[b]) >= near.threshold * len(sets[a] | sets[b])
    }


@pytest.fixture(scope="module")
def real_texts(nl2bash) -> list[str]:
    """500 real rows, half of them next to each other in the alphabet, so that some are near."""
    texts = sorted({compared(row) for row in read_conversations(nl2bash)})
    start = next(i for i, t in enumerate(texts) if t.startswith("find all"))
    chosen = texts[start : start + 250] + random.Random(0).sample(texts, 250)
    return list(dict.fromkeys(chosen))


@pytest.mark.parametrize(
    "threshold", [0.75, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.6, 0.85))]
)
def test_near_duplicates_are_found_as_by_brute_force(real_texts, threshold):
    near = Near(threshold)
    pairs = brute_pairs(real_texts, near)
    assert len(pairs) >= 10
    found = clusters(real_texts, near)
    joined = {(a, b) for a, b in pairs if found[a] == found[b]}
    assert len(joined) >= 0.98 * len(pairs)
    # Greedy, in order, by brute force.
    stay: list[int] = []
    for row in range(len(real_texts)):
        if not any((other, row) in pairs for other in stay):
            stay.append(row)
    assert len(set(stay) ^ set(kept_of(real_texts, near))) <= 0.02 * len(real_texts)


def test_every_removed_row_is_near_a_kept_one(real_texts):
    near = Near(0.7)
    gone = find_duplicates(real_texts, [0] * len(real_texts), near)
    rows = {d.row for d in gone}
    assert gone
    for d in gone:
        assert d.kept not in rows
        a, b = (shingles(real_texts[i], near.shingle) for i in (d.row, d.kept))
        assert d.similarity == jaccard(a, b) >= near.threshold


def test_a_second_time_removes_nothing(real_texts):
    near = Near(0.7)
    once = [real_texts[i] for i in kept_of(real_texts, near)]
    assert len(once) < len(real_texts)
    assert kept_of(once, near) == list(range(len(once)))


WORDS = st.lists(st.sampled_from(["find", "files", "older", "than", "days", "ten"]), max_size=9)


@examples(60)
@given(
    st.lists(WORDS.map(" ".join), max_size=12),
    st.sampled_from([None, Near(0.5), Near(0.9, permutations=32, shingle=3)]),
    st.randoms(use_true_random=False),
)
def test_removing_duplicates_is_idempotent(texts, near, dice):
    worth = [dice.randrange(3) for _ in texts]
    stay = kept_of(texts, near, worth)
    assert {texts[i] for i in stay} <= set(texts)
    assert bool(stay) == bool(texts)
    again = kept_of([texts[i] for i in stay], near, [worth[i] for i in stay])
    assert again == list(range(len(stay)))


def test_the_threshold_decides():
    one, other = "find all files older than ten days", "find all files older than six days"
    similarity = jaccard(shingles(one, 5), shingles(other, 5))
    assert 0.5 < similarity < 0.75
    assert kept_of([one, other], Near(0.5)) == [0]
    assert kept_of([one, other], Near(0.75)) == [0, 1]
    assert kept_of([one, other], None) == [0, 1]


def test_the_shingle_decides():
    one, other = "find all files older than ten days", "find all files older than six days"
    assert kept_of([one, other], Near(0.6, shingle=3)) == [0]
    assert kept_of([one, other], Near(0.6, shingle=12)) == [0, 1]


def test_more_permutations_make_bands_longer():
    few, many = Near(0.85, permutations=32), Near(0.85, permutations=512)
    assert few.band < many.band
    for near in (few, many, Near(0.3), Near(1.0), Near(0.05, permutations=16)):
        assert 1 <= near.band * near.bands <= near.permutations
    for near in (few, many):
        # The odds of the textbook for a pair just at the threshold.
        assert (1 - 0.85**near.band) ** near.bands <= 0.01


def test_the_best_row_of_a_cluster_is_kept():
    texts = ["the same", "the same", "another", "the same"]
    assert kept_of(texts, None, [1, 3, 1, 3]) == [1, 2]  # longest, then first
    assert kept_of(texts, Near(), [1, 3, 1, 3]) == [1, 2]
    assert find_duplicates(texts, [1, 3, 1, 3], None)[0] == Duplicate(0, 1, 1.0, same=True)


def test_protected_rows_stay_and_win():
    heldout = "find all files that are older than ten days in this folder"
    near_it = heldout.replace("ten", "six")
    texts = [heldout, heldout, near_it, heldout, "something else", "something else"]
    worth = [0, 0, 9, 9, 1, 1]
    assert kept_of(texts, Near(0.7), worth, protected=2) == [0, 1, 4]
    assert kept_of(texts, None, worth, protected=2) == [0, 1, 2, 4]
    # Without comparing among themselves, only those like the protected go.
    assert kept_of(texts, Near(0.7), worth, protected=2, among=False) == [0, 1, 4, 5]


def test_chains_are_not_swallowed():
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    chain = [text[i : i + 24] for i in range(0, 12, 2)]
    near = Near(0.75)
    assert kept_of(chain, near) != [0]  # the ends have little in common
    assert len(set(clusters(chain, near))) == 1  # but they may not be split


def test_what_is_compared():
    def row(prompt, answer, **more):
        return compared(Conversation((Turn("user", prompt), Turn("assistant", answer)), **more))

    assert row("List  Files\n", "ls") == row("list files", " ls ")
    assert row("x", "tar -c") != row("x", "tar -C")
    assert row("ﬁles", "ls") == row("files", "ls")
    assert row("a", "b") != row("a", "b", rejected=(Turn("assistant", "c"),))
    assert row("a", "b", tags={"id": 1}) == row("a", "b", tags={"id": 2})
    system = Turn("system", "You are a shell. " * 50)
    assert compared(Conversation((system, Turn("user", "a")))) == "a"
    calls = [(Turn("assistant", "", tool_calls=(ToolCall("f", {"x": x}),)),) for x in (1, 2)]
    assert compared(Conversation(calls[0])) != compared(Conversation(calls[1]))
    assert compared(Conversation(segments=(Segment("A  b", True),))) == "A b"
