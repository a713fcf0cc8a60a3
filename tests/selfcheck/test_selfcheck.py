"""`mlxtune doctor --check`: that it passes here, and that each kind of fault is caught."""

from __future__ import annotations

import getpass
import json
import math
import socket
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlxtune.cli import check as verb
from mlxtune.cli.app import cli
from mlxtune.device import as_on_gpu
from mlxtune.doctor import Finding
from mlxtune.errors import OutputExists
from mlxtune.layers.packing import Packing
from mlxtune.selfcheck import generation, kernels, machine, training
from mlxtune.selfcheck.check import Check, Difference, Found, LeftOutError, Outcome, run_check
from mlxtune.selfcheck.record import line_of, record, verdict, with_memory, write_record
from mlxtune.selfcheck.registry import CHECKS, check_named
from mlxtune.selfcheck.run import Limits, run_checks
from support.program import mlxtune_afresh


def outcome_of(name: str) -> Outcome:
    return run_check(check_named(name))


def beyond(outcome: Outcome) -> list[str]:
    return [each.what for each in outcome.differences if each.exceeds]


# ------------------------------------------------------------------- what this machine does


here = cache(outcome_of)  # with nothing wrong
# What others show too, at a smaller size or in another type.
SLOW = {
    "a run, stopped and resumed",
    "QLoRA, nf4",
    "a step of SmolLM2-135M",
    "the same with 4-bit weights",
    "K-quants",
    "LoRA, bfloat16",
    "QLoRA, 4 bits, packed products",
    "QLoRA, 4 bits, expanded",
    "QLoRA, mxfp4",
    "LoRA, float32",
    "DoRA",
    "8-bit AdamW",
    "gradient checkpointing",
    "padded batches",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(check.name, marks=[pytest.mark.slow] * (check.name in SLOW))
        for check in CHECKS
        if check.name not in ("doctor", "rates")
    ],
)
def test_each_check_passes_here(name):
    outcome = here(name)
    assert outcome.state in ("passed", "left out"), outcome
    # What goes to the file, and through JSON between processes, comes back as it was.
    assert Outcome.from_json(json.loads(json.dumps(outcome.as_json()))) == outcome


@pytest.mark.slow
def test_a_real_step_says_how_fast_and_of_how_many_operations_it_is():
    figures = here("a step of SmolLM2-135M").figures
    plain = figures["plain"]
    assert plain["tokens_per_second"] == pytest.approx(figures["tokens"] / plain["seconds"])
    assert plain["first_step_seconds"] > 0 and figures["operations"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", training._COMPILED)
def test_compiled_steps_are_plain_ones(name):
    difference = training.both_ways(training._COMPILED[name], "float32")
    assert not difference.exceeds, difference


def test_a_machine_that_training_suffers_from_fails(monkeypatch):
    found = [Finding("BLAS", "bad", "a slow one", "a remedy"), Finding("hub", "good", "logged in")]
    monkeypatch.setattr(machine, "examine", lambda _: found)
    outcome = outcome_of("doctor")
    assert outcome.state == "failed" and "a slow one" in outcome.errors[0]
    assert "hub" not in str(outcome.figures)  # which says something of a person


# ------------------------------------------------------------------------- faults are caught


def test_a_wrong_attention_fails_its_check_and_no_other(monkeypatch):
    right = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a, **kw: 1.2 * right(*a, **kw))
    wrong = outcome_of("attention")
    assert wrong.state == "failed" and beyond(wrong)
    assert all(what.startswith("own attention") for what in beyond(wrong))
    for name in ("quantized products", "loss without logits"):
        assert outcome_of(name).state == "passed"


def test_a_wrong_gradient_fails_though_values_are_right(monkeypatch):
    right = kernels.chunked_cross_entropy

    def without_gradient(*given, **how):
        return mx.stop_gradient(right(*given, **how))

    monkeypatch.setattr(kernels, "chunked_cross_entropy", without_gradient)
    wrong = outcome_of("loss without logits")
    assert wrong.state == "failed"
    assert beyond(wrong) and all("gradient" in what for what in beyond(wrong))


