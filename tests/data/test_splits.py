"""Folders with several splits, against the `datasets` library's reading of the same folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxtune.data.sources import Source, read_conversations
from mlxtune.errors import DataError
from support.files import write_jsonl

datasets = pytest.importorskip("datasets")
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/first*
  - split: test_sft
    path: [data/last.jsonl]
- config_name: other
  data_files: other.jsonl
---
# A card
"""
# Names of files; a file's one record says where it stands.
LAYOUTS = {
    "mlx-lm": ["train.jsonl", "valid.jsonl", "test.jsonl"],
    "prefixes": ["shell-train.jsonl", "shell-dev.jsonl", "shell_eval.jsonl"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", "test/c.jsonl"],
    "shards": [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001-0a1b2c.parquet",
    ],
    "shards of other names": [
        "data/train_sft-00000-of-00001.parquet",
        "data/test_sft-00000-of-00001.parquet",
    ],
    "one whole": ["a.jsonl", "b/c.jsonl"],
    "words that are no splits": ["trainer.jsonl", "latest.jsonl", "devices.jsonl"],
    "card": ["data/first-1.jsonl", "data/first-2.jsonl", "data/last.jsonl", "other.jsonl"],
}


def lay(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{name} {i}"} for i in range(2)]
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        else:
            write_jsonl(path, rows)
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "report.json"):
        (folder / name).write_text(json.dumps({"text": {"description": "no record"}}))
    return folder


def texts(folder: Path, **how: object) -> list[str]:
    return sorted(c.text() for c in read_conversations(folder, **how))


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """The rows of a folder's splits as `datasets` reads them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(folder: Path, subset: str | None = None) -> dict[str, list[str]]:
        # It takes every .json file for records, whatever it is called.
        for name in ("dataset_infos.json", "dataset_info.json", "state.json", "report.json"):
            (folder / name).unlink()
        found = datasets.load_dataset(str(folder), subset, cache_dir=str(tmp_path / "cache"))
        return {str(split): sorted(rows["text"]) for split, rows in found.items()}

    return read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_splits_that_datasets_finds(tmp_path, theirs, layout):
    folder = lay(tmp_path / "folder", LAYOUTS[layout])
    if layout == "card":
        (folder / "README.md").write_text(CARD)
    ours = texts(folder, split="train_sft") if "sft" in str(LAYOUTS[layout]) else None
    plain = None if layout in ("card", "shards of other names") else texts(folder)
    wanted = theirs(folder)
    for split, rows in wanted.items():
        assert texts(folder, split=split) == rows
    if plain is not None:
        assert plain == wanted["train"]
    if ours is not None:
        assert ours == wanted["train_sft"]


def test_a_subset_of_a_card_is_read(tmp_path, theirs):
    folder = lay(tmp_path / "folder", LAYOUTS["card"])
    (folder / "README.md").write_text(CARD)
    ours = texts(folder, subset="other")
    assert ours == theirs(folder, "other")["train"] == ["other.jsonl 0", "other.jsonl 1"]
    with pytest.raises(DataError, match="no subset 'none'") as raised:
        texts(folder, subset="none")
    assert 'subset = "default" or "other"' in raised.value.remedy


def test_a_folder_below_is_a_subset(tmp_path):
    folder = lay(tmp_path / "folder", ["main/train.jsonl", "main/test.jsonl", "more/train.jsonl"])
    assert texts(folder, subset="main", split="test") == ["main/test.jsonl 0", "main/test.jsonl 1"]
    with pytest.raises(DataError) as raised:
        texts(folder, subset="none")
    assert raised.value.remedy == "it has main, more"


@pytest.mark.parametrize("several", [False, True])
def test_what_save_to_disk_writes_is_read(tmp_path, several):
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "n": None} for i in range(5)]
    whole = datasets.Dataset.from_list(rows)
    saved = datasets.DatasetDict({"train": whole, "test": whole.select([0])}) if several else whole
    saved.save_to_disk(str(tmp_path / "saved"), **({} if several else {"num_shards": 2}))
    # Its cache lies in the same folder.
    stale = whole.map(lambda row: row, cache_file_name=str(tmp_path / "saved/cache-1.arrow"))
    assert len(stale) == 5 and (tmp_path / "saved/cache-1.arrow").is_file()
    assert texts(tmp_path / "saved") == ["0", "1", "2", "3", "4"]
    if several:
        assert texts(tmp_path / "saved", split="test") == ["0"]
        assert texts(tmp_path / "saved", held_out=True) == ["0"]


def test_held_out_records_are_those_of_the_validation_split_else_of_the_test_split(tmp_path):
    folder = lay(tmp_path / "a", ["train.jsonl", "val.jsonl", "test.jsonl"])
    assert texts(folder, held_out=True) == ["val.jsonl 0", "val.jsonl 1"]
    folder = lay(tmp_path / "b", ["train.jsonl", "test.jsonl"])
    assert texts(folder, held_out=True) == ["test.jsonl 0", "test.jsonl 1"]
    folder = lay(tmp_path / "c", ["some.jsonl"])
    assert texts(folder, held_out=True) == ["some.jsonl 0", "some.jsonl 1"]
    folder = lay(tmp_path / "d", ["train.jsonl"])
    with pytest.raises(DataError, match="no validation or test split"):
        texts(folder, held_out=True)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = lay(tmp_path / "a", ["train.jsonl", "test.jsonl"])
    with pytest.raises(DataError, match="no extra split") as raised:
        texts(folder, split="extra")
    assert raised.value.remedy == 'name one that it has: split = "test" or "train"'


@pytest.mark.parametrize("key", ["split", "subset"])
@pytest.mark.parametrize("path", ["train.jsonl", "*.jsonl"])
def test_one_file_has_no_splits(tmp_path, key, path):
    folder = lay(tmp_path / "a", ["train.jsonl"])
    with pytest.raises(DataError, match=f"{key} chooses among the files of a folder"):
        read_conversations(folder / path, **{key: "train"})


def test_files_of_no_split_beside_those_of_one_are_named(tmp_path):
    folder = lay(tmp_path / "a", ["train.jsonl", "extra.jsonl", "valid.jsonl"])
    split = Source(str(folder)).local_split()
    assert [file.name for file in split.files] == ["train.jsonl"]
    others = {name: [file.name for file in files] for name, files in split.others.items()}
    assert others == {"validation": ["valid.jsonl"], "": ["extra.jsonl"]}
