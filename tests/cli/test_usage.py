"""The command line itself: usage, help, and what it costs to start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.program import mlxtune


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


def test_help_imports_no_more_than_it_needs(tmp_path):
    """So that it answers at once."""
    code = (
        "import atexit, sys, mlxtune.cli as cli\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "sys.argv = ['mlxtune', '--help']\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Commands:" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    heavy = {"mlx", "mlx_lm", "transformers", "tokenizers", "numpy", "pydantic", "huggingface_hub"}
    assert "mlxtune" in loaded and not heavy & loaded
