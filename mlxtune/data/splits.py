"""Which files of a folder hold which split: as its card says, or by their names.

The rules are those of the `datasets` library, so a folder is read as the hub reads it:
https://huggingface.co/docs/datasets/repository_structure
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What people call the splits, in the names of files and folders and in recipes.
_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "heldout", "held-out", "held_out"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {name: split for split, names in _NAMES.items() for name in names}
_KEYWORD = re.compile(
    rf"(?:^|[-._ 0-9])({'|'.join(sorted(_CANONICAL, key=len, reverse=True))})(?=$|[-._ 0-9])"
)
# data/train_sft-00000-of-00004.parquet: a shard's name says its split, whatever it is called.
_SHARD = re.compile(r"^(.+)-\d{5}-of-\d{5}(?:-\w+)?\.")


@dataclass(frozen=True)
class Split:
    """The files of one split of a folder.

    Attributes:
        name: of the split; empty where nothing in the folder is called like one.
        files: in order of name.
        others: files of the folder's other splits, by split; those of none under `""`.
    """

    name: str
    files: tuple[Path, ...]
    others: dict[str, tuple[Path, ...]] = field(default_factory=dict)


def canonical(name: str) -> str:
    """The one name of a split: `val`, `valid` and `dev` are `validation`."""
    return _CANONICAL.get(name.lower(), name)


def default_split(names: Iterable[str], *, held_out: bool) -> str | None:
    """The split that is meant where none is named.

    Args:
        names: of the splits that there are.
        held_out: for held-out records: validation, or test where there is none. Otherwise
            it is train.

    Returns:
        A name among those given; None if none of them is meant.
    """
    wanted = (VALIDATION, TEST) if held_out else (TRAIN,)
    found = {canonical(name): name for name in names}
    return next((found[split] for split in wanted if split in found), None)


def one_of(names: Iterable[str]) -> str:
    """Names as a choice, as they are written in a recipe."""
    return " or ".join(f'"{name}"' for name in names)


def choose_split(
    folder: Path,
    files: Sequence[Path],
    split: str | None,
    *,
    subset: str | None = None,
    held_out: bool = False,
) -> Split:
    """The files of a folder that a split consists of.

    Args:
        folder: that the files are in.
        files: with records, in order of name.
        split: its name, in any of the usual spellings; None for the default, see
            `default_split`. A folder in which nothing is called like a split is one whole.
        subset: a configuration of the card, or a folder below this one.
        held_out: the split is for held-out records.

    Raises:
        DataError: the folder has no such split or subset.
    """
    splits = _of_card(folder, files, subset)
    if splits is None:
        files = _below(folder, files, subset)
        splits = _by_name(folder, files)
    nameless = splits.pop("", ())
    if split is None:
        name = default_split(splits, held_out=held_out)
        if name is None and nameless:
            return Split("", tuple(nameless), _tuples(splits))
    else:
        alike = {canonical(name): name for name in splits}
        name = split if split in splits else alike.get(canonical(split))
        if name is None and nameless and not splits and canonical(split) == TRAIN:
            return Split("", tuple(nameless))
    if name is None:
        wanted = split or ("validation or test" if held_out else TRAIN)
        raise DataError(
            f"this folder has no {wanted} split",
            where=str(folder),
            remedy=f"name one that it has: split = {one_of(splits)}",
        )
    chosen = splits.pop(name)
    others = splits | ({"": nameless} if nameless else {})
    return Split(name, tuple(chosen), _tuples(others))


def _tuples(splits: dict[str, Any]) -> dict[str, tuple[Path, ...]]:
    return {name: tuple(files) for name, files in splits.items()}


def _by_name(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Split to files; those of no split under the empty name."""
    shards = {file: _SHARD.match(file.name) for file in files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = shards[file]
        # Shards that datasets writes to a disk are called data: their folder is the split.
        if shard is not None and shard.group(1) != "data":
            name = canonical(shard.group(1))
        else:
            name = _named(file.relative_to(folder))
        splits.setdefault(name, []).append(file)
    return splits


def _named(path: Path) -> str:
    """The split that a file is called after, else the folder nearest to it."""
    for part in (path.name, *reversed(path.parts[:-1])):
        if found := _KEYWORD.search(part.lower()):
            return _CANONICAL[found.group(1)]
    return ""


def _below(folder: Path, files: Sequence[Path], subset: str | None) -> Sequence[Path]:
    if subset is None:
        return files
    place = folder / subset
    inside = [file for file in files if place in file.parents]
    if not inside:
        below = sorted({f.relative_to(folder).parts[0] for f in files if f.parent != folder})
        raise DataError(
            f"this folder has no subset {subset!r}",
            where=str(folder),
            remedy=f"it has {', '.join(below)}" if below else "leave subset out",
        )
    return inside


def _of_card(
    folder: Path, files: Sequence[Path], subset: str | None
) -> dict[str, list[Path]] | None:
    """Split to files as README.md says; None if it says nothing of that."""
    configs = {str(c.get("config_name", "default")): c for c in _configs(folder)}
    if not configs:
        return None
    if subset is not None:
        chosen = configs.get(subset)
    else:
        marked = [name for name, config in configs.items() if config.get("default")]
        chosen = configs.get([*marked, "default"][0])
        chosen = next(iter(configs.values())) if len(configs) == 1 else chosen
    if chosen is None:
        what = f"this dataset has no subset {subset!r}" if subset else "this dataset has subsets"
        raise DataError(
            what, where=str(folder), remedy=f"name one of them: subset = {one_of(configs)}"
        )
    base = folder / str(chosen.get("data_dir", ""))
    splits: dict[str, list[Path]] = {}
    for name, patterns in _data_files(chosen.get("data_files")):
        matched = {path for pattern in patterns for path in base.glob(str(pattern))}
        splits[name] = [file for file in files if file in matched]
        if not splits[name]:
            raise DataError(
                f"the files of its {name} split are not here ({', '.join(map(str, patterns))})",
                where=str(folder),
                remedy="download the dataset again, or mend data_files in its README.md",
            )
    return splits or None


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The configurations in a dataset card that name files."""
    card = folder / "README.md"
    try:
        if card.read_bytes()[:3] != b"---":
            return []
        from huggingface_hub import metadata_load

        said = (metadata_load(card) or {}).get("configs")
    except Exception:  # no card, or none that says anything: names decide
        return []
    configs = said if isinstance(said, list) else []
    return [c for c in configs if isinstance(c, dict) and c.get("data_files")]


def _data_files(said: Any) -> list[tuple[str, list[str]]]:
    """Split and patterns, of the forms that a card may have."""
    if isinstance(said, dict):
        return [(str(k), v if isinstance(v, list) else [v]) for k, v in said.items()]
    entries = said if isinstance(said, list) else [said]
    if all(isinstance(entry, dict) for entry in entries):
        return [
            (str(e.get("split", TRAIN)), p if isinstance(p := e.get("path"), list) else [p])
            for e in entries
        ]
    return [(TRAIN, [str(entry) for entry in entries])]
