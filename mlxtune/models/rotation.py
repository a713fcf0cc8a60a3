"""Rotary positions in config.json: what transformers 5 writes, as mlx-lm reads it."""

from __future__ import annotations

from typing import Any

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
