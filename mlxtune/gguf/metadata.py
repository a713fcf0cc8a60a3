"""Sizes of a model in GGUF's metadata, from config.json and back; rotation aside (`rope`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count as counted
from typing import Any

from gguf.constants import TokenType

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf.architectures import COMMON, Architecture, Config
from mlxtune.gguf.reader import shortest

# Layers of the largest model of either family, which scales scores by another size.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
_ENDS_OF_TURN = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>"}
_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)
# Where there is this, `<|end|>` ends one message of an answer that goes on.
_RETURN = "<|return|>"


def text_config(config: Config) -> Config:
    """The language model's part of a config.json that speaks of images too."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    kept = {key: value for key, value in config.items() if not key.endswith("_config")}
    whole = {k: config[k] for k in ("quantization_config", "eos_token_id") if config.get(k)}
    return kept | text | whole | {"model_type": config["model_type"]}


def metadata(entry: Architecture, config: Config) -> dict[str, Any]:
    """Metadata keys of `entry` from a config.json.

    Rotation is among them only where the architecture says it in a way of its own; of all
    others `gguf.rope` says it.

    Raises:
        ExportError: the config lacks a size, or asks for what llama.cpp does not do.
    """
    _refuse_unlike(entry, config)
    values: dict[str, Any] = {}
    for shared in (*COMMON, *entry.fields):
        value = config.get(shared.config)
        if value is None:
            value = shared.default
        if value is None:
            raise ExportError(f"the model's config has no {shared.config!r}", where="config.json")
        if values.setdefault(shared.key, shared.kind(value)) != value:
            raise ExportError(
                f"llama.cpp has one {shared.key} for {entry.name} models; this one has "
                f"{values[shared.key]} and {value}",
                where=f"config.json: {shared.config}",
            )
    heads = int(values["attention.head_count"])
    values["attention.head_count_kv"] = int(config.get("num_key_value_heads") or heads)
    if entry.own_head_dim and config.get("head_dim"):
        values["attention.key_length"] = int(config["head_dim"])
        values["attention.value_length"] = int(config["head_dim"])
    if "ssm.state_size" in values:
        values["ssm.inner_size"] = values["ssm.time_step_rank"] * values["ssm.state_size"]
    if entry.own:
        values |= entry.own.metadata(config)
    return {f"{entry.name}.{key}": value for key, value in values.items()}


def mistral_window(entry: Architecture, config: Config, name: str) -> dict[str, int]:
    """How far back a Mistral looks, by which mistral.rs knows it among other llamas.

    Without that it loads no file whose name begins so, and takes the width of heads for
    that of a Llama. llama.cpp pays no heed to it. A window as long as the context is none.

    Args:
        entry: of the model.
        config: as in config.json.
        name: `general.name`.
    """
    called = re.match(r"[\W_]*mistral(?![a-z0-9])", name, re.IGNORECASE)
    if entry.name != "llama" or not (called or config.get("model_type") == "mistral"):
        return {}
    window = config.get("sliding_window") or config.get("max_position_embeddings") or 2048
    return {"llama.attention.sliding_window": int(window)}


def head_dim(entry: Architecture, config: Config) -> int:
    """Width of one attention head."""
    if entry.own_head_dim and config.get("head_dim"):
        return int(config["head_dim"])
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _refuse_unlike(entry: Architecture, config: Config) -> None:
    """llama.cpp computes some things in one way whatever the config says."""
    for key, wanted in entry.fixed.items():
        if config.get(key, wanted) != wanted:
            raise ExportError(
                f"llama.cpp computes {entry.name} models with {key} = {wanted!r} only; "
                f"this one has {config[key]!r}",
                where=f"config.json: {key}",
            )
    layers = int(config.get("num_hidden_layers", 0))
    for key, wanted in entry.per_layer(layers).items():
        if list(config.get(key) or wanted) != wanted:
            raise ExportError(
                f"llama.cpp takes the {key} of {entry.name} models to be {wanted}; this one "
                f"has {config[key]}",
                where=f"config.json: {key}",
            )
    scalar, largest = config.get("query_pre_attn_scalar"), _LARGEST_GEMMA.get(entry.name)
    if scalar is not None and largest:
        own = int(config["hidden_size"]) // int(config["num_attention_heads"])
        wanted = own if layers == largest else head_dim(entry, config)
        if scalar != wanted:
            raise ExportError(
                f"llama.cpp scales the scores of this model by 1/√{wanted}, not 1/√{scalar:g}",
                where="config.json: query_pre_attn_scalar",
            )


