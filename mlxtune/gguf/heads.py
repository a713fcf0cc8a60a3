"""Rows and columns of heads that GGUF keeps in another order than mlx-lm does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.gguf.architectures import Architecture, Config
from mlxtune.gguf.metadata import head_dim

Array = npt.NDArray[Any]
Order = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Reordering:
    """Equal parts of a tensor's rows or columns, in another order.

    Attributes:
        parts: how many.
        order: gives which part of mlx-lm's comes to each place in GGUF, (parts,). Only a
            tensor that has so many is a reason to believe the sizes that a file states.
        axis: 0 for rows, -1 for columns.
    """

    parts: int
    order: Callable[[], Order]
    axis: int = 0

    def to_gguf(self, values: Array) -> Array:
        """Values (rows, ...) or (..., columns), or what they are packed into.

        Raises:
            ValueError: they do not divide into the parts.
        """
        return self._taken(values, self.order)

    def to_hf(self, values: Array) -> Array:
        """The inverse of `to_gguf`."""
        return self._taken(values, lambda: np.argsort(self.order()))

    def _taken(self, values: Array, order: Callable[[], Order]) -> Array:
        if not self.parts or values.shape[self.axis] % self.parts:
            raise ValueError(f"its shape {values.shape} has not {self.parts} equal parts")
        if self.axis == 0:
            parts = values.reshape(self.parts, -1, *values.shape[1:])
            return parts[order()].reshape(values.shape)
        parts = values.reshape(*values.shape[:-1], self.parts, -1)
        return parts[..., order(), :].reshape(values.shape)


def reordering(entry: Architecture, hf_name: str, config: Config) -> Reordering | None:
    """What is done to a tensor's rows or columns; None where they stay as they are."""
    if entry.tiled_values and ".linear_attn." in hf_name:
        return _of_linear_attention(hf_name.partition(".linear_attn.")[2], config)
    module = hf_name.rpartition(".")[0]
    heads = int(config["num_attention_heads"])
    if entry.rotary_interleaved and module.endswith("self_attn.q_proj"):
        return adjacent_pairs(heads, head_dim(entry, config))
    if entry.rotary_interleaved and module.endswith("self_attn.k_proj"):
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return adjacent_pairs(kv_heads, head_dim(entry, config))
    return None


def adjacent_pairs(heads: int, dims: int) -> Reordering:
    """From HF's half-split rotary order to GGUF's adjacent pairs.

    Args:
        heads: attention heads, or key-value heads for k.
        dims: of a head.
    """
    rows = heads * dims
    return Reordering(
        rows, lambda: np.arange(rows).reshape(heads, 2, dims // 2).swapaxes(1, 2).reshape(-1)
    )


_LIKE_VALUES = ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")


def _of_linear_attention(parameter: str, config: Config) -> Reordering | None:
    keys, values = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    module = parameter.partition(".")[0]
    if keys == values:
        return None
    if module in ("in_proj_qkv", "conv1d"):
        return tiled(keys, values, before=2 * keys)
    if module in _LIKE_VALUES:
        return tiled(keys, values)
    return tiled(keys, values, axis=-1) if module == "out_proj" else None


def tiled(keys: int, values: int, *, before: int = 0, axis: int = 0) -> Reordering:
    """Value heads by their number within a key head first, then by the key head.

    Args:
        keys: key heads; `values / keys` neighbours share one in HF's order.
        values: value heads.
        before: heads of the same width in front of them, which stay.
        axis: on which they lie.
    """

    def order() -> Order:
        heads = before + np.arange(values).reshape(keys, values // keys).T
        return np.concatenate([np.arange(before), heads.reshape(-1)])

    return Reordering(before + values, order, axis)
