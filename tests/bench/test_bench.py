"""`mlxtune bench`: what it keeps, what plans take from it, and how it looks."""

from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from mlxtune.bench import compare, cost, machine
from mlxtune.bench.chips import find_chip
from mlxtune.bench.compare import BEGIN, END, renewed
from mlxtune.bench.cost import Rates
from mlxtune.bench.depth import StepEstimator
from mlxtune.bench.facts import ModelFacts
from mlxtune.bench.lengths import Lengths, samples_of
from mlxtune.bench.machine import mac, published_rates, this_machine
from mlxtune.bench.plan import Planner
from mlxtune.bench.results import (
    read_figures,
    remember_figures,
    require_folder,
    write_figures,
)
from mlxtune.bench.step import StepModel
from mlxtune.bench.words import summary_lines
from mlxtune.bench.workloads import WORKLOADS
from mlxtune.cli import bench as verb
from mlxtune.data.batches import Part
from mlxtune.data.pack import pack
from mlxtune.errors import RunError, StorageError
from support import program
from support.files import ROOT
from support.plans import LLAMA, recipe_of

SMOLLM2 = "SmolLM2-135M, 8 pairs"
STEP = {
    "planned_seconds": 1.5,
    "planned_peak_bytes": 1_500_000_000,
    "seconds": 1.25,
    "peak_bytes": 1_400_000_000,
    "tokens_per_second": 1234.0,
    "examples_per_second": 12.3,
    "model_flops_utilisation": 0.5,
}


def figures_of(device="Apple M2 Pro", cores=19, left_out=()):
    rows = [
        {"workload": work.name, "planned_seconds": 1.0, "planned_peak_bytes": 1}
        | ({"left_out": "too slow"} if work.name in left_out else STEP)
        for work in WORKLOADS
    ]
    return {
        "device": device,
        "gpu_cores": cores,
        "rates": {
            "products": {"256": 2e12, "1024": 4e12},
            "packed_products": {"1": 1e11, "64": 2e12, "512": 3e12},
            "attention": 1e12,
            "bytes": 1.5e11,
            "powers": 1e10,
            "overhead": 3e-6,
            "efficiency": 0.5,
        },
        "workloads": rows,
    }


MEASURED = Rates(((256.0**3, 2e12), (1024.0**3, 4e12)), 2e12, 1.5e11, 1e10, 3e-6, 0.5)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXTUNE_CACHE", str(tmp_path / "cache"))


def results(folder):
    path = folder / "benchmarks/results"
    path.mkdir(parents=True)
    return path


def test_what_was_measured_on_a_chip_takes_the_place_of_what_is_published(tmp_path):
    write_figures(figures_of(), results(tmp_path))
    measured = mac("M2 Pro 19", 16)
    assert measured.rates == MEASURED and measured.measured
    other = mac("M2 Pro 16", 16)  # of another variant nothing was
    assert other.rates == published_rates(find_chip("M2 Pro 16")) and not other.measured


def test_a_plan_says_that_its_rates_were_measured(tmp_path):
    write_figures(figures_of("Apple M5 Pro", 16), results(tmp_path))
    facts = ModelFacts(LLAMA, None, None, "a test")
    lengths = Lengths((Part(samples_of([40] * 8)),), "tokenized", "8 records")
    recipe = recipe_of(train={"memory_limit": 100.0})
    unknown = Planner(recipe, mac("M5 Pro 20", 24), facts=facts, lengths=lengths)()
    assert unknown.seconds_per_step is None  # nothing is published of it
    machine = mac("M5 Pro 16", 24)
    plan = Planner(recipe, machine, facts=facts, lengths=lengths)()
    assert plan.seconds_per_step > 0 and plan.measured_rates
    assert "measured on this chip: bench-m5-pro-16-core-gpu.json" in summary_lines(plan)[1]
    assert plan.budget_bytes == machine.budget  # it is no more this machine than before
    chip = Planner(recipe, mac("M2 Pro 19", 16), facts=facts, lengths=lengths)()
    assert "published rates of the chip, float16's for bfloat16" in summary_lines(chip)[1]
    floats = recipe_of(model={"dtype": "float16"})
    halves = Planner(floats, mac("M2 Pro 19", 16), facts=facts, lengths=lengths)()
    assert "bfloat16" not in summary_lines(halves)[1]


def test_what_this_user_measured_is_found_from_anywhere(tmp_path, monkeypatch):
    remember_figures(figures_of())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert mac("M2 Pro 19", 16).rates == MEASURED


def test_a_damaged_file_of_the_chip_is_named_and_one_of_another_is_not_read(tmp_path):
    folder = results(tmp_path)
    (folder / "bench-m2-pro-19-core-gpu.json").write_text('{"device": "x"')
    with pytest.raises(RunError, match="not what `mlxtune bench` writes") as error:
        mac("M2 Pro 19", 16)
    assert "bench-m2-pro-19-core-gpu.json" in error.value.where
    assert mac("M2 Pro 16", 16).rates is not None
    broken = figures_of()
    del broken["rates"]["products"]
    write_figures(broken, folder)
    with pytest.raises(RunError, match="lacks the machine's rates"):
        mac("M2 Pro 19", 16)


