"""`mlxtune validate`: all that is wrong with a recipe's records and model, at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.files import write_jsonl
from support.program import mlxtune

PAIR = {"prompt": "a", "completion": "b"}


@pytest.fixture
def validate(tmp_path, tiny_folder):
    """Exit status and output of the command on these records."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held")}

    def run(lines: list[object], held: list[object] | None = None, **keys: str) -> tuple[int, str]:
        for path, records in zip(paths.values(), (lines, held or []), strict=True):
            texts = [r if isinstance(r, str) else json.dumps(r) for r in records]
            path.write_text("".join(f"{text}\n" for text in texts))
        given = {"name": "x", "model.path": str(tiny_folder), "data.path": str(paths["train"])}
        given |= {"eval.path": str(paths["held"])} if held is not None else {}
        recipe = tmp_path / "recipe.toml"
        recipe.write_text('name = "x"\n[model]\npath = "x"\n[[data]]\npath = "x"\n')
        sets = [f"--set={key}={value}" for key, value in (given | keys).items()]
        result = mlxtune("validate", "recipe.toml", *sets, cwd=tmp_path)
        return result.returncode, (result.stdout + result.stderr).replace(f"{tmp_path}/", "")

    return run


def test_a_good_recipe_is_said_to_be_valid_with_its_counts(validate):
    status, text = validate([PAIR] * 3, held=[{"prompt": "c", "completion": "d"}])
    assert status == 0
    assert text == (
        "train.jsonl: 3 records\nheld.jsonl: 1 held-out records\nrecipe.toml is valid\n"
    )


def test_everything_that_is_wrong_is_said_together(validate):
    status, text = validate([PAIR, *["no record"] * 12], **{"model.path": "nowhere/at/all"})
    assert status == 1
    assert "train.jsonl: 13 records, 1 of them usable" in text
    assert "recipe.toml: this recipe cannot be trained" in text
    assert "  model.path: there is no such folder" in text
    assert [f"train.jsonl:{n}: this line is not JSON" in text for n in (2, 11)] == [True, True]
    assert "train.jsonl:12" not in text
    assert "train.jsonl: 2 more records cannot be trained on" in text


def test_records_that_are_left_out_are_counted_by_reason(validate):
    silent = {"prompt": "a", "completion": ""}
    status, text = validate([PAIR, silent, silent, "{"], **{"data.unusable": "skip"})
    assert status == 0
    assert "train.jsonl: 4 records, 1 of them usable" in text
    assert "  2 left out: no token trained" in text and "  1 left out: this line is not" in text


def test_held_out_records_that_are_trained_on_are_refused_beyond_a_share(validate):
    status, text = validate([PAIR], held=[PAIR])
    assert status == 1
    assert "eval: 1 of 1 held-out records are also among those that are trained on" in text
    status, text = validate([PAIR], held=[PAIR], **{"eval.max_overlap": "1"})
    assert status == 0 and "1 of 1 held-out records are also among" in text


def test_a_folder_says_which_of_its_files_it_means(validate, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "test"):
        write_jsonl(folder / f"{name}.jsonl", [PAIR | {"prompt": name}])
    status, text = validate([PAIR], **{"data.path": str(folder)})
    assert status == 0
    assert "folder (train): 1 records\n" in text
    assert "its train files are trained on, not its test split" in text


def test_a_file_that_is_not_there_is_one_problem_among_others(validate, tmp_path):
    missing = str(tmp_path / Path("no.jsonl"))
    status, text = validate([PAIR], held=[PAIR], **{"data.path": missing})
    assert status == 1
    assert "  no.jsonl: there is no such file" in text
    assert "held.jsonl: 1 held-out records" in text
