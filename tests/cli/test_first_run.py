"""docs/first-run.md, command by command, as a newcomer types it."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from support.files import ROOT
from support.program import mlxtune

PAGE = (ROOT / "docs/first-run.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def shown() -> list[tuple[str, list[str]]]:
    """Each command, and the lines that the page shows of what it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ mlxtune "):
            found.append((line.removeprefix("$ mlxtune "), []))
        elif line.strip():
            found[-1][1].append(line)
    return found


def alike(line: str) -> str:
    """A line without what differs from machine to machine: figures, their units, white space."""
    return " ".join(re.sub(r"\d[\d.]*( [MG]B| min| s\b)?", "#", line).split())


def test_the_spreadsheet_begins_as_the_page_shows():
    [beginning] = blocks("text")
    text = (ROOT / "docs/first-run.csv").read_text(encoding="utf-8-sig")
    assert text.replace("\r\n", "\n").startswith(beginning)


@pytest.mark.slow
def test_every_command_of_the_page_does_what_the_page_says(tmp_path):
    shutil.copy(ROOT / "docs/first-run.csv", tmp_path)
    recipe, columns = blocks("toml")
    (tmp_path / "first.toml").write_text(recipe)
    commands = shown()
    assert [command.split()[0] for command, _ in commands] == [
        "validate", "validate", "data", "plan", "lora", "eval", "report", "export", "chat",
    ]  # fmt: skip
    for number, (command, lines) in enumerate(commands):
        done = mlxtune(*shlex.split(command), cwd=tmp_path)
        said = [alike(line) for line in (done.stdout + done.stderr).splitlines()]
        assert (done.returncode != 0) == (number == 0), done.stderr
        for line in lines:
            assert any(got.startswith(alike(line)) for got in said), (command, line, said)
        if number == 0:
            text = recipe.replace('path = "first-run.csv"\n', f'path = "first-run.csv"\n{columns}')
            (tmp_path / "first.toml").write_text(text)
    assert (tmp_path / "runs/first/report.html").is_file()
    assert "SYSTEM" in (tmp_path / "runs/first/export/q8_0/Modelfile").read_text()
