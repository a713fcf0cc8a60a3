"""The table of chips: names that people type, and figures that agree with each other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlxtune.bench.chips import (
    BFLOAT16,
    CHIPS,
    MEASURED,
    Chip,
    chip_names,
    find_chip,
    working_set_bytes,
)
from mlxtune.errors import ChipError

GIB = 2**30
FIGURES = (
    "gpu_cores", "memory_gb", "bandwidth", "float32_rate", "float16_rate", "bfloat16_rate",
)  # fmt: skip
ALL = pytest.mark.parametrize("chip", CHIPS, ids=str)


def largest(name: str) -> Chip:
    return max((chip for chip in CHIPS if chip.name == name), key=lambda chip: chip.gpu_cores)


@pytest.mark.parametrize(
    "text",
    [
        "M2 Pro 19",
        "m2 pro 19",
        "Apple M2 Pro (19-core)",
        "M2 Pro (19-core GPU)",
        " M2Pro, 19 cores",
    ],
)
def test_a_variant_is_found_by_its_cores(text):
    chip = find_chip(text)
    assert (chip.name, chip.gpu_cores) == ("M2 Pro", 19)


@pytest.mark.parametrize("text", ["M2 Pro", "m2 pro", "Apple M2 Pro", "apple m2 pro"])
def test_without_cores_it_is_the_smaller_variant(text):
    assert find_chip(text).gpu_cores == 16


@ALL
def test_every_chip_is_found_by_its_own_name(chip):
    assert find_chip(str(chip)) is chip
    assert find_chip(chip.name).gpu_cores <= chip.gpu_cores


@pytest.mark.parametrize(
    ("text", "near"), [("M4 Ultra", "M4"), ("M2 Por", "M2 Pro"), ("M3Maxx", "M3 Max")]
)
def test_an_unknown_chip_is_answered_with_a_near_one_and_all_names(text, near):
    with pytest.raises(ChipError) as caught:
        find_chip(text)
    said = str(caught.value)
    assert text in said
    assert f"did you mean {near}" in said
    assert all(name in said for name in chip_names())


@pytest.mark.parametrize("text", ["", "RTX 4090", "M", "M2 Pro 19 20"])
def test_what_is_no_chip_is_an_error(text):
    with pytest.raises(ChipError):
        find_chip(text)


def test_a_variant_that_was_never_made_is_answered_with_those_that_were():
    with pytest.raises(ChipError, match="16 or 19 cores, not 17"):
        find_chip("M2 Pro 17")


@ALL
def test_every_figure_has_a_source_and_every_source_a_figure(chip):
    stated = {name for name in (*FIGURES, "measured_prefill") if getattr(chip, name) is not None}
    assert {name for name, _ in chip.sources} == stated
    for name, source in chip.sources:
        assert source.url.startswith("http"), name
        assert source.retrieved or source.note.startswith("as quoted by")
    assert chip.source("bandwidth") is not None
    assert chip.source("nothing") is None


@ALL
def test_of_bfloat16_nothing_is_known_but_that_it_is_no_faster(chip):
    assert chip.bfloat16_rate is None and chip.source("bfloat16_rate") is None
    assert all(source.url.startswith("http") and source.note for source in BFLOAT16)


@ALL
def test_memory_is_sold_in_growing_sizes(chip):
    assert list(chip.memory_gb) == sorted(set(chip.memory_gb))
    assert all(8 <= size <= 512 for size in chip.memory_gb)


def test_no_variant_is_listed_twice_and_the_smaller_comes_first():
    keys = [(chip.name, chip.gpu_cores) for chip in CHIPS]
    assert len(keys) == len(set(keys))
    for name in chip_names():
        cores = [chip.gpu_cores for chip in CHIPS if chip.name == name]
        assert cores == sorted(cores)


@pytest.mark.parametrize("name", ["M1", "M2", "M3", "M5"])
def test_an_ultra_is_two_max(name):
    ultra, one = largest(f"{name} Ultra"), largest(f"{name} Max")
    assert ultra.gpu_cores == 2 * one.gpu_cores
    # Apple rounds 819.2 to 800 and to 819, and 1228 to 1.2 TB/s.
    assert ultra.bandwidth == pytest.approx(2 * one.bandwidth, rel=0.03)
    if one.float32_rate is not None:
        assert ultra.float32_rate == pytest.approx(2 * one.float32_rate)


@pytest.mark.parametrize("generation", ["M1", "M2", "M3", "M4", "M5"])
def test_bigger_chips_of_a_generation_are_faster(generation):
    chips = [chip for chip in CHIPS if chip.name.split()[0] == generation]
    assert [chip.gpu_cores for chip in chips] == sorted(chip.gpu_cores for chip in chips)
    for attribute in ("bandwidth", "float32_rate", "measured_prefill"):
        values = [v for chip in chips if (v := getattr(chip, attribute)) is not None]
        assert values == sorted(values), attribute


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("M1", 2.6), ("M1 Pro", 5.2), ("M1 Max", 10.4), ("M1 Ultra", 21), ("M2", 3.6),
     ("M2 Ultra", 27.2)],
)  # fmt: skip
def test_rates_are_those_that_apple_states(name, teraflops):
    assert largest(name).float32_rate == pytest.approx(teraflops * 1e12, rel=0.025)


@ALL
def test_prefill_stays_below_what_the_alus_can_do(chip):
    if chip.prefill_rate is None:
        assert chip.measured_prefill is None
        return
    # Per core and second, from the slowest generation to the fastest before the M5.
    assert 0.2e12 < chip.prefill_rate / chip.gpu_cores < 0.35e12
    if chip.float16_rate is not None:
        assert 0.6 < chip.prefill_rate / chip.float16_rate < 0.9


def test_what_was_measured_is_of_chips_in_the_table():
    for entry in MEASURED:
        assert entry.chip in set(chip_names())
        assert entry.gpu_cores is None or find_chip(f"{entry.chip} {entry.gpu_cores}")
        assert entry.quantity in ("lora", "prefill", "matmul")
        assert entry.value > 0
        assert entry.conditions
        assert entry.source.url.startswith("http")


@pytest.mark.parametrize(
    ("memory", "reported"),
    [(8, 5461.34), (16, 10922.67), (32, 21845.34), (64, 49152), (96, 73728), (128, 98304)],
)
def test_the_working_set_is_what_was_reported(memory, reported):
    assert working_set_bytes(memory) / 2**20 == pytest.approx(reported, abs=1)


@pytest.mark.parametrize(("memory", "reported"), [(16, 11.84), (24, 17.76), (128, 107.52)])
def test_the_working_set_is_no_more_than_newer_systems_allow(memory, reported):
    assert working_set_bytes(memory) < reported * GIB


def test_the_table_needs_neither_mlx_nor_numpy():
    code = (
        "import sys, mlxtune.bench.chips\n"
        "assert not {'mlx', 'mlx.core', 'numpy', 'rapidfuzz'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
