"""Splitting: a partition that keeps what belongs together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.data.records import Conversation
from mlxtune.errors import DataError
from mlxtune.prep.split import balance, group_key, hold_out, require_tag, tie
from support.properties import examples

GROUPS = st.lists(st.one_of(st.none(), st.integers(0, 8)), min_size=2, max_size=60)


@examples(150)
@given(GROUPS, st.floats(0.01, 0.9), st.integers(0, 5), st.data())
def test_groups_and_clusters_never_straddle(groups, share, seed, data):
    size = len(groups)
    clusters = [data.draw(st.integers(0, i)) if i % 7 == 3 else i for i in range(size)]
    ties = tie(clusters, groups)
    try:
        held = hold_out(ties, share, seed)
    except DataError:
        return
    assert len(held) == size
    assert 0 < sum(held) <= max(1, round(share * size)) < size
    for row in range(size):
        assert held[row] == held[clusters[row]]
        for other in range(row):
            if groups[row] is not None and groups[row] == groups[other]:
                assert held[row] == held[other]


def test_size_is_a_share_or_a_number():
    alone = list(range(200))
    assert sum(hold_out(alone, 0.1, 0)) == 20
    assert sum(hold_out(alone, 7, 0)) == 7
    assert sum(hold_out(alone, 1, 0)) == 1
    assert sum(hold_out(alone, 0.001, 0)) == 1


def test_the_seed_decides():
    alone = list(range(200))
    assert hold_out(alone, 0.1, 3) == hold_out(alone, 0.1, 3)
    assert hold_out(alone, 0.1, 3) != hold_out(alone, 0.1, 4)


def test_rows_without_a_group_stand_alone():
    assert tie([0, 1, 2, 3], [None, "a", None, "a"]) == [0, 1, 2, 1]
    assert tie([0, 0, 2, 3], [None, "a", "a", None]) == [0, 0, 0, 3]


def test_what_cannot_be_split_is_told():
    with pytest.raises(DataError, match="none would be left"):
        hold_out([0, 1, 2], 3, 0)
    with pytest.raises(DataError, match="smallest group has 4"):
        hold_out([0] * 4 + [4] * 4, 2, 0)
    with pytest.raises(DataError, match="no record has the field 'page'"):
        require_tag([None, None], "page")
    require_tag([None, "x"], "page")


def test_groups_are_values_of_a_tag():
    row = Conversation(tags={"page": "a", "n": 3, "list": [1]})
    assert group_key(row, "page") == "a"
    assert group_key(row, "n") == 3
    assert group_key(row, "list") == "[1]"
    assert group_key(row, "other") is None


def test_balance_counts_each_side():
    assert balance([None, None], [False, True]) == {}
    assert balance(["a", "b", None, "a"], [False, False, True, True]) == {
        "train": {"a": 1, "b": 1},
        "heldout": {"(none)": 1, "a": 1},
    }
