"""Rotary positions: the config that transformers 5 writes, and what batches need of mlx-lm."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

_FULL, _SLIDING = "full_attention", "sliding_attention"


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config in which `rope_parameters` is told again by the keys that came before it.

    transformers 5 keeps the rotation there, and for Gemma 3 once for each type of layer.
    Of most architectures mlx-lm reads `rope_theta` and `rope_scaling` alone, and takes its
    own defaults where there are none: a model that rotates otherwise than it learned to.

    Args:
        config: as in config.json, parts that are configs themselves included.

    Returns:
        A copy; keys that are there already stay as they are.
    """
    config = dict(config)
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = with_older_keys(text)
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return config
    said: dict[str, Any] = {}
    if _FULL in parameters:
        # Others that tell layers apart are read in this form by mlx-lm itself.
        if not str(config.get("model_type")).startswith("gemma3"):
            return config
        said["rope_local_base_freq"] = (parameters.get(_SLIDING) or {}).get("rope_theta")
        parameters = parameters[_FULL]
    said["rope_theta"] = parameters.get("rope_theta")
    said["partial_rotary_factor"] = parameters.get("partial_rotary_factor")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        said["rope_scaling"] = {"type": kind} | parameters
    new = {k: v for k, v in said.items() if v is not None and config.get(k) is None}
    return config | new


class DynamicRope(nn.Module):
    """Dynamic NTK scaling that takes a position for each entry of a batch.

    Up to the length that a model was trained for it turns like any rotary embedding, beyond
    it slower the longer a text is. mlx-lm's own takes no more than one position. Where there
    are several, the longest text of a batch decides for all, as in transformers
    (`dynamic_rope_update`).

    Args:
        inner: mlx-lm's, of which the sizes are taken.
    """

    def __init__(self, inner: DynamicNTKScalingRoPE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dims: int = inner.dims
        self.base: float = inner.base
        self.factor: float = inner.factor
        self.traditional: bool = inner.traditional
        self.max_position_embeddings: int = inner.max_position_embeddings

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Rotate (batch, heads, length, dim), whose first tokens stand at `offset`."""
        if isinstance(offset, int):
            base = self._base(max(x.shape[-2] + offset, self.max_position_embeddings))
            return self._turned(x, offset, base=base)
        longest = mx.maximum(x.shape[-2] + offset.max(), self.max_position_embeddings)
        base = self._base(longest.astype(mx.float32))
        exponents = mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
        return self._turned(x, offset, freqs=mx.power(base, exponents))

    def _base(self, longest: Any) -> Any:
        """Of the rotation of a text of this many tokens."""
        stretch = self.factor * longest / self.max_position_embeddings - (self.factor - 1)
        return self.base * stretch ** (self.dims / (self.dims - 2))

    def _turned(
        self,
        x: mx.array,
        offset: int | mx.array,
        *,
        base: float | None = None,
        freqs: mx.array | None = None,
    ) -> mx.array:
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=base,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )


def take_positions(model: nn.Module) -> None:
    """Give a model rotary embeddings that take a position for each entry of a batch.

    Those of mlx-lm that do already stay as they are.
    """
    for module in model.modules():
        for name, part in module.children().items():
            if isinstance(part, DynamicNTKScalingRoPE):
                setattr(module, name, DynamicRope(part))
