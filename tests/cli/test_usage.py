"""The command line itself: usage, help, and what it costs to start."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from support.program import mlxtune, mlxtune_afresh


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["lora"],
        ["lora", "recipe.toml", "--nope"],
        ["lora", "recipe.toml", "--resume", "--overwrite"],
        ["fuse", "runs/tiny"],
        ["export", "runs/tiny", "--quantize=q9"],
        ["convert", "model", "out", "--quantize=q8_0"],
        ["convert", "model", "out.gguf", "--mlx-bits=4"],
        ["convert", "model", "out", "--group-size=32"],
        ["convert", "model", "out.gguf", "--split-max-size=lots"],
        ["convert", "model", "out.gguf", "--imatrix=a", "--calibrate=b"],
        ["convert", "model", "out.gguf", "--save-imatrix=a"],
        ["convert", "model", "out", "--calibrate=b"],
        ["export", "runs/tiny", "--save-imatrix=a"],
        ["export", "runs/tiny", "--adapter-only", "--calibrate=b"],
        ["export", "runs/tiny", "--to=peft"],
        ["export", "runs/tiny", "--adapter-only", "--to=llamacpp"],
        ["export", "runs/tiny", "--adapter-only", "--base=a"],
        ["export", "runs/tiny", "--to=ollama", "--base=a"],
        ["export", "runs/tiny", "--adapter-only", "--to=lokr"],
        ["export", "runs/tiny", "--adapter-only", "--pre=smollm"],
        ["export", "runs/tiny", "--adapter-only", "--no-verify"],
        ["export", "runs/tiny", "--adapter-only", "--to=peft", "--quantize=f16"],
        ["eval", "runs/tiny", "--limit=0"],
        ["report"],
    ],
    ids=" ".join,
)
def test_a_command_used_wrongly_exits_with_2_and_tells_the_usage(tmp_path, arguments):
    done = mlxtune(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: mlxtune" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--debug", "lora", "nope.toml"], ["lora", "nope.toml", "--debug"]]
)
def test_debug_shows_where_an_error_came_from(tmp_path, arguments):
    done = mlxtune(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "load_recipe" in done.stderr
    assert "error: nope.toml: there is no such recipe" in done.stderr


def test_help_answers_at_once(tmp_path):
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        done = mlxtune_afresh("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - begun)
        assert done.returncode == 0 and "Commands:" in done.stdout
    assert min(seconds) < 0.5


def test_the_command_line_imports_no_more_than_it_needs():
    code = "import sys, mlxtune.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    heavy = {"mlx", "mlx_lm", "transformers", "tokenizers", "numpy", "pydantic", "huggingface_hub"}
    assert "mlxtune" in loaded.stdout.split()
    assert not heavy & set(loaded.stdout.split())