def test_an_incomplete_row_is_told_with_its_file(tmp_path):
    incomplete = figures_of()
    del incomplete["workloads"][0]["tokens_per_second"]
    incomplete["workloads"][1]["seconds"] = "fast"
    path = write_figures(incomplete, tmp_path)
    with pytest.raises(RunError) as error:
        read_figures(tmp_path)
    assert error.value.where == str(path)
    assert f"tokens_per_second of '{SMOLLM2}'" in error.value.what
    assert "seconds of 'SmolLM2-135M, 1,024 tokens'" in error.value.what
    page = tmp_path / "README.md"
    page.write_text(BEGIN + END)
    path.rename(results(tmp_path) / path.name)
    (tmp_path / "benchmarks/README.md").write_text(BEGIN + END)
    done = program.mlxtune("bench", "--compare", cwd=tmp_path)
    assert done.returncode == 1 and path.name in done.stderr and "bug" not in done.stderr


@pytest.mark.slow
def test_of_a_measured_machine_what_it_left_out_is_still_estimated(monkeypatch):
    left = "SmolLM2-135M, 1,024 tokens"
    monkeypatch.setattr(compare, "_EXPECTED", (SMOLLM2, left))
    chips = [find_chip("M2 Pro 16"), find_chip("M2 Pro 19")]
    monkeypatch.setattr(compare, "CHIPS", chips)
    estimates = []
    for efficiency in (0.5, 0.25):
        figures = figures_of(left_out=(left,))
        figures["rates"]["efficiency"] = efficiency
        page = renewed(BEGIN + END, [figures], where="page.md").partition("Estimated")[2]
        other, own = [
            line.strip("| ").split(" | ") for line in page.splitlines() if "M2 Pro (" in line
        ]
        assert other[0] == str(chips[0]) and "measured" not in other
        assert own[:2] == [str(chips[1]), "measured"]
        estimates.append(float(own[2].replace(",", "")))
    # By what was measured on it.
    assert estimates[1] == pytest.approx(estimates[0] / 2, rel=0.02)
    whole = renewed(BEGIN + END, [figures_of()], where="page.md").partition("Estimated")[2]
    assert str(chips[1]) not in whole and str(chips[0]) in whole


def test_options_without_an_effect_are_refused(tmp_path):
    for options in (["--all"], ["--json"]):
        done = program.mlxtune("bench", "--compare", *options, cwd=tmp_path)
        assert done.returncode == 2 and options[0] in done.stderr
    recipe = ROOT / "recipes/quickstart.toml"
    done = program.mlxtune("plan", str(recipe), "--overwrite", cwd=tmp_path)
    assert done.returncode == 2 and "--overwrite goes with --fit" in done.stderr


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "/proc/none"):
        with pytest.raises(StorageError):
            require_folder((tmp_path / folder) / "results")
        done = program.mlxtune("bench", "--folder", folder, cwd=tmp_path)
        assert done.returncode == 1 and "could not write" in done.stderr
        assert "measuring" not in done.stderr and "bug" not in done.stderr


