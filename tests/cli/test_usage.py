"""The command line itself: usage, help, and what it costs to start."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxtune.cli.app import cli
from mlxtune.cli.suggest import _VERBS
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


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["train", "recipe.toml"], "mlxtune lora?"),
        (["fine-tune"], "mlxtune lora?"),
        (["evaluate"], "mlxtune eval?"),
        (["lroa"], "mlxtune lora?"),
        (["merge"], "mlxtune fuse?"),
        (["inspect"], "mlxtune data inspect?"),
        (["data", "inspct"], "mlxtune data inspect?"),
        (["recipe.toml"], "mlxtune lora recipe.toml?"),
        (["lora", "recipe.toml", "--resum"], "'--resume'?"),
        (["lora", "recipe.toml", "--lr", "1e-4"], "--set train.learning_rate=…?"),
        (["plan", "recipe.toml", "--batch-size=4"], "--set train.batch_size=…?"),
        (["lora", "recipe.toml", "--load-in-4bit"], "--set model.quantize=4?"),
        (["lora", "recipe.toml", "--train.epoch=1"], "--set train.epochs=…?"),
        (["fuse", "run", "-o", "out", "--dtype=bf16"], "bfloat16?"),
        (["data", "prep", "a", "b", "--dedup=exactly"], "exact?"),
        (["completion", "zhs"], "zsh?"),
        (["convert", "a", "b.gguf", "--quantize=q4_km"], "q4_k_m?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_was_meant_is_named(tmp_path, arguments, meant):
    done = mlxtune(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.rstrip().endswith(f"Did you mean {meant}"), done.stderr


def test_every_verb_that_is_meant_is_there():
    for verb in _VERBS.values():
        group, _, inside = verb.partition(" ")
        assert inside in cli.commands[group].commands if inside else group in cli.commands


def test_a_recipe_is_written_for_a_model_and_data_and_the_next_verbs_can_be_typed(tmp_path):
    done = mlxtune("init", "my recipe.toml", "--model=m", "--data=d.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("my recipe.toml: written")
    commands = [shlex.split(line.strip().partition("   ")[0]) for line in lines]
    verbs = ["validate", "plan", "lora"]
    assert [c[-2:] for c in commands] == [[verb, "my recipe.toml"] for verb in verbs]
    program = Path(tmp_path, commands[0][0])
    assert program.is_file() or shutil.which(commands[0][0])


@pytest.mark.parametrize("group", [[], ["data"]], ids=["mlxtune", "data"])
def test_no_verb_is_cut_off_in_the_help_of_a_terminal_of_80_columns(tmp_path, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    done = mlxtune(*group, "--help", cwd=tmp_path)
    verbs = done.stdout.partition("Commands:\n")[2].splitlines()
    group = cli.commands[group[0]] if group else cli
    assert [line.split()[0] for line in verbs] == sorted(group.commands)
    assert all(len(line) <= 80 and line.endswith(".") for line in verbs)
    assert not any(line.endswith("...") for line in verbs)


def test_a_conversion_ends_with_what_can_be_done_with_it(tmp_path, tiny_folder):
    done = mlxtune("convert", str(tiny_folder), "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, said, command = done.stdout.splitlines()
    assert said == "next:" and shlex.split(command.partition("   ")[0])[-2:] == ["chat", "made"]
    again = mlxtune("chat", "made", "-p", "x", "--max-tokens=1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
