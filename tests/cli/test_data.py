"""`mlxtune data` as people run it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from support.files import SHELL_HELDOUT, SHELL_TRAIN, write_jsonl
from support.process import HANGS
from support.program import mlxtune, running, wait_until

GOOD = {"prompt": "list files", "completion": "ls"}


@pytest.fixture
def folder(tmp_path, tiny_folder) -> Path:
    """A recipe with three records, the last one long."""
    write_jsonl(
        tmp_path / "rows.jsonl",
        [GOOD, {"prompt": "hidden ones", "completion": "ls -a"}, GOOD | {"prompt": "x" * 300}],
    )
    (tmp_path / "recipe.toml").write_text(
        f'name = "tiny"\n[model]\npath = "{tiny_folder}"\n'
        '[[data]]\npath = "rows.jsonl"\ntruncate = "drop"\n[train]\nmax_seq_length = 200\n'
    )
    return tmp_path


def test_inspect_shows_what_is_trained_and_what_is_left_out(folder):
    done = mlxtune("data", "inspect", "recipe.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "record 1  rows.jsonl:1" in done.stdout
    assert "⟦ls<|im_end|>⟧" in done.stdout
    assert "⟦ls -a<|im_end|>⟧" in done.stdout
    assert "3 records, 2 samples" in done.stdout
    assert "rows.jsonl: 1 of 3 records left out: longer than max_seq_length" in done.stdout
    assert "begin with the same" in done.stdout


def test_inspect_shows_one_row_with_its_ids(folder):
    done = mlxtune("data", "inspect", "recipe.toml", "--row", "2", "--ids", cwd=folder)
    assert "record 2  rows.jsonl:2" in done.stdout and "record 1" not in done.stdout
    # The tiny tokenizer has a token a byte, and the end of a turn last.
    assert "257⟧" in done.stdout
    missing = mlxtune("data", "inspect", "recipe.toml", "--row", "4", cwd=folder)
    assert missing.returncode == 1
    assert missing.stderr == "error: there is no record 4: there are 3\n"


def test_inspect_as_json_has_tokens_and_figures(folder):
    done = mlxtune("data", "inspect", "recipe.toml", "--json", "--rows", "1", cwd=folder)
    found = json.loads(done.stdout)
    [row] = found["rows"]
    assert [part["text"] for part in row["parts"] if part["trained"]] == ["ls<|im_end|>"]
    assert len(row["trained"]) == 3  # l, s and the end
    [source] = found["sources"]
    assert (source["rows"], source["samples"]) == (3, 2)
    assert source["dropped"] == {"longer than max_seq_length": 1}
    assert sum(bin["count"] for bin in found["lengths"]) == 2
    assert 0 < found["shared_prefix"]["share"] < 1


def test_inspect_shows_both_sides_of_a_pair_and_their_prompt_once(folder):
    pair = {"prompt": "list files", "chosen": "ls", "rejected": "rm -r x"}
    write_jsonl(folder / "rows.jsonl", [pair, pair | {"chosen": "ls -a"}])
    overrides = ("--set", "objective=dpo")
    done = mlxtune("data", "inspect", "recipe.toml", *overrides, "--rows", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "record 1  chosen  rows.jsonl:1" in done.stdout
    assert "record 1  rejected  rows.jsonl:1" in done.stdout
    assert done.stdout.count("list files") == 1
    assert "⟦ls<|im_end|>⟧" in done.stdout and "⟦rm -r x<|im_end|>⟧" in done.stdout
    assert "2 records, 2 pairs" in done.stdout
    found = mlxtune("data", "inspect", "recipe.toml", *overrides, "--json", cwd=folder)
    rows = json.loads(found.stdout)["rows"]
    assert [row["side"] for row in rows[:2]] == ["chosen", "rejected"]
    # All up to the first of the answer's tokens, a byte each.
    first = rows[0]["trained"][0]
    assert rows[0]["shared"] == first == rows[1]["trained"][0]
    assert f"the same {first} tokens as the chosen side" in done.stdout


def test_inspect_takes_overrides_and_tells_errors(folder):
    done = mlxtune("data", "inspect", "recipe.toml", "--set", 'data.truncate="error"', cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: rows.jsonl:3: this record has")
    assert "Traceback" not in done.stderr
    done = mlxtune(
        "data", "inspect", "recipe.toml", "--set", 'data.roles_to_train=["user"]', cwd=folder
    )
    assert "⟦list files<|im_end|>⟧" in done.stdout


def test_inspect_says_why_a_record_is_not_shown(folder):
    done = mlxtune("data", "inspect", "recipe.toml", "--row", "3", cwd=folder)
    assert "record 3 is left out: longer than max_seq_length" in done.stdout
    done = mlxtune("data", "inspect", "recipe.toml", "--json", cwd=folder)
    assert json.loads(done.stdout)["left_out"] == {"3": "longer than max_seq_length"}


def test_inspect_tells_of_each_source_and_of_one_that_is_not_there(folder):
    recipe = folder / "recipe.toml"
    again = '[[data]]\npath = "rows.jsonl"\nmax_samples = 1\n'
    recipe.write_text(recipe.read_text() + again)
    done = mlxtune("data", "inspect", "recipe.toml", cwd=folder)
    assert "3 records, 2 samples" in done.stdout and "1 records, 1 samples" in done.stdout
    (folder / "rows.jsonl").unlink()
    done = mlxtune("data", "inspect", "recipe.toml", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("error: rows.jsonl: there is no such file\n")


@pytest.mark.parametrize(
    "kill", [pytest.param(kill, marks=pytest.mark.slow) for kill in (signal.SIGINT, signal.SIGKILL)]
)
def test_inspect_that_is_stopped_takes_its_processes_with_it(folder, kill):
    """As a terminal's Ctrl-C reaches all of them; whoever is left would keep stderr open."""
    write_jsonl(folder / "rows.jsonl", [GOOD | {"prompt": f"list {n}"} for n in range(60_000)])
    cache = folder / "cache"
    with running("data", "inspect", "recipe.toml", cwd=folder, MLXTUNE_CACHE=str(cache)) as process:
        wait_until(lambda: list(cache.glob("tokens/.*.partial")), process)
        time.sleep(1)  # the others are being started
        os.killpg(process.pid, kill) if kill == signal.SIGINT else process.kill()
        _, errors = process.communicate(timeout=HANGS)
    if kill == signal.SIGINT:
        assert (process.returncode, errors.strip()) == (130, "interrupted")
    assert not list(cache.glob("tokens/[!.]*"))


