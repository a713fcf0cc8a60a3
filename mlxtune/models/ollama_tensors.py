"""A model of Ollama's MLX engine as a folder, such as the hub has.

Such a model is a safetensors file for each tensor and a blob for each JSON file. A quantized
tensor `NAME.weight` has `NAME.weight.scale` and, in affine modes, `NAME.weight.bias` in its file,
whose metadata says how it is quantized: `quant_type` and `group_size`, of all its tensors or of
one, `NAME.weight.quant_type`. Facts of https://github.com/ollama/ollama (x/create, x/quant), 0.33.

The folder holds links to the blobs, an index that says which file has which tensor under MLX's
names, and the JSON files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.errors import ModelError
from mlxtune.files import atomic_folder, cache_folder, write_json
from mlxtune.models.safetensors import read_metadata, read_safetensors
from mlxtune.models.weight_names import INDEX, SCALE, in_mlx

TENSOR, JSON = "tensor", "json"

# JSON files that are taken. Those of a second model, for drafts, have a folder in their names.
_PLAIN = re.compile(r"\w[\w.-]{0,99}\.json", re.ASCII)
_GLOBAL_SCALE = ".weight.global_scale"
# Bits, mode and the group size where none is said.
_TYPES = {
    "int4": (4, "affine", 64),
    "int8": (8, "affine", 64),
    "nvfp4": (4, "nvfp4", 16),
    "mxfp4": (4, "mxfp4", 32),
    "mxfp8": (8, "mxfp8", 32),
}


@dataclass(frozen=True)
class Blob:
    """One file of a model.

    Attributes:
        kind: `TENSOR` or `JSON`.
        name: of the tensor or of the file.
        path: in Ollama's store.
    """

    kind: str
    name: str
    path: Path


def as_folder(blobs: Sequence[Blob], where: str) -> Path:
    """The folder of a model, in the cache; it is made again when the model has changed.

    Args:
        blobs: of the model, all there.
        where: what the user called the model.

    Raises:
        ModelError: a tensor is damaged, or quantized in a way that is not read.
        StorageError: the folder cannot be written.
    """
    told = json.dumps([(blob.kind, blob.name, str(blob.path)) for blob in blobs])
    folder = cache_folder() / "ollama" / hashlib.sha256(told.encode()).hexdigest()[:32]
    if (folder / INDEX).is_file():
        return folder
    with atomic_folder(folder, overwrite=True) as temporary:
        _write(temporary, blobs, where)
    return folder


def _write(folder: Path, blobs: Sequence[Blob], where: str) -> None:
    files = {blob.name: blob.path for blob in blobs if blob.kind == JSON}
    if "config.json" not in files:
        raise ModelError("this model of Ollama has no config.json", where=where)
    for name, path in files.items():
        if _PLAIN.fullmatch(name):
            (folder / name).write_bytes(path.read_bytes())
    weight_map: dict[str, str] = {}
    packings: dict[str, dict[str, Any]] = {}
    tensors = [blob for blob in blobs if blob.kind == TENSOR and not blob.name.startswith("draft/")]
    for number, blob in enumerate(tensors, 1):
        file = f"tensor-{number:05d}.safetensors"
        (folder / file).symlink_to(blob.path.absolute())
        try:
            names = list(read_safetensors(blob.path))
        except ModelError as error:
            raise ModelError(
                f"the tensor {blob.name} is damaged: {error.what}",
                where=where,
                remedy=f"`ollama pull` fetches it again, or make the model again: {blob.path}",
            ) from None
        if any(name.endswith(_GLOBAL_SCALE) for name in names):
            raise ModelError(
                f"{blob.name} is quantized with a scale for the whole tensor, as NVIDIA's tools "
                "do, which is not read here",
                where=where,
                remedy="take the original model that was quantized; model.quantize = 4 quantizes "
                "that one for training",
            )
        weight_map |= dict.fromkeys(in_mlx(names).values(), file)
        packings |= dict(_packings(names, read_metadata(blob.path), where))
    write_json(folder / INDEX, {"weight_map": weight_map})
    config = _config(folder / "config.json", where)
    if packings and not config.get("quantization"):
        config["quantization"] = _together(packings.values()) | {
            module: how for module, how in packings.items() if how != _together(packings.values())
        }
    write_json(folder / "config.json", config)


def _packings(
    names: Iterable[str], metadata: dict[str, str], where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each quantized layer of a file, and how it is quantized, in MLX's words."""
    for name in names:
        if not name.endswith(SCALE):
            continue
        weight = name.removesuffix(".scale")
        kind = metadata.get(f"{weight}.quant_type") or metadata.get("quant_type") or "none"
        if kind.lower() not in _TYPES:
            raise ModelError(
                f"{weight} is quantized as {kind}, which is not read here",
                where=where,
                remedy=f"readable: {', '.join(_TYPES)}",
            )
        bits, mode, usual = _TYPES[kind.lower()]
        size = str(metadata.get(f"{weight}.group_size") or metadata.get("group_size") or usual)
        if not size.isdecimal() or int(size) == 0:
            raise ModelError(
                f"{weight} is quantized in groups of {size!r} weights",
                where=where,
                remedy="its file is damaged: pull or make the model again",
            )
        how = {"group_size": int(size), "bits": bits, "mode": mode}
        yield weight.removesuffix(".weight"), how


def _together(packings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The way in which most layers are quantized."""
    [(most, _)] = Counter(tuple(how.items()) for how in packings).most_common(1)
    return dict(most)


def _config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (ValueError, AssertionError):
        raise ModelError("its config.json is damaged", where=where) from None
    return config
