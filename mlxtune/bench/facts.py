"""What is known of a model before its weights are here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from mlxtune.errors import ModelError
from mlxtune.gguf.model import read_packing
from mlxtune.gguf.reader import GGUFFile
from mlxtune.models.known import known_config
from mlxtune.models.load import model_config
from mlxtune.models.resolve import ModelSource, hub_errors, is_hub_id, resolve_model
from mlxtune.models.skeleton import Config, Forms
from mlxtune.recipe.schema import Recipe


@dataclass(frozen=True)
class ModelFacts:
    """What a plan knows of a model.

    Attributes:
        config: what config.json says.
        forms: how a GGUF packs it; None for a folder or a hub id.
        source: the model on this machine, if it is here, for its tokenizer.
        origin: where the config is from, in words.
    """

    config: Config
    forms: Forms | None
    source: ModelSource | None
    origin: str


def model_facts(recipe: Recipe) -> ModelFacts:
    """What there is to know of a recipe's model without its weights.

    Of a hub id nothing but config.json is fetched, and that not where mlxtune knows the sizes.

    Raises:
        ModelError: nothing is known of it.
    """
    name, revision = recipe.model.path, recipe.model.revision
    if not is_hub_id(name):
        source = resolve_model(name, revision=revision)
        if source.is_gguf:
            forms = read_packing(GGUFFile(source.path))
            return ModelFacts(model_config(source), forms, source, str(source.path))
        return ModelFacts(_config(source), None, source, str(source.path))
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        source = ModelSource(name, Path(cached).parent)
        tokenizer = source if (source.path / "tokenizer.json").is_file() else None
        return ModelFacts(_config(source), None, tokenizer, f"{name}, in the hub's cache")
    # Before the hub is asked: it may be far away, or want a licence accepted.
    if revision is None and (config := known_config(name)) is not None:
        return ModelFacts(config, None, None, f"{name}, sizes known to mlxtune")
    with hub_errors(name, revision):
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    source = ModelSource(name, Path(file).parent)
    return ModelFacts(_config(source), None, None, f"{name}, from the hub")


def _config(source: ModelSource) -> Config:
    """config.json of a folder.

    Raises:
        ModelError: it is none.
    """
    path = source.path / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"this is no readable config: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(found), "a number")
        raise ModelError(f"a config is an object with a model's sizes, not {kind}", where=str(path))
    if not isinstance(found.get("model_type"), str):
        raise ModelError("it does not say which architecture it is: model_type", where=str(path))
    return model_config(source)
