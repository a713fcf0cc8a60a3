"""Commands that are run, and those that never are."""

from __future__ import annotations

import json
import shutil
import signal
from importlib import import_module

import pytest

from mlxtune.errors import MlxtuneError
from mlxtune.evaluate.sandbox import refusal, sandbox
from support.files import write_jsonl
from support.skips import lacking


@pytest.mark.parametrize(
    "text",
    [
        "ls -la",
        "grep -rn TODO . | wc -l",
        "find . -name '*.py' | sort",
        "cat notes.txt | sort | uniq -c | sort -rn | head -n 3",
        "grep -c ERROR < server.log 2> /dev/null",
        "ls nothing 2>&1 || echo none",
        'echo "$(wc -l < notes.txt)"',
        "find . -name '*.json' -print0 | xargs -0 cat",
        "find . -name '{a,b}' -o -perm -o+w",
        "ls | xargs -I{} head -n 1 {}",
        "ls | xargs | sort -k 2 --reverse --unique",
        "sort *.txt | uniq -c -f 1",
        "uniq ~/notes.txt",
        "cat {notes,numbers}.txt $HOME/.hidden",
    ],
)
def test_commands_that_read_may_run(text):
    assert refusal(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rm -rf .",
        "sudo ls",
        "/bin/ls",
        "ls; rm x",
        "ls | sh",
        "ls > out",
        "ls >> out",
        "ls 2> err",
        "echo $(rm x)",
        "echo `rm x`",
        "echo ${x:-$(rm x)}",
        "cat <<E\n$(rm x)\nE",
        "PATH=. ls",
        "x=1",
        "sort -o out notes.txt",
        "sort --output=out notes.txt",
        "find . -delete",
        "find . -exec rm {} ;",
        "find . -name a -o -delete",
        "find . ! -delete",
        "find . -not -not -exec rm {} \\;",
        "find . -type f -a -delete -print",
        "find . \\( -delete \\)",
        "sort --key -o x notes.txt",
        "find . | xargs rm",
        "find . | xargs -n 1 -I x sh -c x",
        "find . {-delete,-print}",
        "find . $(echo -delete)",
        "find . `echo -delete`",
        "find . -name x$(echo ' -delete')",
        "echo -delete; find . $_",
        "find . $'-delete'",
        "echo -delete | xargs find .",
        "echo -o x | xargs sort notes.txt",
        "ls | xargs uniq",
        "ls | xargs xargs",
        "echo rm | xargs -I cat cat notes.txt",
        "ls | xargs -in rm cat",
        "ls | xargs --arg-file cat rm",
        "ls | xargs -n $(echo 1) cat",
        "sort --outp=x notes.txt",
        "sort --comp sh notes.txt",
        "sort -ro x notes.txt",
        "sort {-ox,-r} notes.txt",
        "sort -{k1,ofile} notes.txt",
        "sort --{output,key}=x notes.txt",
        "file -{'-compile',b} x",
        "find . {-name,-delete}",
        "uniq notes.txt out",
        "uniq {notes.txt,out}",
        "diff --pag notes.txt numbers.txt",
        "tree -Lo 1 out",
        "for f in *; do rm $f; done",
        "f() { f | f; }; f",
        "ls &",
        "$cmd x",
        "l's' x; eval ls",
        "diff <(rm x) y",
        "curl localhost",
        "awk 'BEGIN { system(\"x\") }'",
    ],
)
def test_other_commands_are_refused(text):
    assert refusal(text)


def test_without_bubblewrap_it_is_refused_clearly(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MlxtuneError, match="needs bubblewrap") as error, sandbox():
        pass
    assert "--execute" in str(error.value)


@pytest.fixture(scope="module")
def box():
    if shutil.which("bwrap") is None:
        lacking("bubblewrap is not installed")
    try:
        with sandbox() as made:
            yield made
    except MlxtuneError as error:
        lacking(str(error))


def test_answers_are_judged_by_what_they_print(box, monkeypatch):
    assert box.same_output("wc -l notes.txt", "wc -l notes.txt | cat")
    assert box.same_output("grep ERROR server.log | wc -l", "grep -c ERROR server.log")
    assert box.same_output("sort numbers.txt", "sort -n numbers.txt") is False
    assert box.same_output("rm notes.txt", "cat notes.txt") is False
    assert box.same_output("cat notes.txt", "rm notes.txt") is None
    monkeypatch.setattr("mlxtune.evaluate.sandbox._SECONDS", 0.5)
    assert box.same_output("tail -f notes.txt", "tail notes.txt") is False  # does not end


def test_execute_runs_the_answers_and_measures_what_they_print(
    box, tiny_folder, tmp_path, monkeypatch, capsys
):
    pairs = [
        ("wc -l notes.txt", "cat notes.txt | wc -l | sed s/$/x/"),  # sed may not run: no match
        ("grep -c ERROR server.log", "grep ERROR server.log | wc -l"),
        ("sort numbers.txt", "sort -n numbers.txt"),
        ("rm notes.txt", "rm notes.txt"),  # cannot be told
    ]
    records = [{"prompt": "x", "expected_command": expected} for expected, _ in pairs]
    data = write_jsonl(tmp_path / "d.jsonl", records)
    monkeypatch.setattr(
        "mlxtune.evaluate.measure.answers", lambda *_, **__: [answer for _, answer in pairs]
    )
    verb = import_module("mlxtune.cli.evaluate")
    monkeypatch.setattr(verb, "prepare", lambda **_: None)

    def evaluated(*options):
        arguments = [str(tiny_folder), "--data", str(data), "-o", str(tmp_path / "out"), "--json"]
        verb.evaluate.main([*arguments, *options], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    value = evaluated("--execute")
    assert value["executed"] and (tmp_path / "out/heldout-d-executed.json").is_file()
    scores = [answer["scores"]["model"]["output"] for answer in value["answers"]]
    assert scores == [0, 1, 0, None]
    output = value["targets"]["model"]["metrics"]["output"]
    assert (output["mean"], output["count"]) == (pytest.approx(1 / 3), 3)
    value = evaluated()
    assert not value["executed"] and "output" not in value["targets"]["model"]["metrics"]
    assert (tmp_path / "out/heldout-d.json").is_file()


def test_what_is_lacking_fails_where_ci_should_have_it(monkeypatch):
    for told, raised in (
        (None, pytest.skip.Exception),
        ("false", pytest.skip.Exception),
        ("true", pytest.fail.Exception),
    ):
        monkeypatch.delenv("CI", raising=False)
        if told is not None:
            monkeypatch.setenv("CI", told)
        with pytest.raises(raised, match="no browser"):
            lacking("no browser")


def test_nothing_is_visible_or_writable_inside(box):
    def printed(text):
        outcome = box.run_read(text)
        return outcome.status, outcome.output

    assert printed("ls -A /")[1].split() == [b"bin", b"dev", b"lib", b"lib64", b"tree", b"usr"]
    for write in ("touch /tree/x", "touch /x", "rm /tree/notes.txt", "touch /usr/x"):
        assert printed(write)[0] != 0
    status, _ = printed("exec 3<>/dev/tcp/127.0.0.1/80")
    assert status != 0
    assert b"PATH=" in printed("env")[1] and b"SHELL" not in printed("env")[1]
    assert len(box.run_read("yes").output) <= 1024 * 1024
    # Neither is kept beyond that: what prints on is ended by the size of its file.
    for flood in ("yes", "yes >&2"):
        assert box.run_read(flood).status in (-signal.SIGXFSZ, 128 + signal.SIGXFSZ)
    assert box.run_read("cat notes.txt").output.startswith(b"apple")
