"""What is printed where not every character can be: no verb ends in an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from support.files import write_jsonl
from support.program import environment

RECIPE = """
name = "tiny"
[model]
path = "{model}"
[[data]]
path = "data.jsonl"
[eval]
val_size = 2
[train]
max_steps = 2
[lora]
rank = 2
"""
ROWS = [{"prompt": f"naïve 中 𝄞 “{n}” …", "completion": f"ls é {n} →"} for n in range(5)]
TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder):
    """A folder with a recipe whose records are far from ASCII, and its run."""
    path = tmp_path_factory.mktemp("world")
    write_jsonl(path / "data.jsonl", ROWS)
    (path / "recipe.toml").write_text(RECIPE.format(model=tiny_folder))
    check(path, "ascii", "lora", "recipe.toml", "-o", "run")
    return path


def called(*arguments, cwd, stdin=None, **environ):
    """The program's status, stdout and stderr, as bytes."""
    command = [sys.executable, "-m", "mlxtune", *arguments]
    env = environment() | environ
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, input=stdin or b"")
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "terminal", ["ascii", *(pytest.param(t, marks=pytest.mark.slow) for t in ("latin-1", "C"))]
)
def test_verbs_that_print_records_end_well(world, terminal):
    check(world, terminal, "eval", "run", "--max-tokens=4")
    check(world, terminal, "data", "inspect", "recipe.toml")


@pytest.mark.slow
def test_the_other_verbs_end_well_too_whatever_is_asked(world):
    """In the narrowest locale, in which what is typed and piped has no characters either."""
    check(world, "C", "data", "prep", "data.jsonl", "out")
    check(world, "C", "chat", "run", "-p", "naïve 中", "--max-tokens=4")
    check(world, "C", "chat", "run", "--max-tokens=4", stdin="ñ 中\n".encode())


def check(world, terminal, *verb, stdin=b""):
    encoding = "latin-1" if terminal == "latin-1" else "ascii"
    status, out, err = called(*verb, cwd=world, stdin=stdin, **TERMINALS[terminal])
    assert (status, b"Error" in err) == (0, False), err
    assert out.decode(encoding) and err.decode(encoding) is not None


def test_signs_are_told_by_others_and_characters_by_their_escapes(world):
    status, out, _ = called("data", "inspect", "recipe.toml", cwd=world, **TERMINALS["ascii"])
    assert status == 0
    assert r"na\u00efve \u4e2d \ud834\udd1e \u201c0\u201d ..." in out.decode()
    assert r"[[ls \u00e9 0 ->" in out.decode()
    assert "# " in out.decode()  # the bars of lengths


@pytest.mark.slow
def test_json_keeps_every_character(world):
    verb = ("data", "inspect", "recipe.toml", "--json", "--rows=1")
    made = [json.loads(called(*verb, cwd=world, **e)[1]) for e in (TERMINALS["ascii"], {})]
    assert made[0] == made[1]
    assert ROWS[0]["prompt"] in json.dumps(made[0], ensure_ascii=False).replace('\\"', '"')


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_file_whose_name_is_no_text_can_be_told_of(tmp_path):
    name = os.fsdecode(b"recipe-\xe9.toml")
    status, _, err = called("validate", name, cwd=tmp_path)
    assert (status, b"there is no such recipe" in err) == (1, True)
