"""Shell commands as commands: parsing, flags, score."""

from __future__ import annotations

import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtune.evaluate import shell, syntax
from mlxtune.evaluate.scores import shell_scores
from mlxtune.evaluate.shell import (
    command_score,
    read_command,
    same_flags,
    same_programs,
)
from mlxtune.evaluate.syntax import SHELLS, parses, shell_versions
from support.files import SHELL_HELDOUT
from support.properties import examples


def compared(a: str, b: str) -> tuple[bool, bool, float]:
    one, other = read_command(a), read_command(b)
    assert one is not None and other is not None
    score = command_score(one, other)
    assert score == command_score(other, one)
    return same_programs(one, other), same_flags(one, other), score


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("ls -la", "ls -al"),
        ("ls -la", "ls -l -a"),
        ("ls -l dir -a", "ls -la dir"),
        ("ls  -l   'my dir'", 'ls -l "my dir"'),
        ("ls -l my\\ dir", "ls -l 'my dir'"),
        ("ls -l -- dir", "ls -l dir"),
        ("head -n5 f", "head -n 5 f"),
        ("head f -n 5", "head -n 5 f"),
        ("cut -d, -f1 f", "cut -f 1 -d ',' f"),
        ("tar -xzf a.tgz -C out", "tar -z -x -C out -f a.tgz"),
        ("git log --oneline --graph", "git log --graph --oneline"),
        ("ls -la | grep -in x", "ls -al | grep -n -i x"),
        ("echo $(ls -la)", "echo $(ls -al)"),
        ("find . -type f -name '*.py'", 'find . -name "*.py" -type f'),
        ("sudo ls -la /root", "sudo ls -al /root"),
        ("find . | xargs -0 rm -fr", "find . | xargs -0 rm -rf"),
        ("a; b", "a\nb"),
        ("X=1 env", "X='1' env"),
        ("diff <(sort -u -n a) b", "diff <(sort -nu a) b"),
        ("cat x > out", "cat x 1> out"),
        ("ls;", "ls"),
        ("for f in *; do ls $f; done", "for f in *\ndo\nls $f\ndone"),
        ("ls < a > b", "ls > b < a"),
        ("tar xzf a.tgz", "tar -xzf a.tgz"),
        ("tar cvfb a.tar 20 d", "tar -c -v -f a.tar -b 20 d"),
        ("head -5 f", "head -n 5 f"),
        ("make -j4 all", "make -j 4 all"),
        ("rsync -a --exclude '*.o' a b", "rsync -a --exclude='*.o' a b"),
        ("timeout 5 ls -la", "timeout 5 ls -al"),
        ("find . -not -name a -type f", "find . -type f ! -name a"),
        ("find . -name a -type f -delete", "find . -type f -name a -delete"),
        ("find . -name a -print -maxdepth 1", "find . -maxdepth 1 -name a -print"),
        ("find . -name a -exec ls -la {} \\;", "find . -name a -exec ls -al {} ';'"),
        ("find . -type f -a -name a", "find . -type f -name a"),
    ],
)
def test_the_same_command_in_other_words(a, b):
    assert compared(a, b) == (True, True, 1)


@pytest.mark.parametrize(
    ("a", "b", "programs", "flags"),
    [
        ("ls -l", "ls", True, False),
        ("ls -l", "ll -l", False, False),
        ("ls a | wc", "wc a | ls", False, False),
        ("ls a | wc", "ls a && wc", True, True),
        ("cp a b", "cp b a", True, True),
        ("rm *.txt", "rm '*.txt'", True, True),
        ("echo $HOME", "echo '$HOME'", True, True),
        ("rm ~/x", "rm '~/x'", True, True),
        ("ls > a", "ls >> a", True, True),
        ("ls > a", "ls > b", True, True),
        ("ls -l; ls -l", "ls -l; ls", True, False),
        ("ls -- -l", "ls -l", True, False),
        ("head -n 5 f", "head -n 6 f", True, False),
        ("head -n 5 f", "head -c 5 f", True, False),
        ("find . -name a", "find . -name b", True, False),
        ("find . -name a -o -type f", "find . -type f -o -name a", True, True),
        ("find a", "find b", True, True),
        ("sort --key=2", "sort --key=3", True, False),
        ("xargs -n 1 rm", "xargs rm -n 1", True, False),
        ("sudo ls", "ls", False, False),
        ("X=1 env", "X=2 env", True, True),
        ("! ls", "ls", True, True),
        ("(cd x; ls)", "cd x; ls", True, True),
        ("for f in a; do ls $f; done", "for f in b; do ls $f; done", True, True),
        ("cat <<E\na\nE", "cat <<E\nb\nE", True, True),
        ("ls > a 2>&1", "ls 2>&1 > a", True, True),
        ("ls &", "ls", True, True),
        ("wc --lines a", "wc --lines b", True, True),
        ("sort -k 1 -k 2 f", "sort -k 2 -k 1 f", True, False),
        ("sed -e s/a/b/ -e s/b/c/", "sed -e s/b/c/ -e s/a/b/", True, False),
        ("timeout 5 rm x", "timeout 5 ls x", False, False),
        ("timeout 5 ls", "timeout 6 ls", True, True),
        ("find . -name a -delete", "find . -delete -name a", True, True),
        ("find . -name a -prune -print", "find . -print -name a -prune", True, True),
        ("find . -not -name a -type f", "find . -not -type f -name a", True, False),
        ("find . -exec rm {} \\;", "find . -exec ls {} \\;", False, False),
        ("find . -exec rm {} \\;", "find . -exec rm {} +", True, False),
        ("find . -exec rm {} +", "find . -delete", False, False),
        ("while read l; do ls; done < f", "while read l; do ls; done < g", True, True),
    ],
)
def test_another_command(a, b, programs, flags):
    found_programs, found_flags, score = compared(a, b)
    assert (found_programs, found_flags) == (programs, flags)
    assert 0 <= score < 1


