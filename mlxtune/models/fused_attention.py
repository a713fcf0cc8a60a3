"""When MLX's own attention on Metal keeps no scores in training.

Facts of MLX 0.32.4's `scaled_dot_product_attention`, read off its wheel for macOS: with a causal
mask or none it has a backward pass that keeps queries, keys, values and one number a query, for
some widths of heads. A mask that is an array makes it keep all scores. Attention sinks (gpt-oss)
end with "NYI: attention sinks" in the backward pass.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Widths of heads that the kernels exist for.
WIDTHS = {64, 72, 80, 96, 128, 192, 256}
# Makes MLX differentiate attention step by step, in which sinks are known.
_STEP_BY_STEP = "MLX_SDPA_VJP_FALLBACK"


def keeps_no_scores(config: dict[str, Any]) -> bool:
    """Whether training on rows of one sample each keeps no scores on Metal.

    Args:
        config: of the model, as in config.json.
    """
    text = config.get("text_config")
    config = config | text if isinstance(text, dict) else config
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim")
    if width is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        width = hidden // heads
    return width in WIDTHS


def prepare_backward(model: nn.Module) -> None:
    """Have MLX differentiate a model with attention sinks in the way that works on Metal."""
    if mx.metal.is_available() and any("sinks" in module for module in model.modules()):
        os.environ.setdefault(_STEP_BY_STEP, "1")