def test_figures_are_shown_even_where_they_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXTUNE_BLAS", "off")
    monkeypatch.setattr(machine, "this_machine", lambda **_: None)

    def measured(*_, **__):
        (tmp_path / "benchmarks/results").rmdir()  # it has gone meanwhile
        (tmp_path / "benchmarks/results").write_text("")
        return figures_of()

    monkeypatch.setattr("mlxtune.bench.measure.measure_machine", measured)
    done = CliRunner().invoke(verb.bench, [])
    assert isinstance(done.exception, StorageError) and "1234" in done.stdout
    assert "written" not in done.stdout


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_terminal_of_any_width_shows_every_figure_whole(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    verb.show(figures_of())
    shown = capsys.readouterr().out
    assert "…" not in shown and "1.40 GB" in shown
    flat = " ".join(shown.replace("│", " ").split())
    assert all(work.name in flat for work in WORKLOADS)
    assert ("┃ tokens/s ┃" in shown) == (columns == 120)
    head, _, _ = shown.partition("products")
    assert all(len(line) <= columns for line in head.splitlines())


def slow_rates():
    return Rates(((64.0**3, 3e9),), 3e9, 1e10, 1e9, 1e-6)


def test_no_product_is_measured_that_takes_long(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "_product_rate", lambda n, _: asked.append(n) or 3e9)
    assert [round(size ** (1 / 3)) for size, _ in cost._product_rates(None)] == asked
    assert max(2 * n**3 / 3e9 for n in asked) < 0.25 and asked[-1] == 512
    monkeypatch.setattr(cost, "_product_rate", lambda n, _: 3e11)
    assert len(list(cost._product_rates(None))) == len(cost._SIDES)


def test_a_slow_machine_is_measured_with_fewer_tokens(monkeypatch):
    asked = []

    def measure(_model, batch, *, steps):
        asked.append((batch.token_count, steps))
        return type("Measured", (), {"seconds": 1.0})

    monkeypatch.setattr(StepModel, "measure", measure)
    assert machine._efficiency(slow_rates()) > 0
    fast = Rates(((64.0**3, 3e11),), 3e11, 1e11, 1e10, 1e-6)
    machine._efficiency(fast)
    (few, twice), (many, times) = asked
    assert few < 0.1 * many and twice < times


def test_a_measurement_is_announced_and_one_of_a_busy_machine_holds_for_the_process(
    tmp_path, monkeypatch
):
    told, measured = [], []
    monkeypatch.setattr(machine, "measure_rates", lambda: measured.append(1) or slow_rates())
    monkeypatch.setattr(machine, "_efficiency", lambda _: 1.0)
    monkeypatch.setattr(machine, "busy", lambda: True)

    def again(**options):
        return this_machine(progress=told.append, **options).basis

    busy = "rates measured here, while it was busy: an idle one may be several times faster"
    assert again(remembered=True) == busy and len(measured) == 1
    assert "measuring this machine" in told[0]
    assert "busy with other programs" in told[1] and "may be several times too long" in told[1]
    assert again(remembered=True) == busy and len(measured) == 1 and len(told) == 2
    assert not list(tmp_path.glob("cache/rates.json"))
    monkeypatch.setattr(machine, "busy", lambda: False)
    assert again() == "rates measured here" and len(measured) == 2  # asked for anew
    # Those are kept, and come before what was measured on a busy machine.
    assert list(tmp_path.glob("cache/rates.json"))
    assert again(remembered=True) == "rates measured here" and len(measured) == 2


def test_a_busy_machine_is_not_measured_where_it_was_measured_before(monkeypatch):
    told, speeds = [], iter([4e9, 1e9])  # beside other programs everything takes longer

    def measured():
        rate = next(speeds)
        return Rates(((64.0**3, rate),), rate, 1e10, 1e9, 1e-6)

    monkeypatch.setattr(machine, "measure_rates", measured)
    monkeypatch.setattr(machine, "_efficiency", lambda _: 1.0)
    monkeypatch.setattr(machine, "busy", lambda: False)
    idle = this_machine(remembered=True)
    monkeypatch.setattr(machine, "busy", lambda: True)
    for remembered in (True, False):  # the second is `mlxtune plan --measure`
        found = this_machine(remembered=remembered, progress=told.append)
        assert found.rates == idle.rates and "busy with other programs now" in found.basis
    [said] = told
    assert "not measured again" in said and "measure when it is idle" in said
    monkeypatch.setattr(machine, "busy", lambda: False)
    slower = this_machine()
    assert slower.rates.packed == 1e9 and slower.basis == "rates measured here"


@pytest.mark.parametrize(("load", "is_busy"), [(0.5, False), (1.6, True), (9.0, True)])
def test_a_machine_is_busy_where_others_want_most_of_its_processors(load, is_busy, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert machine.busy() is is_busy


def test_an_unknown_chip_is_told_before_anything_is_loaded(tmp_path):
    # Not even the recipe is there.
    done = program.mlxtune("plan", "none.toml", "--chip", "M99", cwd=tmp_path)
    assert done.returncode == 1 and "no Apple silicon chip" in done.stderr
    done = program.mlxtune("plan", "none.toml", "--chip", "M2", "--memory", "12", cwd=tmp_path)
    assert done.returncode == 1 and "not sold with 12 GB" in done.stderr


def test_a_planned_step_takes_the_time_of_its_products():
    """On a machine where all else takes none; `benchmarks/plan.py` times real steps."""
    recipe = recipe_of(lora={"rank": 1})
    rates = Rates(((1.0, 1e9),), 1e9, math.inf, math.inf, 0.0)
    batch = pack(samples_of((64,)))
    step = StepEstimator(recipe, LLAMA, None, "float32", rates).step(batch)
    width, inner, blocks = (
        LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    # Two operations for each weight and token, and as many for the gradient of what goes into
    # the weight, which the first block's queries, keys and values do without.
    weights = blocks * (width * width * 3 + 3 * width * inner)
    head = width * LLAMA["vocab_size"]
    first = width * width * 2
    flops = 4 * 64 * weights - 2 * 64 * first + 4 * batch.supervised * head
    # Attention at most: two products of all pairs of tokens, and two for each one's gradients.
    attention = blocks * 3 * 2 * 2 * width * 64**2
    assert flops / 1e9 < step.seconds < 1.02 * (flops + attention) / 1e9
