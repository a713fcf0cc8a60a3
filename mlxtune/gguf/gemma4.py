"""Gemma 4's sizes in GGUF, both ways: much of it differs from block to block.

Every few blocks attention looks at everything, through wider heads of their own number,
with a slower rotation of the first quarter of a head's pairs; the last blocks take keys and
values from earlier ones and have a wider MLP. Facts are those of llama.cpp's converter and
model loader (https://github.com/ggml-org/llama.cpp, MIT); config.json is as transformers and
mlx-lm read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf.reader import GGUFFile, shortest

Config = dict[str, Any]
Factors = npt.NDArray[np.float32]

_FULL, _SLIDING = "full_attention", "sliding_attention"
# llama.cpp divides the angle of a pair that is not rotated by this.
_NOT_ROTATED = 1e30
_FACTORS = "rope_freqs.weight"


def metadata(config: Config) -> dict[str, Any]:
    """Keys behind `gemma4.` that other architectures lack or have one value for.

    Raises:
        ExportError: the config lacks a size, or asks for what is not written.
    """
    layers = int(_get(config, "num_hidden_layers"))
    sliding = [kind == _SLIDING for kind in _get(config, "layer_types")]
    if len(sliding) != layers:
        raise ExportError(
            f"the config has {layers} layers and {len(sliding)} types of them",
            where="config.json: layer_types",
        )
    full_dims = int(config.get("global_head_dim") or _get(config, "head_dim"))
    dims = int(_get(config, "head_dim"))
    shared = int(config.get("num_kv_shared_layers") or 0)
    if shared and sliding[: layers - shared][-2:] != [True, False]:
        raise ExportError(
            "llama.cpp takes the keys and values of shared blocks from the last two that have "
            "their own, the first of which looks through a window and the second at everything; "
            "this model's are otherwise",
            where="config.json: num_kv_shared_layers",
        )
    rope = _get(config, "rope_parameters")
    full, local = rope[_FULL], rope[_SLIDING]
    if full.get("rope_type") != "proportional" or full.get("factor", 1.0) != 1.0:
        raise ExportError(
            "llama.cpp rotates full attention of gemma4 models proportionally only",
            where="config.json: rope_parameters.full_attention",
        )
    values: dict[str, Any] = {
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared,
        "attention.key_length": full_dims,
        "attention.value_length": full_dims,
        "attention.key_length_swa": dims,
        "attention.value_length_swa": dims,
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
        "rope.freq_base": float(full["rope_theta"]),
        "rope.freq_base_swa": float(local["rope_theta"]),
        "rope.dimension_count": full_dims,
        "rope.dimension_count_swa": int(dims * local.get("partial_rotary_factor", 1.0)),
    }
    if config.get("use_double_wide_mlp") and shared:
        width = int(_get(config, "intermediate_size"))
        wide = [width * (1 + (layer >= layers - shared)) for layer in range(layers)]
        values["feed_forward_length"] = wide
    if cap := config.get("final_logit_softcapping", 30.0):
        values["final_logit_softcapping"] = float(cap)
    words = int(_get(config, "vocab_size"))
    if values["embedding_length_per_layer_input"] and words != int(
        config.get("vocab_size_per_layer_input", words)
    ):
        raise ExportError(
            "llama.cpp has as many embeddings for every layer as for the model",
            where="config.json: vocab_size_per_layer_input",
        )
    heads = int(_get(config, "num_key_value_heads"))
    if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
        others = int(config["num_global_key_value_heads"])
        values["attention.head_count_kv"] = [heads if local else others for local in sliding]
    return values


def rope_factors(config: Config) -> Factors:
    """A divisor for each pair of full attention's heads, (global_head_dim / 2,)."""
    dims = int(config.get("global_head_dim") or config["head_dim"])
    share = config["rope_parameters"][_FULL].get("partial_rotary_factor", 1.0)
    rotated = int(dims * share) // 2
    factors = np.full(dims // 2, _NOT_ROTATED, np.float32)
    factors[:rotated] = 1.0
    return factors


def config(file: GGUFFile) -> Config:
    """What config.json says of a file's blocks and rotation.

    Raises:
        ModelError: it has experts, which are not read.
        ValueError: it speaks of another number of blocks than it has.
    """
    meta = {key.removeprefix("gemma4."): value for key, value in file.metadata.items()}
    if meta.get("expert_count"):
        raise ModelError(
            "Gemma 4 with experts cannot be read from GGUF yet",
            where=str(file.path),
            remedy="use the model's safetensors folder or hub id",
        )
    layers, shared = meta["block_count"], meta.get("attention.shared_kv_layers", 0)
    sliding = [bool(local) for local in meta["attention.sliding_window_pattern"]]
    widths = _each(meta["feed_forward_length"], len(sliding))
    heads = _each(meta["attention.head_count_kv"], len(sliding))
    if not len(sliding) == len(widths) == len(heads) == layers > shared:
        raise ValueError(f"it has {layers} blocks and says something of another number")
    full = sliding.index(False)
    full_dims, dims = meta["attention.key_length"], meta["attention.key_length_swa"]
    rotated = int((file.data(_FACTORS).reshape(-1) < _NOT_ROTATED / 2).sum())
    return {
        "vocab_size_per_layer_input": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size_per_layer_input": meta.get("embedding_length_per_layer_input", 0),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "num_key_value_heads": heads[0],
        "num_global_key_value_heads": heads[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "head_dim": dims,
        "global_head_dim": full_dims,
        "num_kv_shared_layers": shared,
        "layer_types": [_SLIDING if local else _FULL for local in sliding],
        "final_logit_softcapping": meta.get("final_logit_softcapping"),
        "rope_parameters": {
            _FULL: {
                "rope_type": "proportional",
                "rope_theta": shortest(meta.get("rope.freq_base", 1e6)),
                "partial_rotary_factor": 2 * rotated / full_dims,
            },
            _SLIDING: {
                "rope_type": "default",
                "rope_theta": shortest(meta.get("rope.freq_base_swa", 1e4)),
                "partial_rotary_factor": meta.get("rope.dimension_count_swa", dims) / dims,
            },
        },
    }


def _each(value: Any, layers: int) -> list[int]:
    return list(value) if isinstance(value, Sequence) else [value] * layers


def _get(config: Config, key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise ExportError(f"the model's config has no {key!r}", where="config.json")
    return value