def test_convert_goes_between_shapes_and_maps_columns(tmp_path):
    (tmp_path / "in.csv").write_text("question;reply\nhow, much?;42\n")
    arguments = ("--to", "sharegpt", "--column", "prompt=question", "--column", "completion=reply")
    done = mlxtune("data", "convert", "in.csv", "out.jsonl", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out.jsonl: 1 sharegpt records\n")
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert [turn["value"] for turn in record["conversations"]] == ["how, much?", "42"]
    again = mlxtune("data", "convert", "in.csv", "out.jsonl", *arguments, cwd=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr


def test_prep_writes_a_clean_split_and_says_what_it_did(tmp_path):
    rows = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()]
    mail = {"prompt": "write to ann@example.com", "expected_command": "mail ann@example.com"}
    write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0], mail])
    before = (tmp_path / "rows.jsonl").read_bytes()
    arguments = ("data", "prep", "rows.jsonl", "clean", "--dedup", "exact")
    done = mlxtune(*arguments, "--scrub", "email", "--val-size", "0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "clean/report.json").read_text())
    assert report["read"] == 842
    assert report["train"] + report["heldout"] <= 841
    assert done.stdout.startswith("842 rows read")
    written = [
        line
        for name in ("train", "heldout")
        for line in (tmp_path / f"clean/{name}.jsonl").read_text().splitlines()
    ]
    assert sum("mail <EMAIL_1>" in line for line in written) == 1
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    again = mlxtune(*arguments, cwd=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr
    done = mlxtune(*arguments, "--overwrite", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["heldout"] == 0
    assert not (tmp_path / "clean/heldout.jsonl").exists()


def test_prep_takes_the_recipes_table_and_keeps_held_out_rows_out(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'name = "x"\nseed = 3\n[model]\npath = "-"\n[[data]]\npath = "-"\n'
        '[prep]\nmin_chars = 30\ndedup = "off"\n'
    )
    short = {"prompt": "hi", "completion": "ho"}
    pair = {"prompt": "count the lines of every file here", "completion": "wc -l *"}
    write_jsonl(tmp_path / "rows.jsonl", [short, pair, pair])
    arguments = ("data", "prep", "rows.jsonl", "clean", "--recipe", "recipe.toml", "--json")
    done = mlxtune(*arguments, cwd=tmp_path)
    assert json.loads(done.stdout)["train"] == 2
    done = mlxtune(*arguments, "--set", "dedup=exact", "--overwrite", cwd=tmp_path)
    assert json.loads(done.stdout)["train"] == 1
    write_jsonl(tmp_path / "held.jsonl", [pair])
    done = mlxtune(*arguments, "--against", "held.jsonl", "--overwrite", cwd=tmp_path)
    assert done.returncode == 1 and "no rows are left" in done.stderr
    assert json.loads((tmp_path / "clean/report.json").read_text())["train"] == 1
    done = mlxtune(*arguments, "--set", "dedupe=exact", cwd=tmp_path)
    assert "did you mean dedup?" in done.stderr


@pytest.mark.parametrize(
    "verb", [["prep", "a.csv", "out"], ["convert", "a.csv", "o", "--to=alpaca"]]
)
def test_columns_of_no_known_name_are_answered_with_the_option_that_names_them(tmp_path, verb):
    (tmp_path / "a.csv").write_text("frage,antwort\nwas?,das\nwer?,der\n")
    done = mlxtune("data", *verb, cwd=tmp_path)
    assert done.returncode == 1
    assert "frage, antwort has no known shape" in done.stderr
    assert "--column prompt=question --column completion=answer" in done.stderr
    mapped = ["--column", "prompt=frage", "--column", "completion=antwort"]
    assert mlxtune("data", *verb, *mapped, cwd=tmp_path).returncode == 0


def test_validate_reads_every_source(folder):
    (folder / "recipe.toml").write_text(
        (folder / "recipe.toml").read_text()
        + f'[[data]]\npath = "{SHELL_TRAIN}"\n[eval]\npath = "{SHELL_HELDOUT}"\n'
    )
    done = mlxtune("validate", "recipe.toml", cwd=folder)
    assert "rows.jsonl: 3 records" in done.stdout
    assert f"{SHELL_HELDOUT}: 140 held-out records" in done.stdout
