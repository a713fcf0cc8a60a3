"""What training shows: a line a report or a bar, and what stays when it ends."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from mlxtune.cli import display
from mlxtune.cli.curve import History, curve, duration
from mlxtune.cli.display import training_display
from mlxtune.train.metrics import Outline, Report
from support.files import write_jsonl
from support.program import environment, mlxtune

RECIPE = """
name = "tiny"
[model]
path = "{model}"
[lora]
rank = 2
[[data]]
path = "data.jsonl"
[train]
max_steps = 12
batch_size = 2
[log]
steps = 1
[eval]
val_size = 2
steps = 4
"""


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{n}", "completion": "b"} for n in range(8)])
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=tiny_folder))
    return tmp_path


def test_a_pipe_gets_the_last_losses_a_curve_and_the_time(recipe):
    done = mlxtune("lora", "recipe.toml", cwd=recipe)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "(best" not in next(line for line in lines if line.startswith("before training"))
    at = next(i for i, line in enumerate(lines) if line.startswith("trained 12 steps in "))
    loss, held_out = lines[at + 1 : at + 3]
    reported = [line.split("loss ")[1].split()[0] for line in lines[:at] if "/12  loss" in line]
    assert loss.split()[1:4] == [reported[0], "→", reported[-1]]
    assert len(loss.split()[4]) == len(reported) == 12
    assert held_out.startswith("held-out loss") and len(held_out.split()[-1]) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@pytest.mark.parametrize("columns", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_a_terminal_keeps_them_below_what_the_bar_leaves(recipe, columns):
    screen = on_terminal(recipe, columns, "lora", "recipe.toml")
    kept = [line for line in screen if line.strip()]
    at = next(i for i, line in enumerate(kept) if line.startswith("trained 12 steps in "))
    assert kept[at + 1].startswith("loss") and "→" in kept[at + 1]
    assert all(len(line) <= columns for line in kept[at : at + 3])
    assert not any("/12" in line for line in kept)  # the bar itself is gone


def on_terminal(cwd, columns: int, *arguments: str) -> list[str]:
    """The lines that the program leaves on a terminal."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mlxtune", *arguments]
    env = environment() | {"COLUMNS": str(columns), "LINES": "50", "TERM": "xterm"}
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=slave, stderr=slave) as ran:
        os.close(slave)
        said = b""
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
            said += piece
    os.close(master)
    assert ran.returncode == 0, said
    return shown(said.decode())


def shown(text: str) -> list[str]:
    """What a terminal shows of a text: lines that are erased and written over are gone."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r\n|\r|\n)", text):
        if part in ("\n", "\r\n"):
            row += 1
            if row == len(lines):
                lines.append("")
        elif part.startswith("\x1b["):
            count = int(part[2:-1] or 1) if part[2:-1].isdigit() or part[2:-1] == "" else 0
            if part.endswith("A"):
                row -= count
            elif part == "\x1b[2K":
                lines[row] = ""
        elif part != "\r":
            lines[row] += part
    return lines


def outline(**more) -> Outline:
    values = {"run": "r", "model": "m", "device": "d", "dtype": "float32", "packed": True}
    values |= {"notes": (), "trainable": 1, "parameters": 2, "samples": 3, "held_out": 0}
    return Outline(**(values | {"first_step": 0, "total_steps": 9} | more))


def report(step: int, loss: float) -> Report:
    return Report(step, 0.0, loss, 1e-4, 1.0, 1, 1, 1, 1.0, 1.0, 1, 1.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_reached_stays_when_training_is_ended_by_an_error(monkeypatch, error):
    said = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda: Console(file=said, width=80))
    with pytest.raises(error), training_display() as shown:
        shown.started(outline())
        for step in range(1, 5):
            shown.stepped(step)
            shown.reported(report(step, 5.0 - step))
        raise error
    last = said.getvalue().splitlines()[-2:]
    assert last[0].startswith("stopped at step 4/9: 4 steps in ")
    assert last[1] == "loss           4.0000 → 1.0000  █▆▃▁"


def test_nothing_stays_of_what_did_not_begin(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda: Console(file=said))
    with pytest.raises(ValueError, match="x"), training_display():
        raise ValueError("x")
    assert said.getvalue() == ""


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([3, 2, 1], 10, "█▅▁"),
        ([1, 2, 3, 4, 5, 6, 7, 8], 40, "▁▂▃▄▅▆▇█"),
        ([1, 1, 1], 10, "▁▁▁"),
        ([1, float("nan"), 3], 10, "▁ █"),
        ([float("nan")] * 3, 10, "   "),
        ([1, 2], 10, ""),
        ([1, 2, 3], 7, ""),
        (range(1000), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_curve_has_a_column_a_value_or_a_mean_of_some(values, width, expected):
    assert curve(list(values), width) == expected


@pytest.mark.parametrize("width", [20, 30, 40, 80])
def test_lines_fit_a_narrow_terminal_and_may_be_ascii(width):
    history = History([float(n) for n in range(100)], {0: 3.0, 50: 1.0, 100: 2.0}, step=100)
    lines = history.lines(0, 100, 4000.0, width, plain=True)
    assert lines[0] == "trained 100 steps in 1:06:40 h"
    assert all(line.isascii() and len(line) <= max(width, 33) for line in lines)


def test_eval_says_what_it_does_and_how_many_answers_there_are_to_be(recipe):
    assert mlxtune("lora", "recipe.toml", cwd=recipe).returncode == 0
    write_jsonl(recipe / "asked.jsonl", [{"prompt": f"{n}", "completion": "b"} for n in range(9)])
    verb = ("eval", "runs/tiny", "--data=asked.jsonl", "--max-tokens=3")
    lines = mlxtune(*verb, cwd=recipe).stderr.splitlines()
    assert [line for line in lines if "answers" in line] == ["base: 9 answers", "tuned: 9 answers"]


def test_counts_come_now_and_then_and_other_lines_at_once(monkeypatch, capsys):
    clock = iter(range(100))  # a second more each time
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=clock.__next__))
    with display.status_line("x", every=6, rare=lambda said: " of " in said) as say:
        say("base: held-out loss")
        for done in range(1, 10):
            say(f"{done} of 9 answers")
    first, *counts = capsys.readouterr().err.splitlines()
    assert first == "base: held-out loss" and counts == ["6 of 9 answers"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3600, "1:00:00 h")]
)
def test_a_duration_as_people_say_it(seconds, said):
    assert duration(seconds) == said
