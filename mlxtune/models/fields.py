"""A config with every field that readers of its kind of model look for.

A GGUF says what is needed to compute. The config.json of a published model has more: fields with
their usual values, and fields that nothing uses, which strict readers such as candle ask for all
the same. What they are is known to transformers' own config class of the model's type.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

# What transformers notes of itself, the one name under which version 5 keeps all of the rotation
# (those that all readers know are there already), and ids of tokens, which the tokenizer decides.
_ITS_OWN = re.compile(r"transformers_version|rope_parameters|_.*|.*_token_id")


def with_all_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the fields that transformers' class of its type would write beside it.

    Args:
        config: of a model, with all that decides what it computes.

    Returns:
        A copy in which no value is another; the config itself where transformers does not know
        the type of model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        written = kind(**config).to_diff_dict()
    except Exception:  # a type that is newer than transformers, or sizes that it refuses
        return config
    usual = inspect.signature(kind.__init__).parameters
    missing = {k: v for k, v in written.items() if k not in config and not _ITS_OWN.fullmatch(k)}
    for key, value in missing.items():
        # Null says that a window is not used, and so does `use_sliding_window`: then published
        # configs have a number here, and strict readers want one.
        if value is None and f"use_{key}" in written and key in usual:
            missing[key] = usual[key].default
    # A window that the model's file does not speak of is none.
    if "use_sliding_window" not in written:
        missing.pop("sliding_window", None)
    return config | {key: value for key, value in missing.items() if value is not None}
