"""Which files of a model's folder hold its weights, and which of them each tensor is read from."""

from __future__ import annotations

import json
from pathlib import Path

from mlxtune.errors import ModelError
from mlxtune.files import LFS_POINTER, LFS_REMEDY, is_lfs_pointer
from mlxtune.models.safetensors import StoredTensor, read_safetensors
from mlxtune.models.weight_names import INDEX, in_mlx


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model's folder: those that its index names, if it has one.

    Without an index they are all that are called `model*.safetensors`. Files that an index
    does not name are of an older copy of the model, or of another layout of it.

    Raises:
        ModelError: there are none, one that the index names is missing, or the index is damaged.
    """
    index = _index(path)
    if index is not None:
        files = [path / name for name in sorted({*index.values()})]
        if missing := [file for file in files if not file.is_file()]:
            raise ModelError(
                f"its index names {missing[0].relative_to(path)}, which is not there",
                where=str(path / INDEX),
                remedy="download the model again: its weights are not complete",
            )
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelError(
            "this folder has no model*.safetensors", where=str(path), remedy=_remedy(path)
        )
    return files


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder by MLX's name, from the file that its index names for it.

    Raises:
        ModelError: as `weight_files`; a file is damaged; or a tensor is in two files and no
            index says which of them counts.
    """
    index = _index(path) or {}
    found: dict[str, StoredTensor] = {}
    for file in weight_files(path):
        tensors = read_safetensors(file)
        names = in_mlx(tensors)
        for stored, tensor in tensors.items():
            name = names[stored]
            before, meant = found.get(name), index.get(name)
            if before is None or (meant is not None and path / meant == file):
                found[name] = tensor
            elif meant is None or path / meant != before.file:
                raise ModelError(
                    f"the tensor {name} is in two files, {before.file.name} and {file.name}, and "
                    f"no {INDEX} says which of them counts",
                    where=str(path),
                    remedy="remove the files that are not of this model",
                )
    return found


def _index(path: Path) -> dict[str, str] | None:
    """Tensor name to file name; None where the folder has no index."""
    file = path / INDEX
    if not file.is_file():
        return None
    if is_lfs_pointer(file):
        raise ModelError(LFS_POINTER, where=str(file), remedy=LFS_REMEDY)
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not names or not all(type(name) is str for name in names.values()):
            raise ValueError("weight_map names no files")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names.values()):
            raise ValueError("weight_map names files outside of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"this is no readable index of weights: {error}",
            where=str(file),
            remedy="download it again",
        ) from None
    return dict(names)


def _remedy(path: Path) -> str:
    if others := sorted(path.glob("*.safetensors")):
        return (
            f"if {others[0].name} holds its weights under Hugging Face's names, call it "
            "model.safetensors"
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return "its weights are pickled, which is never read here: save them as safetensors"
    return "download the model again"