@pytest.mark.slow
def test_a_wrong_product_fails_where_weights_are_packed(monkeypatch):
    right = Packing.product

    def product(self, x, arrays, *, transpose):
        return right(self, x, arrays, transpose=transpose) * (1.5 if self.bits == 4 else 1)

    monkeypatch.setattr(Packing, "product", product)
    wrong = outcome_of("quantized products")
    assert {what.partition(",")[0] for what in beyond(wrong)} == {"4 bits", "mxfp4", "nvfp4"}
    assert all(what.endswith("packed") for what in beyond(wrong))


@pytest.mark.slow
def test_a_mode_that_the_device_lacks_fails_alone(monkeypatch):
    right = Packing.pack

    def without(self, weight):
        if self.mode == "nvfp4":
            raise RuntimeError("[quantize] not implemented")
        return right(self, weight)

    monkeypatch.setattr(Packing, "pack", without)
    wrong = outcome_of("quantized products")
    assert wrong.state == "failed" and not beyond(wrong)
    assert [error.partition(",")[0] for error in wrong.errors] == ["nvfp4", "nvfp4"]


@pytest.mark.slow
def test_training_that_goes_another_way_fails(monkeypatch):
    right = training.pack

    def mixed_up(samples, grid):
        batch = right(samples, grid)
        batch.positions[:] = 0
        return batch

    monkeypatch.setattr(training, "pack", mixed_up)
    wrong = outcome_of("LoRA, float32")  # which is compared with padded batches
    assert wrong.state == "failed" and "losses of all steps" in beyond(wrong)


def test_compiled_steps_that_differ_fail_by_name(monkeypatch):
    """On a GPU: on a CPU nothing is compiled, and the check is left out."""
    apart = {"float32": 0.0, "bfloat16": 1.0}
    monkeypatch.setattr(training, "both_ways", lambda _, t: Difference("losses", apart[t], 0.1))
    with as_on_gpu():
        wrong = outcome_of("compiled steps against plain ones")
    assert wrong.state == "failed"
    assert beyond(wrong) == [f"{name}, bfloat16" for name in training._COMPILED]


@pytest.mark.slow
def test_a_loss_that_does_not_fall_fails(monkeypatch):
    right = training.recipe_of

    def still(sections, dtype="float32", name="check"):
        return right({**sections, "train": {"learning_rate": 1e-9}}, dtype, name)

    monkeypatch.setattr(training, "recipe_of", still)
    wrong = outcome_of("LoRA, float32")
    assert wrong.state == "failed" and "does not fall" in wrong.errors[0]


def test_a_wrong_token_in_a_batch_fails(monkeypatch):
    right = generation.answers

    def one_off(*given, **how):
        said = right(*given, **how)
        first, rest = said[2].split(" ", 1)
        return [*said[:2], f"{(int(first) + 1) % 256} {rest}", *said[3:]]

    monkeypatch.setattr(generation, "answers", one_off)
    assert outcome_of("a batch of answers").state == "failed"


def test_other_bytes_than_numpys_fail(monkeypatch):
    monkeypatch.setattr(kernels, "gives_the_same", lambda _: False)
    assert outcome_of("K-quants").state == "failed"


def test_what_is_no_number_exceeds_everything():
    assert Difference("x", math.nan, 1e9).exceeds and Difference("x", math.inf, 1e9).exceeds
    outcome = run_check(Check("x", lambda: Found((Difference("x", math.nan, 1.0),))))
    assert outcome.state == "failed"
    text = json.dumps(outcome.as_json())
    assert "NaN" not in text and Outcome.from_json(json.loads(text)).differences[0].exceeds


def test_an_error_is_told_with_its_place_and_what_cannot_be_done_is_left_out():
    def fails():
        raise ValueError("no such kernel")

    def lacks():
        raise LeftOutError("there is no GPU")

    outcome = run_check(Check("x", fails))
    assert outcome.state == "failed" and "ValueError: no such kernel" in outcome.errors[0]
    assert "test_selfcheck.py" in outcome.errors[0] and str(Path.cwd()) not in outcome.errors[0]
    outcome = run_check(Check("x", lacks))
    assert (outcome.state, outcome.errors) == ("left out", ("there is no GPU",))


# ----------------------------------------------------------------- memory, time and crashes


