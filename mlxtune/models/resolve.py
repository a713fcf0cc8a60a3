"""From what a recipe calls a model to a folder or file on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlxtune.errors import ModelError
from mlxtune.install import pip_install
from mlxtune.models.ollama_store import find_model

# What PEFT, mlx-lm and we keep beside an adapter's weights.
ADAPTER = "adapter_config.json"

# What a model consists of. No *.py and no pickles: nothing of a model is ever executed.
_WEIGHTS = "*.safetensors"
_ALL_ELSE = ("*.json", "tokenizer.model", "*.txt", "*.jinja")

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        name: as the recipe says it.
        path: a folder with config.json and safetensors, or a GGUF file, which in Ollama's
            store has no suffix.
    """

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether this is a GGUF file rather than a folder."""
        return self.path.is_file()


def resolve_model(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find a model: a folder, a `.gguf` file, `pkg:PACKAGE/FILE`, `ollama:NAME`, or a hub id.

    A hub id is downloaded on first use; with HF_HUB_OFFLINE set only the local cache is
    looked at.

    Args:
        name: what the recipe's `model.path` says; `~` is expanded.
        revision: branch, tag or commit of a hub id.
        weights: whether a hub id's weights are fetched too, which may be many gigabytes.

    Raises:
        ModelError: nothing is found there.
    """
    path = Path(name).expanduser()
    if revision is not None and (name.startswith(("pkg:", "ollama:")) or path.exists()):
        raise ModelError(
            "only models of the hub have revisions; this one is on this machine",
            where="model.revision",
            remedy="leave it out",
        )
    if name.startswith("pkg:"):
        return ModelSource(name, _in_package(name))
    if name.startswith("ollama:"):
        return ModelSource(name, find_model(name.removeprefix("ollama:")))
    if path.is_dir():
        _require_config(path)
        return ModelSource(name, path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError("there is no such file", where=name, remedy=_where_hint(path))
        return ModelSource(name, path)
    if path.is_file():
        raise ModelError(
            "a model is a folder, a .gguf file or a hub id; this is another file", where=name
        )
    if is_hub_id(name):
        return ModelSource(name, _from_hub(name, revision, weights))
    raise ModelError(
        "there is no such folder, and this is no hub id either",
        where=name,
        remedy="a hub id has the form OWNER/NAME; " + _where_hint(path),
    )


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here has the form of a model of the hub."""
    local = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    return not local and _HUB_ID.match(name) is not None and not name.lower().endswith(".gguf")


def public_name(name: str) -> str:
    """A model's name without the folders above it, which are nobody's business."""
    named = name.startswith(("pkg:", "ollama:")) or is_hub_id(name)
    return name if named else Path(name).name


def _where_hint(path: Path) -> str:
    return f"looked in {path.expanduser().absolute().parent}"


def _require_config(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if (path / ADAPTER).is_file():
        base = base_of_adapter(path)
        raise ModelError(
            "this folder holds an adapter, not a model",
            where=str(path),
            remedy=f"name the model that it goes on{f', {base},' if base else ''} as model.path, "
            "and this folder as lora.init_from to train it further",
        )
    if (path / "run.json").is_file() or (path / "adapter").is_dir():
        remedy = "this is a run: `mlxtune fuse` makes a model of it"
    else:
        remedy = "point to the folder that holds config.json and *.safetensors"
    raise ModelError("this folder has no config.json", where=str(path), remedy=remedy)


def base_of_adapter(folder: Path) -> str | None:
    """The model that an adapter of PEFT's, mlx-lm's or ours says it goes on; None if it does not.

    Args:
        folder: holds its `adapter_config.json`.
    """
    try:
        said = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base = said.get("base_model_name_or_path") or said.get("model")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) else None


def _in_package(name: str) -> Path:
    """`pkg:PACKAGE/FILE`: a file inside an installed package, which is not imported."""
    package, _, file = name.removeprefix("pkg:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the package {package!r} is not installed",
            where=name,
            remedy=pip_install("--no-deps", package.replace("_", "-")),
        )
    path = Path(spec.origin).parent / file
    if not file or not path.is_file():
        inside = sorted(p.name for p in path.parent.glob("*.gguf"))
        raise ModelError(
            f"the package {package!r} has no file {file!r}",
            where=name,
            remedy=f"it has: {', '.join(inside)}" if inside else None,
        )
    return path


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    # Importing the hub's client costs a tenth of a second; only hub ids need it.
    from huggingface_hub import snapshot_download

    patterns = [*_ALL_ELSE, *([_WEIGHTS] if weights else [])]
    with hub_errors(name, revision):
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    _require_config(path)
    if weights and not any(path.glob(_WEIGHTS)):
        raise ModelError(
            "this model has no safetensors",
            where=name,
            remedy="take another revision or a converted copy of it; pickles are not loaded",
        )
    return path


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Say in words why the hub did not give what was asked for.

    Raises:
        ModelError: the model is not there, not to be had without more, or out of reach.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise ModelError(
            "this model asks you to accept its licence first",
            where=name,
            remedy=f"accept it at https://huggingface.co/{name}, then `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            "there is no such folder here and no such model on the hub",
            where=name,
            remedy="check the spelling; private models need `hf auth login`",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"this model has no revision {revision!r}", where=name) from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "")
        raise ModelError(
            "this model is not in the local cache, and the hub "
            + ("was not asked (HF_HUB_OFFLINE is set)" if offline else "cannot be reached"),
            where=name,
            remedy="connect once to download it, or give a folder, a .gguf file or "
            "pkg:PACKAGE/FILE as model.path",
        ) from None
    except EntryNotFoundError:
        raise ModelError("this model has no config.json on the hub", where=name) from None
    except OSError as error:
        raise ModelError(f"the hub cannot be reached: {error}", where=name) from None
