"""Models in Ollama's own store, found without Ollama.

A store has `manifests/<host>/<namespace>/<model>/<tag>`, JSON in the form of an OCI image
manifest, and `blobs/sha256-<hex>`. A model is one GGUF file, the layer of type
`application/vnd.ollama.image.model`, or, for Ollama's MLX engine, a layer for each tensor and
for each JSON file (see `ollama_tensors.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mlxtune.errors import ModelError
from mlxtune.models.ollama_tensors import JSON, TENSOR, Blob, as_folder

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
# No part begins with a dot, so none leads out of the store.
_PART = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_HOST_PART = re.compile(r"\w[\w.-]{0,127}(:\d{1,5})?", re.ASCII)


@dataclass(frozen=True)
class ModelName:
    """What Ollama calls a model: `[host/][namespace/]model[:tag]`."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Folders and file of its manifest."""
        return self.host, self.namespace, self.model, self.tag

    def __str__(self) -> str:
        text = f"{self.model}:{self.tag}"
        if self.host != _HOST:
            return f"{self.host}/{self.namespace}/{text}"
        return text if self.namespace == _NAMESPACE else f"{self.namespace}/{text}"


def parse_name(text: str) -> ModelName | None:
    """A name with what it leaves out filled in; None if Ollama takes no such name."""
    *before, last = text.split("/")
    model, colon, tag = last.partition(":")
    if len(before) > 2 or (colon and not tag):
        return None
    host, namespace = [_HOST, _NAMESPACE][: 2 - len(before)] + before
    name = ModelName(host, namespace, model, tag or _TAG)
    if not _HOST_PART.fullmatch(host) or "." in namespace:
        return None
    return name if all(_PART.fullmatch(part) for part in name.parts[1:]) else None


def stores() -> tuple[Path, ...]:
    """Where Ollama keeps models: `$OLLAMA_MODELS`, else the user's and the service's place."""
    if named := os.environ.get("OLLAMA_MODELS", "").strip("\"' "):
        return (Path(named).expanduser(),)
    return (
        Path.home() / ".ollama/models",
        Path("/usr/share/ollama/.ollama/models"),
    )


def find_model(text: str, *, among: Sequence[Path] | None = None) -> Path:
    """The GGUF file of a model that Ollama has, or a folder of one for its MLX engine.

    Args:
        text: `[host/][namespace/]model[:tag]`, as `ollama list` shows it.
        among: stores to look in; `stores()` by default.

    Returns:
        A file in the store's `blobs`, whose name has no suffix; or a folder in the cache, whose
        weights are links into the store.

    Raises:
        ModelError: there is no store, no such model in one, or it is damaged or of a kind
            that is not read.
        StorageError: the folder cannot be written.
    """
    where = f"ollama:{text}"
    name = parse_name(text)
    if name is None:
        raise ModelError(
            "this is no name of a model in Ollama",
            where=where,
            remedy="it has the form ollama:MODEL, ollama:MODEL:TAG or ollama:NAMESPACE/MODEL:TAG",
        )
    places = stores() if among is None else among
    present = [place for place in places if (place / "manifests").is_dir()]
    if not present:
        raise ModelError(
            "Ollama has no store of models here",
            where=where,
            remedy=f"looked in {', '.join(map(str, places))}; OLLAMA_MODELS names another place",
        )
    for store in present:
        if (manifest := _manifest(store, name)) is not None:
            return _model(store, manifest, where)
    raise ModelError("Ollama has no such model", where=where, remedy=_names_near(present, name))


def has_model(name: str) -> bool:
    """Whether a store on this machine has a model of this name."""
    parsed = parse_name(name)
    return parsed is not None and any(_manifest(store, parsed) for store in stores())


def _manifest(store: Path, name: ModelName) -> Path | None:
    """The file of a name, which Ollama takes in capitals or not."""
    exact = store.joinpath("manifests", *name.parts)
    if exact.is_file():
        return exact
    wanted = [part.casefold() for part in name.parts]
    for path in _manifests(store):
        if [part.casefold() for part in path.parts[-4:]] == wanted:
            return path
    return None


def _manifests(store: Path) -> Iterable[Path]:
    return (path for path in sorted((store / "manifests").glob("*/*/*/*")) if path.is_file())


def _names_near(present: Sequence[Path], name: ModelName) -> str:
    known = {str(ModelName(*path.parts[-4:])) for store in present for path in _manifests(store)}
    near = get_close_matches(str(name), known, n=5, cutoff=0.5) or sorted(known)[:5]
    if not near:
        return f"it has none; `ollama pull {name}` gets it"
    return f"it has {', '.join(near)}; `ollama pull {name}` gets what is not there"


@dataclass(frozen=True)
class _Layer:
    """Of a manifest: what it is, its blob, its name, and the model that it was taken from."""

    kind: str
    digest: str
    name: str
    origin: str


def _model(store: Path, manifest: Path, where: str) -> Path:
    layers = _layers(manifest, where)
    kinds = [layer.kind for layer in layers]
    if "adapter" in kinds:
        origin = next((layer.origin for layer in layers if layer.origin), "")
        base = parse_name(origin)
        raise ModelError(
            "this model is one in Ollama with an adapter on it, which would be left out",
            where=where,
            remedy=f"name the model that it was made from{f': ollama:{base}' if base else ''}",
        )
    if TENSOR in kinds:
        blobs = [
            Blob(layer.kind, layer.name, _blob(store, manifest, layer, where))
            for layer in layers
            if layer.kind in (TENSOR, JSON)
        ]
        return as_folder(blobs, where)
    models = [layer for layer in layers if layer.kind == "model"]
    if len(models) != 1:
        held = f"{len(models)} GGUF files" if models else "neither a GGUF file nor tensors"
        raise ModelError(
            f"this model consists of {held}",
            where=where,
            remedy="models of one GGUF file, or of tensors, are read out of Ollama's store",
        )
    return _blob(store, manifest, models[0], where)


def _blob(store: Path, manifest: Path, layer: _Layer, where: str) -> Path:
    found = _DIGEST.fullmatch(layer.digest)
    if found is None:
        raise _damaged(manifest, f"the digest {layer.digest[:80]!r} is none", where)
    blob = store / "blobs" / f"sha256-{found[1]}"
    if not blob.is_file():
        raise _damaged(manifest, f"there is no {blob}", where)
    return blob


def _layers(manifest: Path, where: str) -> list[_Layer]:
    try:
        value: Any = json.loads(manifest.read_bytes())
        return [
            _Layer(
                str(layer["mediaType"]).removeprefix(_LAYER),
                str(layer["digest"]),
                str(layer.get("name") or ""),
                str(layer.get("from") or ""),
            )
            for layer in value["layers"]
        ]
    except OSError as error:
        raise ModelError(
            f"Ollama's manifest cannot be read: {error.strerror or error}", where=where
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(manifest, f"{type(error).__name__}: {error}", where) from None


def _damaged(manifest: Path, how: str, where: str) -> ModelError:
    return ModelError(
        f"Ollama's manifest of this model is damaged: {how}",
        where=where,
        remedy=f"`ollama pull` writes it anew: {manifest}",
    )