def test_scores_by_hand():
    # Facts: program, two flags, operand; three of four are the same on both sides.
    assert compared("ls -la x", "ls -lh x")[2] == pytest.approx(6 / 8)
    assert compared("ls -l", "df -h")[2] == 0
    # Two programs and a pipe (three) against one program.
    assert compared("ls | wc", "ls")[2] == pytest.approx(2 * 1 / (3 + 1))


@pytest.mark.parametrize(
    "text", ["", "  ", "# comment", "ls |", "case x in a) ls;; esac", "'", "é' ${ ' é"]
)
def test_what_bashlex_cannot_read_is_none(text):
    assert read_command(text) is None


@given(st.text() | st.text(alphabet="ls -|&;<>(){}$`'\"\\\n#*?[]=!~a0\0", max_size=30))
@examples(250)
def test_no_text_crashes(text):
    script = read_command(text)
    if script is not None:
        assert command_score(script, script) == 1 and same_flags(script, script)


def test_shells_tell_what_parses():
    assert parses("ls -la | wc -l", "bash") and parses("ls -la | wc -l", "dash")
    for wrong in ("ls |", "echo 'open", "if true; then", "", "ls \0", "cat <<EOF\nx", ")"):
        assert parses(wrong, "bash") is False
    assert parses("diff <(ls a) <(ls b)", "bash") is True
    assert parses("diff <(ls a) <(ls b)", "dash") is False
    assert parses("-c 'x'; --version", "bash") is True


def test_the_bash_that_reads_is_named(tmp_path, monkeypatch):
    """macOS has one of 2007, which takes other texts than today's for commands."""
    said = "GNU bash, version 3.2.57(1)-release (arm64-apple-darwin24)"
    for name, text in (("bash", said), ("dash", "0: Illegal option --")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert shell_versions() == {"bash": "3.2.57(1)-release"}


def test_nothing_is_executed(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    startup = tmp_path / "startup"
    startup.write_text(f"touch {marker}\n")
    monkeypatch.setenv("BASH_ENV", str(startup))
    monkeypatch.setenv("ENV", str(startup))
    for name in SHELLS:
        for text in (f"touch {marker}", f"set +n\ntouch {marker}", f"echo $(touch {marker})"):
            parses(text, name)
    assert not marker.exists()


def test_a_missing_or_slow_shell_is_none(monkeypatch):
    assert parses("ls", "no-such-shell") is None

    def slow(*_arguments, **_kw):
        raise subprocess.TimeoutExpired("bash", 5)

    monkeypatch.setattr(syntax.subprocess, "run", slow)
    assert parses("ls a-command-not-seen-before", "bash") is None


def test_every_command_of_the_shell_data_is_like_itself_only():
    commands = [json.loads(line)["expected_command"] for line in SHELL_HELDOUT.open()]
    read = {text: read_command(text) for text in commands}
    readable = {text: script for text, script in read.items() if script is not None}
    assert len(readable) > 0.95 * len(read)
    facts = [tuple(sorted(map(repr, script.facts().items()))) for script in readable.values()]
    assert len(set(facts)) == len(facts)


def test_an_answer_that_bashlex_cannot_read_is_another_command():
    judged = ("programs", "flags", "shell")
    readable, unreadable = "ls -la", "[[ -f a && -f b ]] && time ls -la"
    assert read_command(unreadable) is None and parses(unreadable, "bash")
    wrong = shell_scores(unreadable, readable)
    assert [wrong[name] for name in judged] == [0, 0, 0] and wrong["bash"] == 1
    untold = shell_scores(readable, unreadable)
    assert [untold[name] for name in judged] == [None, None, None]


def test_without_bashlex_one_is_told_what_to_install(monkeypatch):
    def missing(_name):
        raise ImportError

    monkeypatch.setattr(shell, "import_module", missing)
    with pytest.raises(shell.MlxtuneError, match=r"\[shell\]"):
        shell.require_bashlex()
