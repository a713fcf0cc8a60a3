"""A model's layers without its weights: every array is zeros that are never computed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxtune.errors import ModelError
from mlxtune.gguf.unpack import GROUP_SIZE
from mlxtune.models.load import model_classes

Config = dict[str, Any]
# Path of a layer to the bits and the type of scales in which a GGUF holds it.
Forms = dict[str, tuple[int, Any]]

_TINY = 16


def skeleton(config: Config, dtype: mx.Dtype, forms: Forms | None = None) -> nn.Module:
    """The mlx-lm model of a config, packed as the config says.

    Args:
        config: what config.json says.
        dtype: of its float weights.
        forms: how a GGUF packs it, from `read_packing`.

    Raises:
        ModelError: mlx-lm does not know the architecture, or a size is missing.
    """
    model = built(config)
    packed = config.get("quantization") or config.get("quantization_config")
    if forms:
        options = {p: {"group_size": GROUP_SIZE, "bits": b} for p, (b, _) in forms.items()}
        nn.quantize(model, class_predicate=lambda path, _: options.get(path, False))
    elif isinstance(packed, dict) and "bits" in packed and "group_size" in packed:
        common = {k: packed[k] for k in ("group_size", "bits", "mode") if k in packed}

        def chosen(path: str, layer: nn.Module) -> bool | dict[str, Any]:
            own = packed.get(path)
            return own if own is not None else hasattr(layer, "to_quantized")

        nn.quantize(model, **common, class_predicate=chosen)
    hollow(model, dtype)
    for path, (_, scales) in (forms or {}).items():
        if scales == np.float32:
            _widen(model, path)
    return model


def tiny_twin(config: Config) -> nn.Module:
    """A small model of the same architecture, random and in float32, to try what it can do.

    It has as many blocks as show every kind that the config names.

    Raises:
        ModelError: none can be made.
    """
    has_head_dim = any(field.name == "head_dim" for field in fields(model_classes(config)[1]))
    try:
        model = built(_small(config, has_head_dim))
    except ModelError:  # an architecture whose blocks take turns, of four mostly
        model = built(_small(config, has_head_dim, least=4))
    mx.eval(model.parameters())
    return model


def _small(config: Config, has_head_dim: bool, least: int = 2) -> Config:
    """A config with small sizes; of a model that also sees, its language model's.

    Args:
        config: of a model.
        has_head_dim: whether it takes `head_dim`.
        least: blocks.
    """
    config = dict(config)
    if "num_hidden_layers" not in config and isinstance(config.get("text_config"), dict):
        return config | {"text_config": _small(config["text_config"], False, least)}
    heads = int(config.get("num_attention_heads", 1))
    blocks = int(config["num_hidden_layers"])
    pattern = config.get("sliding_window_pattern") or config.get("no_rope_layer_interval")
    kinds = config.get("layer_types") or []
    shown = (kinds.index(kind) + 1 for kind in kinds)
    count = min(blocks, max(least, int(pattern or least), *shown))
    turns = 2 if config.get("num_kv_shared_layers") else 1  # the second has the first's keys
    for key, value in config.items():
        if isinstance(value, list) and len(value) == blocks:
            config[key] = turns * value[:count]
    if has_head_dim or "head_dim" in config:
        config["head_dim"] = _TINY
    small = {
        "num_hidden_layers": turns * count,
        "num_kv_shared_layers": (turns - 1) * count,
        "hidden_size": heads * _TINY,
        "intermediate_size": 2 * _TINY,
        "moe_intermediate_size": 2 * _TINY,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 4 * _TINY,
        "vocab_size_per_layer_input": 4 * _TINY,
        "rope_scaling": None,
    }
    return config | {key: value for key, value in small.items() if key in config}


def hollow(model: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Put zeros that are never computed in the place of all arrays; floats of type `dtype`."""

    def zeros(array: Any) -> Any:
        if not isinstance(array, mx.array):
            return array
        wanted = dtype if dtype and mx.issubdtype(array.dtype, mx.floating) else array.dtype
        return mx.zeros(array.shape, wanted)

    model.update(tree_map(zeros, model.parameters()))


def _widen(model: nn.Module, path: str) -> None:
    """Scales and biases of a packed layer in float32."""
    layer: Any = dict(model.named_modules())[path]
    for name in ("scales", "biases"):
        layer[name] = mx.zeros(layer[name].shape, mx.float32)


def built(config: Config) -> nn.Module:
    """The mlx-lm model of a config, its random weights never computed unless asked for.

    Raises:
        ModelError: as `skeleton`.
    """
    try:
        model_class, args_class = model_classes(config)
        model = model_class(args_class.from_dict(config))
    except ModelError:
        raise
    except Exception as error:  # whatever is missing from a config
        raise ModelError(
            f"no model can be made of this config: {type(error).__name__}: {error}",
            where="config.json",
            remedy="a size may be missing, such as hidden_size or num_hidden_layers",
        ) from None
    with suppress(Exception):  # whatever it makes of having none
        # Where a model learns from its weights that its head is tied.
        getattr(model, "sanitize", dict)({})
    return model
