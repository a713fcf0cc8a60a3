"""What llama.cpp calls things, one table entry for each architecture.

An entry holds for both directions: it names the metadata that config.json becomes, the
tensors, and the projections whose rows are reordered. Facts are those of llama.cpp's
converter and model loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.errors import ExportError, ModelError

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How one family of models is written in GGUF.

    Attributes:
        name: llama.cpp's name, the prefix of its metadata keys.
        model_types: the `model_type`s of config.json that it serves; the first is the
            one that a GGUF without further hints is read as.
        hf_class: the entry in `architectures` of config.json when reading.
        rotary_interleaved: llama.cpp rotates adjacent pairs for this architecture, so
            rows of q and k are reordered from the half-split order of HF.
        vocab_size: whether the metadata carries the vocabulary's size.
        rope_dimension: whether it carries the number of rotated dimensions.
    """

    name: str
    model_types: tuple[str, ...]
    hf_class: str
    rotary_interleaved: bool = False
    vocab_size: bool = False
    rope_dimension: bool = False


ARCHITECTURES = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        hf_class="LlamaForCausalLM",
        rotary_interleaved=True,
        vocab_size=True,
        rope_dimension=True,
    ),
)

# HF module to GGUF tensor; `{}` is the number of the block.
GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK_NAMES_BACK = {gguf: hf for hf, gguf in BLOCK_NAMES.items()}
_GLOBAL_NAMES_BACK = {gguf: hf for hf, gguf in GLOBAL_NAMES.items()}


def for_config(config: Config) -> Architecture:
    """The entry that serves a config.json.

    Raises:
        ExportError: no entry serves its model type.
    """
    model_type = config.get("model_type")
    for entry in ARCHITECTURES:
        if model_type in entry.model_types:
            return entry
    known = sorted(t for entry in ARCHITECTURES for t in entry.model_types)
    raise ExportError(
        f"models of type {model_type!r} cannot be written as GGUF yet",
        remedy=f"supported: {', '.join(known)}; `mlxtune fuse` writes any model as safetensors",
    )


def for_gguf(name: str) -> Architecture:
    """The entry called `name` in GGUF.

    Raises:
        ModelError: there is none.
    """
    for entry in ARCHITECTURES:
        if entry.name == name:
            return entry
    raise ModelError(
        f"GGUF files of architecture {name!r} cannot be read yet",
        remedy=f"supported: {', '.join(entry.name for entry in ARCHITECTURES)}; "
        "use the model's safetensors folder or hub id",
    )


def to_gguf_name(hf_name: str) -> str | None:
    """`model.layers.3.mlp.up_proj.weight` to `blk.3.ffn_up.weight`; None if unknown."""
    module, _, kind = hf_name.rpartition(".")
    if module in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[module]}.{kind}"
    if module.startswith("model.layers."):
        number, _, rest = module.removeprefix("model.layers.").partition(".")
        if rest in BLOCK_NAMES:
            return f"blk.{number}.{BLOCK_NAMES[rest]}.{kind}"
    return None


def to_hf_name(gguf_name: str) -> str | None:
    """The inverse of `to_gguf_name`."""
    module, _, kind = gguf_name.rpartition(".")
    if module in _GLOBAL_NAMES_BACK:
        return f"{_GLOBAL_NAMES_BACK[module]}.{kind}"
    if module.startswith("blk."):
        number, _, rest = module.removeprefix("blk.").partition(".")
        if rest in _BLOCK_NAMES_BACK:
            return f"model.layers.{number}.{_BLOCK_NAMES_BACK[rest]}.{kind}"
    return None


def metadata(entry: Architecture, config: Config) -> dict[str, int | float]:
    """Metadata keys of `entry` from a config.json.

    Raises:
        ExportError: the config lacks a size, or scales its rotation in a way not
            written yet.
    """
    for key in ("rope_scaling", "rope_parameters"):  # its older and its newer name
        scaling = config.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ExportError(
                f"rope scaling of type {kind!r} cannot be written as GGUF yet",
                where=f"config.json: {key}",
            )
    try:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        values: dict[str, int | float] = {
            "block_count": config["num_hidden_layers"],
            "context_length": config.get("max_position_embeddings", 2048),
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": config.get("num_key_value_heads") or heads,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "rope.freq_base": float(rope_theta(config)),
        }
        if config.get("head_dim"):
            values["attention.key_length"] = head_dim
            values["attention.value_length"] = head_dim
        if entry.rope_dimension:
            values["rope.dimension_count"] = head_dim
        if entry.vocab_size:
            values["vocab_size"] = config["vocab_size"]
    except KeyError as error:
        raise ExportError(f"the model's config has no {error}", where="config.json") from None
    return {f"{entry.name}.{key}": value for key, value in values.items()}


def rope_theta(config: Config) -> float:
    """Base of the rotary frequencies; newer configs keep it in `rope_parameters`."""
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta", parameters.get("rope_theta", 10000.0)))


def config_from_metadata(entry: Architecture, meta: dict[str, Any], *, tied: bool) -> Config:
    """A config.json from GGUF metadata.

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
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"the GGUF's metadata says that {entry.name}.{key} is {value!r}")
        return value

    scaling = meta.get(f"{entry.name}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(
            f"GGUF files with rope scaling of type {scaling!r} cannot be read yet",
            remedy="use the model's safetensors folder or hub id",
        )
    heads, hidden = count("attention.head_count"), count("embedding_length")
    tokens = meta.get("tokenizer.ggml.tokens", ())
    return {
        "model_type": entry.model_types[0],
        "architectures": [entry.hf_class],
        "hidden_size": hidden,
        "num_hidden_layers": count("block_count"),
        "intermediate_size": count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": count("attention.key_length", hidden // heads),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "vocab_size": count("vocab_size", len(tokens)),
        "max_position_embeddings": get("context_length"),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def interleave_rows(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of q or k from HF's half-split rotary order to GGUF's adjacent pairs.

    Args:
        rows: (heads * head_dim, ...).
        heads: attention heads, or key-value heads for k.
    """
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def deinterleave_rows(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The inverse of `interleave_rows`."""
    return (
        rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def rotary_heads(entry: Architecture, hf_name: str, config: Config) -> int | None:
    """How many heads' rows of this tensor are reordered; None when none are."""
    if not entry.rotary_interleaved:
        return None
    module = hf_name.rpartition(".")[0]
    heads = int(config["num_attention_heads"])
    if module.endswith("self_attn.q_proj"):
        return heads
    if module.endswith("self_attn.k_proj"):
        return int(config.get("num_key_value_heads") or heads)
    return None


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
