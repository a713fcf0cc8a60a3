"""What the docs show is what is printed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import click
import pytest

from mlxtune.cli.app import cli
from support.files import ROOT
from support.program import mlxtune


@pytest.fixture(scope="module")
def page() -> list[tuple[str, str]]:
    """(kind, text) of each code block of docs/data.md."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def printed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def test_the_way_from_a_csv_to_a_training_set_goes_as_shown(page, tmp_path, smollm2):
    csv, report, inspected = (text for kind, text in page if kind == "text")
    recipe = next(text for kind, text in page if text.startswith("# recipe.toml"))
    (tmp_path / "questions.csv").write_text(csv, encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^    mlxtune (data .*)$", text, re.MULTILINE)
    convert, prep, inspect = (command.split() for command in commands[:3])
    assert mlxtune(*convert, cwd=tmp_path).returncode == 0
    assert printed(mlxtune(*prep, cwd=tmp_path).stdout) == printed(report)
    assert printed(mlxtune(*inspect, cwd=tmp_path).stdout) == printed(inspected)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_quickstart_ends_with_how_to_talk_to_the_model(tmp_path):
    """And all that it calls, or says to call, are commands that there are."""
    done = subprocess.run(
        ["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = re.findall(r'^echo "(.*)"$', done.stdout, re.MULTILINE)
    calls = re.findall(r"^\s*(\.venv/bin/mlxtune .*)$", done.stdout, re.MULTILINE)
    hints = [line.strip() for line in said if line.startswith("  ")]
    assert ".venv/bin/mlxtune chat runs/quickstart" in hints
    for call in (*calls, *hints):
        _, verb, *arguments = shlex.split(call)
        command = cli.commands[verb]
        command.make_parser(click.Context(command)).parse_args(arguments)