def test_memory_that_is_not_given_back_is_seen():
    kept = []

    def keeps():
        kept.append(mx.zeros((6 << 20,)))
        mx.eval(kept)
        return Found()

    def releases():
        mx.eval(mx.zeros((6 << 20,)))
        return Found()

    outcomes = [run_check(Check("releases", releases)), run_check(Check("keeps", keeps))]
    assert [each.peak_bytes >= 24 << 20 for each in outcomes] == [True, True]
    *_, told = with_memory(outcomes)
    assert told.state == "failed" and len(told.errors) == 1 and "keeps" in told.errors[0]
    assert with_memory(outcomes[:1])[-1].state == "passed"


# Checks of their own, in a process as the program starts it.
CHECKED = """
import os, sys, time
from mlxtune.selfcheck.check import Check, Found
from mlxtune.selfcheck.worker import serve

def aborts():
    print("libc++abi: terminating due to uncaught exception", file=sys.stderr, flush=True)
    os.abort()

def hangs():
    time.sleep(600)

def speaks():
    print("a library says something")
    return Found(figures={"process": os.getpid()})

checks = [Check("aborts", aborts), Check("hangs", hangs), Check("speaks", speaks)]
checks += [Check("speaks again", speaks)]
serve(sys.stdin, int(sys.argv[1]), checks)
"""
OWN = (sys.executable, "-c", CHECKED)


@pytest.mark.slow
def test_a_check_that_ends_the_process_ends_no_other():
    begun: list[str] = []
    names = ["speaks", "aborts", "speaks again", "speaks"]
    first, aborted, *others = run_checks(names, command=OWN, begins=begun.append)
    assert begun == names
    assert aborted.state == "failed" and "SIGABRT" in aborted.errors[0]
    assert "libc++abi: terminating" in aborted.errors[0]
    assert [each.state for each in (first, *others)] == ["passed"] * 3
    processes = [each.figures["process"] for each in (first, *others)]
    assert processes[0] != processes[1] == processes[2]


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_and_none_is_begun_without_time():
    limits = Limits(begin=8.0, end=600.0, check=8.0)
    hung, other = run_checks(["hangs", "speaks"], command=OWN, limits=limits)
    assert hung.state == "failed" and "8 seconds" in hung.errors[0]
    assert other.state == "not run" and "8 seconds" in other.errors[0]


def test_a_process_that_does_not_start_is_told_for_each():
    command = (sys.executable, "-c", "import no_such_package")
    outcomes = list(run_checks(["speaks", "aborts"], command=command))
    assert [each.state for each in outcomes] == ["failed", "failed"]
    assert "no_such_package" in outcomes[0].errors[0]


# ------------------------------------------------------------------- the file and the verdict


def of(name: str, state: str = "passed", **what) -> Outcome:
    return Outcome(name, state, **what)


def test_the_verdict_counts_and_names_what_failed():
    assert verdict([of("a"), of("b")]) == "all 2 checks passed"
    assert verdict([of("a"), of("b", "left out")]) == "1 of 2 checks passed (1 left out)"
    said = verdict([of("a", "failed"), of("b"), of("c", "failed"), of("d", "not run")])
    assert said == "2 of 4 checks failed (1 not run): a; c"


def test_a_line_has_what_is_furthest_from_what_is_allowed():
    near, far = Difference("near", 1e-6, 1e-2), Difference("far", 0.2, 0.1)
    assert line_of(of("a", "failed", differences=(near, far))).startswith("far: 0.2 (0.1")
    none = Difference("no number", math.nan, 1.0)
    assert line_of(of("a", "failed", differences=(far, none))).startswith("no number")
    assert line_of(of("a", "failed", errors=("first\nat file:1",))) == "first"


def test_the_file_says_nothing_of_whose_machine_it_is(tmp_path, monkeypatch):
    user, host, home = getpass.getuser(), socket.gethostname(), Path.home()
    told = {
        "said": f"free in {home}/Jane's work/runs; {Path.cwd()}/x.json; /opt/acme secret/llama",
        "deep": [{"url": f"answers at http://{host}:11434"}, f"by {user} on {host}", 3],
    }
    error = f"OSError: no file\n  {home}/clients/acme/model.py:12 load"
    written = json.dumps(record([of("a", "failed", figures=told, errors=(error,))]))
    for text in (str(home), host, "acme/model", "11434", "clients"):
        assert text not in written or text == "/"
    assert "model.py:12 load" in written and "x.json" in written
    if user != "root":
        assert user not in written
    monkeypatch.setattr("mlxtune.selfcheck.record._names", lambda: ("jdoe", "Janes-MacBook"))
    written = json.dumps(record([of("a", errors=("jdoe on janes-macbook.local; jdoes",))]))
    assert "NAME on NAME.local; jdoes" in written


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path):
    file = tmp_path / "check.json"
    write_record(file, record([of("a")]), overwrite=False)
    before = file.read_text()
    with pytest.raises(OutputExists):
        write_record(file, record([of("a", "failed")]), overwrite=False)
    assert file.read_text() == before
    write_record(file, record([of("a", "failed")]), overwrite=True)
    assert "1 of 1 checks failed" in json.loads(file.read_text())["verdict"]


