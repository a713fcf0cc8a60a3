"""The circumstances of a run: versions, device, and hashes of all that it was made of."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlxtune
from mlxtune.data.render import Renderer
from mlxtune.data.sources import HUB
from mlxtune.device import device_name
from mlxtune.errors import RunError
from mlxtune.files import sha256
from mlxtune.models.resolve import ModelSource
from mlxtune.models.weights import weight_files
from mlxtune.recipe.schema import Recipe
from mlxtune.train.corpus import held_out_source, source_of
from mlxtune.train.distributed import Workers
from mlxtune.train.run import adapter_folder

_ADAPTER_FILES = "adapter*.safetensors"


def facts_of(
    recipe: Recipe, source: ModelSource, renderer: Renderer, workers: Workers
) -> dict[str, Any]:
    """What run.json says of the circumstances."""
    sources = [source_of(section) for section in recipe.data]
    if (held_out := held_out_source(recipe)) is not None:
        sources.append(held_out)
    files = [file for s in sources for file in s.files()]
    if recipe.model.chat_template is not None:
        files.append(Path(recipe.model.chat_template))
    if recipe.lora.init_from is not None:
        # When a run goes on from a checkpoint, what it began with may be gone.
        files += adapter_folder(Path(recipe.lora.init_from)).glob(_ADAPTER_FILES)
    return {
        "versions": {
            "mlxtune": mlxtune.__version__,
            "mlx": _version("mlx"),
            "mlx-lm": _version("mlx-lm"),
        },
        "device": device_name(),
        "workers": workers.size,
        "seed": recipe.seed,
        "hashes": {
            "model": _fingerprint(source),
            "tokenizer": hashlib.sha256(renderer.identity().encode()).hexdigest(),
            **{str(path): sha256(path) for path in files},
            **{s.name: s.fingerprint() for s in sources if s.path.startswith(HUB)},
        },
    }


def shared_facts(facts: dict[str, Any]) -> dict[str, str]:
    """What all workers need to have alike, wherever it lies on their disks."""
    model, tokenizer, *data = facts["hashes"].values()
    return {
        "versions of mlxtune, MLX and mlx-lm": str(facts["versions"]),
        "model": model,
        "tokenizer": tokenizer,
        "data": " ".join(data),
    }


def _fingerprint(source: ModelSource) -> str:
    """SHA-256 of a GGUF, or of a folder's config and samples of its weights.

    Hashing tens of gigabytes at each start would take longer than loading them; up to one
    gigabyte of each file all is read.
    """
    if source.is_gguf:
        return sha256(source.path)
    files = weight_files(source.path)
    weights = ",".join(f"{file.name}:{_sampled(file)}" for file in files)
    return f"{sha256(source.path / 'config.json')} {weights}"


_ALL = 1 << 30


def _sampled(path: Path, blocks: int = 64, size: int = 4096) -> str:
    """SHA-256 of a file's length and of blocks from all over it, its header among them."""
    length = path.stat().st_size
    if length <= _ALL:
        return sha256(path)
    found = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek(max(0, length - size) * number // (blocks - 1))
            found.update(file.read(size))
    return found.hexdigest()


def require_same(status: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Refuse to go on where a run was begun in other circumstances.

    Args:
        status: what run.json says.
        facts: from `facts_of`, of now.

    Returns:
        What has changed that may change the last bits of what comes.

    Raises:
        RunError: something has changed; it is named.
    """
    if (before := status.get("workers", 1)) != facts["workers"]:
        raise RunError(
            f"the run was begun with {before} workers, and there are {facts['workers']} now: its "
            "steps would not be what they were",
            remedy=f"go on with {before}, or start anew with --overwrite",
        )
    then, now = status.get("hashes", {}), facts["hashes"]
    # What a run began with is no longer needed, and may be gone.
    gone = [name for name in then.keys() - now.keys() if not is_adapter_file(name)]
    for name in [*(n for n in now if then.get(n) != now[n]), *sorted(gone)]:
        what = "is no longer there" if name in gone else "has changed"
        raise RunError(
            f"{name} {what} since the run began, so it cannot go on as it would have",
            remedy="put it back as it was, or start anew with --overwrite",
        )
    then, now = ({"device": s.get("device")} | s.get("versions", {}) for s in (status, facts))
    return [
        f"begun with {name} {then.get(name)}, goes on with {now[name]}: losses may differ in "
        "their last digits"
        for name in now
        if then.get(name) != now[name]
    ]


def is_adapter_file(name: str) -> bool:
    """Whether a file is one of an adapter's weights."""
    return fnmatch(Path(name).name, _ADAPTER_FILES)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
