"""How much of the machine the program takes."""

from __future__ import annotations

import pytest

from mlxtune.processes import cores, threads


@pytest.mark.parametrize(("given", "want"), [("1", 1), ("7", 7)])
def test_other_libraries_compute_with_as_many_threads_as_asked_for(monkeypatch, given, want):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads() == want


@pytest.mark.parametrize("given", ["", "0", "many"])
def test_without_a_number_they_take_all_cores(monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads() == cores() >= 1