def config_from_metadata(entry: Architecture, meta: dict[str, Any], *, tied: bool) -> Config:
    """A config.json from GGUF metadata, rotation aside (`gguf.rope`).

    Raises:
        ModelError: a size is missing.
    """

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{entry.name}.{key}", default)
        if value is None:
            raise ModelError(f"the GGUF's metadata has no {entry.name}.{key}")
        return value

    def count(key: str, default: Any = None) -> int:
        value = get(key, default)
        if entry.own and isinstance(value, Sequence) and value:
            value = value[0]  # of the first block; `own` says it of the others
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"the GGUF's metadata says that {entry.name}.{key} is {value!r}")
        return value

    tokens = meta.get("tokenizer.ggml.tokens", ())
    ends, begin = end_tokens(meta), meta.get("tokenizer.ggml.bos_token_id")
    config: Config = {
        "model_type": entry.model_types[0],
        "architectures": [entry.hf_class],
        "vocab_size": count("vocab_size", len(tokens)),
        "tie_word_embeddings": tied,
        "bos_token_id": begin if is_token(begin, len(tokens)) else None,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    for shared in (*COMMON, *entry.fields):
        if shared.config in config:
            continue
        if shared.kind is float:
            config[shared.config] = shortest(get(shared.key, shared.default))
        elif shared.default is not None:
            # A window of 0 is none, which transformers takes for one that shows nothing.
            config[shared.config] = int(get(shared.key, shared.default)) or None
        else:
            config[shared.config] = count(shared.key)
    config["num_hidden_layers"] -= predicting_blocks(entry, meta)
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = count("attention.head_count_kv", heads)
    if entry.own_head_dim:
        config["head_dim"] = count("attention.key_length", config["hidden_size"] // heads)
    if entry.name == "llama" and (window := get("attention.sliding_window", 0)):
        config["sliding_window"] = int(window)  # see `mistral_window`
    if largest := _LARGEST_GEMMA.get(entry.name):
        own = config["hidden_size"] // heads
        at_largest = config["num_hidden_layers"] == largest
        config["query_pre_attn_scalar"] = own if at_largest else config["head_dim"]
    return config | dict(entry.fixed)


def end_tokens(meta: dict[str, Any]) -> list[int]:
    """Ids at which llama.cpp ends an answer: of a text, a turn or a message, in that order.

    Where a file does not say what ends a turn, that is a mark with a usual text.
    """
    tokens = meta.get("tokenizer.ggml.tokens", ())
    said = [meta.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    if said[1] is None and _RETURN not in tokens:
        types = meta.get("tokenizer.ggml.token_type", ())
        marks = zip(counted(), tokens, types, strict=False)
        said[1] = next((n for n, t, k in marks if t in _ENDS_OF_TURN and k in _SPECIAL), None)
    return list(dict.fromkeys(n for n in said if n is not None and is_token(n, len(tokens))))


def is_token(number: Any, count: int) -> bool:
    """Whether a value is the id of one of `count` tokens; for none some files have 2³² - 1."""
    return type(number) is int and 0 <= number < count


def predicting_blocks(entry: Architecture, meta: dict[str, Any]) -> int:
    """How many blocks behind the last of a GGUF predict further tokens (MTP).

    Raises:
        ModelError: not even one is left before them.
    """
    count = meta.get(f"{entry.name}.nextn_predict_layers", 0)
    if type(count) is not int or not 0 <= count < meta[f"{entry.name}.block_count"]:
        raise ModelError(
            f"the GGUF's metadata says that {entry.name}.nextn_predict_layers is {count!r}"
        )
    return count
