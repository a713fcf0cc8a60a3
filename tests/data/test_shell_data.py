"""The project's own data: enough of it, of many kinds, and every command is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter

import pytest

from support.files import SHELL_HELDOUT, SHELL_TRAIN

TRAIN = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()]
HELDOUT = [json.loads(line) for line in SHELL_HELDOUT.read_text().splitlines()]
KEYS = {"prompt", "expected_command", "category", "posix_compliant"}


def test_there_are_enough_pairs_of_enough_categories():
    assert len(TRAIN) + len(HELDOUT) >= 600
    counts = Counter(record["category"] for record in TRAIN)
    assert len(counts) >= 12
    assert min(counts.values()) >= 40


def test_records_have_the_shell_format():
    for record in TRAIN + HELDOUT:
        assert record.keys() == KEYS
        assert record["prompt"].strip() == record["prompt"] != ""
        assert record["expected_command"].strip() == record["expected_command"] != ""
        assert "\n" not in record["expected_command"]
        assert isinstance(record["posix_compliant"], bool)


def test_no_wording_occurs_twice_or_on_both_sides():
    wordings = [" ".join(r["prompt"].lower().rstrip("?.!").split()) for r in TRAIN + HELDOUT]
    assert len(set(wordings)) == len(wordings)


def test_intents_are_worded_in_several_ways():
    wordings = Counter(record["expected_command"] for record in TRAIN)
    assert sum(count >= 6 for count in wordings.values()) >= 70


def test_every_held_out_category_is_trained():
    assert {r["category"] for r in HELDOUT} == {r["category"] for r in TRAIN}


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_every_command_parses(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    commands = {
        r["expected_command"] for r in TRAIN + HELDOUT if shell == "bash" or r["posix_compliant"]
    }
    # Each by itself: what one leaves open, the next could close.
    for command in sorted(commands):
        result = subprocess.run([shell, "-n"], input=command + "\n", text=True, capture_output=True)
        assert result.returncode == 0 and not result.stderr, command


def test_posix_commands_use_no_bash_syntax_that_dash_parses_as_something_else():
    for record in TRAIN + HELDOUT:
        if record["posix_compliant"]:
            command = record["expected_command"]
            assert not any(mark in command for mark in ("[[", "<(", "{1..", "&>", "$'"))


def test_the_quickstart_has_the_same_intents_on_both_sides():
    train = Counter(r["category"] for r in TRAIN[:504])
    assert set(train.values()) == {36} and len(train) == 14
    assert Counter(r["category"] for r in HELDOUT[:84]) == dict.fromkeys(train, 6)
    # Intents come in the same order in both files, so their fixed commands do too.
    for number, record in enumerate(HELDOUT):
        wordings = TRAIN[6 * number : 6 * number + 6]
        assert {r["category"] for r in wordings} == {record["category"]}
        commands = {r["expected_command"] for r in wordings}
        assert len(commands) > 1 or commands == {record["expected_command"]}