# --------------------------------------------------------------------------- the command line


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs `mlxtune doctor` here, with outcomes in the place of checks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlxtune.cli.doctor.prepare", lambda **_: None)

    def run(*arguments, outcomes=()):
        def given(names, **_):
            yield from outcomes

        monkeypatch.setattr("mlxtune.selfcheck.run.run_checks", given)
        return CliRunner().invoke(cli, ["doctor", *arguments])

    return run


def test_the_table_the_verdict_and_the_exit_code(program, tmp_path):
    outcomes = [of("a", seconds=1.0), of("b", "failed", errors=("first\nsecond",))]
    done = program("--check", outcomes=outcomes)
    assert done.exit_code == 1
    assert "downloads nothing" in done.stderr and "mlxtune-check.json" in done.stderr
    assert "1 of 3 checks failed: b" in done.stdout and "second" in done.stdout
    kept = json.loads((tmp_path / verb.FILE).read_text())
    assert [each["name"] for each in kept["checks"]] == ["a", "b", "memory is given back"]
    done = program("--check", "--json", "-o", "other.json", outcomes=outcomes[:1])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads((tmp_path / "other.json").read_text())


def test_nothing_is_run_where_the_file_may_not_be_written(program, tmp_path):
    def never():
        raise AssertionError("a check was run")
        yield

    (tmp_path / verb.FILE).write_text("mine")
    done = program("--check", outcomes=never())
    assert isinstance(done.exception, OutputExists)
    assert (tmp_path / verb.FILE).read_text() == "mine"
    assert program("--check", "--overwrite", outcomes=[of("a")]).exit_code == 0
    assert "all 2 checks" in (tmp_path / verb.FILE).read_text()


def test_after_an_interrupt_the_file_holds_what_was_done(program, tmp_path):
    def interrupted():
        yield of("this machine")
        raise KeyboardInterrupt

    done = program("--check", outcomes=interrupted())
    assert done.exit_code != 0
    kept = json.loads((tmp_path / verb.FILE).read_text())
    assert kept["stopped"] == "interrupted"
    states = [each["state"] for each in kept["checks"]]
    assert states == ["passed", *["not run"] * (len(CHECKS) - 1), "passed"]


def test_an_interrupt_before_anything_was_done_writes_nothing(program, tmp_path):
    def interrupted():
        raise KeyboardInterrupt
        yield

    assert program("--check", outcomes=interrupted()).exit_code != 0
    assert not list(tmp_path.iterdir())


def test_out_of_time_is_said_in_the_file(program, tmp_path):
    done = program("--check", outcomes=[of("a"), of("b", "not run", errors=("late",))])
    assert done.exit_code == 0 and "1 not run" in done.stdout
    assert json.loads((tmp_path / verb.FILE).read_text())["stopped"] == "out of time"


@pytest.mark.parametrize("option", [("-o", "x.json"), ("--overwrite",)])
def test_options_of_the_check_go_with_it(program, option):
    assert program(*option).exit_code == 2


@pytest.mark.slow
def test_the_program_checks_this_machine(tmp_path):
    done = mlxtune_afresh("doctor", "--check", cwd=tmp_path)
    kept = json.loads((tmp_path / verb.FILE).read_text())
    states = {each["name"]: each["state"] for each in kept["checks"]}
    # This process's BLAS is off where none is preloaded, which doctor finds bad.
    bad = {name for name, state in states.items() if state == "failed"} - {"doctor"}
    assert not bad, done.stdout
    assert [each.name for each in CHECKS] == list(states)[:-1]
    assert [path.name for path in tmp_path.iterdir()] == [str(verb.FILE)]
    assert kept["verdict"] in done.stdout
