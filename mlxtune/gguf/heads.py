"""Heads whose rows GGUF keeps in another order than mlx-lm does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlxtune.gguf.architectures import Architecture, Config
from mlxtune.gguf.metadata import head_dim

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Reordering:
    """Equal parts of a tensor's rows, in another order.

    Attributes:
        order: which part of mlx-lm's comes to each place in GGUF, (parts,).
    """

    order: npt.NDArray[np.intp]

    def to_gguf(self, values: Array) -> Array:
        """Values or packed bytes of rows, (rows, ...)."""
        return self._taken(values, self.order)

    def to_hf(self, values: Array) -> Array:
        """The inverse of `to_gguf`."""
        return self._taken(values, np.argsort(self.order))

    def _taken(self, values: Array, order: npt.NDArray[np.intp]) -> Array:
        parts = values.reshape(len(order), -1, *values.shape[1:])
        return parts[order].reshape(values.shape)


def reordering(entry: Architecture, hf_name: str, config: Config) -> Reordering | None:
    """What is done to a tensor's rows; None where they stay as they are."""
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
    rows = np.arange(heads * dims).reshape(heads, 2, dims // 2)
    return Reordering(rows.swapaxes(1, 2).reshape(-1))
