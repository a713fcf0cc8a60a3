"""A model's layers without its weights: every array is zeros that are never computed."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxtune.errors import ModelError
from mlxtune.gguf.unpack import GROUP_SIZE
from mlxtune.models.heads import language_model
from mlxtune.models.load import model_classes
from mlxtune.models.rotation import take_positions

Config = dict[str, Any]
# Path of a layer to the bits and the type of scales in which a GGUF holds it.
Forms = dict[str, tuple[int, Any]]

# What of a block is compared: its class, its switches and its parts.
Kind = tuple[type, frozenset[Any], frozenset[Any]]

_TINY = 16
# Keys of a config that say how positions turn, and how far a token looks back: a few tokens
# show what a window of two does.
_ROTATIONS = ("rope_scaling", "rope_parameters")
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
)
_WINDOW = 2


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

    It has as many blocks as show every kind that the model has, and the model's rotation and
    windows at small sizes: what a twin does not have is not tried.

    Raises:
        ModelError: none can be made.
    """
    has_head_dim = any(field.name == "head_dim" for field in fields(model_classes(config)[1]))
    kinds = block_kinds(built(config))
    # Those that have the keys of earlier ones come by themselves (`_small`).
    shared = int(config.get("text_config", config).get("num_kv_shared_layers") or 0)
    least = max(2, _blocks_to_show(kinds[: len(kinds) - shared]))
    try:
        model = built(_small(config, has_head_dim, least))
    except ModelError:  # an architecture whose blocks take turns, of four mostly
        model = built(_small(config, has_head_dim, max(4, least)))
    if not set(kinds) <= set(block_kinds(model)):
        raise ModelError("no small model has every kind of its blocks", where="config.json")
    _stir(model)
    mx.eval(model.parameters())
    return model


def block_kinds(model: nn.Module) -> list[Kind]:
    """What each block of a model is built of; blocks alike but for sizes are of one kind."""
    return [_kind(block) for block in model.layers]


def _kind(module: nn.Module) -> Kind:
    """The class of a module, its switches, and the same of its parts."""
    switches = {
        name: value if isinstance(value, str | None) else bool(value)
        for name, value in vars(module).items()
        if isinstance(value, str | int | float | None)
    }
    parts: dict[str, Any] = {}
    for name, part in module.children().items():
        leaves: Any = tree_flatten(part, is_leaf=lambda leaf: isinstance(leaf, nn.Module))
        parts[name] = frozenset(_kind(leaf) for _, leaf in leaves if isinstance(leaf, nn.Module))
    return type(module), frozenset(switches.items()), frozenset(parts.items())


def _blocks_to_show(kinds: list[Kind]) -> int:
    """The first of them are of every kind that there is."""
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)


def _stir(model: nn.Module) -> None:
    """Noise on all weights: one that is zero at first would hide what it has an effect on."""

    def stirred(array: Any) -> Any:
        if not isinstance(array, mx.array) or not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array + 0.1 * mx.random.normal(array.shape).astype(array.dtype)

    model.update(tree_map(stirred, model.parameters()))


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
    before = config.get("head_dim") or max(1, int(config.get("hidden_size", 0)) // heads)
    for key in _ROTATIONS:
        if isinstance(config.get(key), dict):
            config[key] = _small_rotation(config[key], _TINY / before)
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
    }
    small |= {key: _WINDOW for key in _WINDOWS if isinstance(config.get(key), int)}
    return config | {key: value for key, value in small.items() if key in config}


def _small_rotation(scaling: dict[str, Any], share: float) -> dict[str, Any]:
    """A rotation of fewer dimensions, such a share of them: factors of each are as few."""
    small: dict[str, Any] = {}
    for key, value in scaling.items():
        if isinstance(value, dict):  # of one of several kinds of blocks
            small[key] = _small_rotation(value, share)
        elif isinstance(value, list) and key.endswith("_factor"):
            small[key] = value[: max(1, round(share * len(value)))]
        else:
            small[key] = value
    return small


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
        model = model_class(args_class.from_dict(copy.deepcopy(config)))  # some change theirs
    except ModelError:
        raise
    except Exception as error:  # whatever is missing from a config
        raise ModelError(
            f"no model can be made of this config: {type(error).__name__}: {error}",
            where="config.json",
            remedy="a size may be missing, such as hidden_size or num_hidden_layers",
        ) from None
    take_positions(model)
    for part in (model, language_model(model)):
        with suppress(Exception):  # whatever it makes of having none
            # Where a model learns from its weights that its head is tied.
            getattr(part, "sanitize", dict)({})
    return model
