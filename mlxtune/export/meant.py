"""Whether two configs are of one model: by what mlx-lm builds of each.

A GGUF says in its metadata what a model computes beside its weights. Its config, read back,
is compared with the source's by the layers that mlx-lm makes of both: their sizes, bases and
frequencies of rotation, windows, caps and epsilons. So nothing that wrote the metadata has a
say in whether it is right, and a value may be written in several ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.errors import ModelError
from mlxtune.gguf.architectures import COMMON, Architecture, Config
from mlxtune.models.skeleton import built

# What a language model is called inside of one that sees.
_INSIDE = "language_model"
# What says nothing of what a layer computes.
_IDLE = {"model_type", "_training", "_no_grad"}
_WINDOWS = {"sliding_window", "window_size"}

Facts = dict[str, Any]


def unlike(want: Config, got: Config, entry: Architecture | None = None) -> str | None:
    """How the model of one config differs from that of another, in words; None if it does not.

    Args:
        want: of the source.
        got: of what was written, read back.
        entry: of both, for sizes that GGUF has and mlx-lm makes no use of.
    """
    try:
        wanted, found = _facts(want), _facts(got)
    except ModelError:  # mlx-lm does not know it, and llama.cpp may all the same
        return None
    shared = (*COMMON, *entry.fields) if entry else ()
    for key in (field.config for field in shared):
        if want.get(key) and key in got:
            wanted[f"config.{key}"], found[f"config.{key}"] = want[key], got[key]
    for name, value in wanted.items():
        if name not in found or _same(value, found[name]):
            continue
        if isinstance(value, mx.array):
            return f"{name} has other values than in its source"
        return f"{name} is {found[name]!r} there, and {value!r} in its source"
    return None


def _facts(config: Config) -> Facts:
    """What the layers of a model are, by path and name."""
    longest = int(config.get("max_position_embeddings") or 2048)
    found: Facts = {}
    for path, module in built(config).named_modules():
        place = path.removeprefix(_INSIDE).removeprefix(".")
        if place:
            found[place] = type(module).__name__
        for name, value in _values(module):
            # A window as long as the context is none.
            wide = name in _WINDOWS and isinstance(value, int) and value >= longest
            found[f"{place}.{name}".removeprefix(".")] = None if wide else value
    return found


def _values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers of a layer, and arrays that are none of its parameters."""
    for name, value in vars(module).items():
        if name not in _IDLE and isinstance(value, int | float | str | tuple | None):
            yield name, value
    for name, value in module.items():
        if name.startswith("_") and isinstance(value, mx.array):
            yield name, value


def _same(want: Any, got: Any) -> bool:
    if isinstance(want, mx.array) and isinstance(got, mx.array):
        return want.shape == got.shape and bool(mx.allclose(want, got, rtol=1e-5))
    if isinstance(want, float) or isinstance(got, float):
        numbers = isinstance(want, int | float) and isinstance(got, int | float)
        return numbers and math.isclose(want, got, rel_tol=1e-5)
    return bool(want == got)
