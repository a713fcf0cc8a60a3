"""What would make a recipe fit: alone, together, and no more of it than needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxtune.bench.advice import Trial, advice_for, fitting_changes, with_changes
from mlxtune.bench.machine import mac
from mlxtune.bench.plan import Planner, RunPlan
from mlxtune.bench.words import advice_lines, parts_line, size, summary_lines
from mlxtune.recipe.load import load_recipe, parse_recipe
from support.files import ROOT

MB = 10**6
# Changed together or not at all.
PAIRS = ({"train.batch_size", "train.gradient_accumulation_steps"}, {"lora.rank", "lora.alpha"})


def recipe_of(**sections):
    given = {"name": "p", "model": {"path": "none"}, "data": [{"path": "none"}]}
    return parse_recipe(given | sections, where="test")


RECIPE = recipe_of(
    train={"batch_size": 8, "max_seq_length": 2048}, lora={"rank": 32, "alpha": 64.0}
)
BITS = {None: 16, 8: 8, 6: 6, 5: 5, 4: 4}


def peak_of(recipe):
    """A model of 1,600 MB, in bytes: simpler than a planned one, and as monotonous."""
    train = recipe.train
    weights = 100 * BITS[recipe.model.quantize]
    activations = 40 * train.batch_size / (4 if train.gradient_checkpointing is True else 1)
    states = recipe.lora.rank * (2 if train.optimizer == "adamw" else 1)
    return round(MB * (weights + activations + states))


class Small:
    """A machine with so many MB, and what was tried on it."""

    def __init__(self, budget, recipe=RECIPE):
        self.budget, self.recipe, self.asked = budget * MB, recipe, []

    def tried(self, changes):
        self.asked.append(changes)
        peak = peak_of(with_changes(self.recipe, changes))
        return Trial(peak, peak <= self.budget)

    def advice(self):
        return advice_for(self.recipe, self.tried({}), self.tried)

    def fitted(self):
        return fitting_changes(self.recipe, self.tried({}), self.tried)[0]


def groups(changes):
    """Keys that go together."""
    found = [pair for pair in PAIRS if pair & changes.keys()]
    return [*found, *({key} for key in changes if not any(key in pair for pair in PAIRS))]


def test_what_fits_with_one_change_gets_no_other():
    # All else together would not do.
    small = Small(784)
    assert [a.changes for a in small.advice() if a.fits] == [{"model.quantize": 4}]
    assert small.fitted() == {"model.quantize": 4}


@pytest.mark.parametrize("budget", range(420, 1980, 60))
def test_a_fitted_recipe_could_do_without_none_of_its_changes(budget):
    small = Small(budget)
    changes = small.fitted()
    assert changes and small.tried(changes).fits
    for group in groups(changes):
        fewer = {key: value for key, value in changes.items() if key not in group}
        assert not small.tried(fewer).fits, group
    # Batches and ranks are no smaller than they have to be.
    for key, most in (("train.batch_size", 8), ("lora.rank", 32)):
        if changes.get(key, most) < most:
            assert not small.tried(changes | {key: 2 * changes[key]}).fits
    assert len(small.asked) < 40  # each takes a second or two


def test_records_that_would_be_refused_stay():
    cut = recipe_of(data=[{"path": "none", "truncate": "right"}])
    whole = recipe_of(data=[{"path": "none"}])
    for recipe, found in ((cut, True), (whole, False)):

        def tried(changes, recipe=recipe):
            changed = with_changes(recipe, changes)
            peak = peak_of(changed) - MB * (2048 - changed.train.max_seq_length)
            return Trial(peak, peak <= 100 * MB)

        changes, least = fitting_changes(recipe, tried({}), tried)
        assert (changes is not None) is found and (found or least > 100 * MB)


def test_a_base_of_eight_bits_is_told_of_fewer():
    eight = with_changes(RECIPE, {"model.quantize": 8})
    for budget, bits in ((1000, 6), (900, 5), (800, 4), (10, 4)):
        [advice] = [a for a in Small(budget, eight).advice() if "model.quantize" in a.changes]
        assert advice.changes == {"model.quantize": bits} and advice.fits == (budget > 100)


def test_advice_goes_as_far_down_as_it_takes():
    for budget, batch in ((1870, 4), (1760, 2), (1710, 1), (100, 1)):
        [advice] = [a for a in Small(budget).advice() if "train.batch_size" in a.changes]
        times = RECIPE.train.gradient_accumulation_steps * 8 // batch
        found = {"train.batch_size": batch, "train.gradient_accumulation_steps": times}
        assert advice.changes == found and advice.fits == (budget > 100)
    [advice] = [a for a in Small(1955).advice() if "lora.rank" in a.changes]
    assert advice.changes == {"lora.rank": 16, "lora.alpha": 32.0}


def test_what_saves_next_to_nothing_is_not_told():
    small = Small(100)
    advice = small.advice()
    # Records are none shorter for a limit here.
    assert not any("train.max_seq_length" in each.changes for each in advice)
    assert min(each.saves_bytes for each in advice) >= peak_of(RECIPE) / 100


PLAN = RunPlan(
    "M1", False, "rates", "a model", "2 records", "bfloat16", 1000, True, 4, 0,
    8_040_000, 6_000_000, 10_000, 10_000, 20_000, 1_000_000, 1_000_000,
    4_000_000, False, 0.5, 10, 1e9,
)  # fmt: skip


def test_where_no_change_is_enough_those_that_are_together_are_told():
    small = Small(600)
    assert not any(each.fits for each in small.advice())
    together = small.fitted()
    assert len(groups(together)) > 1 and together["model.quantize"] == 4
    told = replace(PLAN, advice=small.advice(), together=together)
    last = advice_lines(told)[-1]
    assert last.startswith("together: ") and "mlxtune plan RECIPE --fit FILE" in last
    assert "model.quantize = 4" in last
    one = replace(PLAN, advice=Small(784).advice())
    assert "--fit" in advice_lines(one)[-1] and "together" not in advice_lines(one)[-1]
    assert Small(10).fitted() is None
    none = replace(PLAN, advice=Small(10).advice())
    assert advice_lines(none)[-1].startswith("nothing in the recipe would make it fit")


def test_sizes_are_told_in_the_unit_that_shows_them():
    assert size(6_920_000_000) == "6.92 GB"
    assert size(812_000_000) == "812 MB" and size(8_040_000) == "8.0 MB"
    assert "8.0 MB at most of 4.0 MB" in summary_lines(PLAN)[0]
    assert parts_line(PLAN).split()[:2] == ["weights", "6.0"]
    assert parts_line(PLAN).endswith("  MB")
    large = replace(PLAN, peak_memory_bytes=2 * 10**9, weights_bytes=2 * 10**9)
    assert parts_line(large).split()[:2] == ["weights", "2.00"]


@pytest.mark.slow
def test_three_billion_weights_in_eight_gigabytes_want_four_bits_and_nothing_else(monkeypatch):
    monkeypatch.chdir(ROOT)
    planner = Planner(load_recipe(ROOT / "recipes/llama-3.2-3b.toml"), mac("M1", 8))
    _, plan, changes = planner.fitted()
    assert plan.fits and changes == {"model.quantize": 4}
