"""A config with every field that readers of its kind of model look for.

A GGUF says what is needed to compute. The config.json of a published model has more: fields with
their usual values, and fields that nothing uses, which strict readers such as candle ask for all
the same. What they are is known to transformers' own config class of the model's type.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

# What transformers notes of itself, ids of tokens, which the tokenizer decides, and what its
# version 5 tells another way than all readers know, who find it there already: the rotation, and
# the layers that are of other sizes.
_ITS_OWN = re.compile(
    r"transformers_version|rope_parameters|per_layer_config|_.*|.*_config|.*_token_id"
)


def with_all_fields(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The config of a model as it would be published.

    The config of a GGUF gets the fields that transformers' class of its type would write beside
    it. None is added that is a config itself, and none to a config that has one: a model that
    sees keeps the sizes of its language model there, and mlx-lm takes these for the model's
    wherever they are. A GGUF holds the language model alone, so its fields are those of that.

    Args:
        config: of a model, with all that decides what it computes.
        source: the folder or file that the model was read from; what a folder says stays as
            it is.

    Returns:
        A copy in which no value is another, or the config itself.
    """
    if not source.is_file() or isinstance(config.get("text_config"), dict):
        return config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        kind = kind.sub_configs.get("text_config", kind)
        # It changes what it is given: a rotation learns its base.
        written = kind(**copy.deepcopy(config)).to_diff_dict()
    except Exception:  # a type that is newer than transformers, or sizes that it refuses
        return config
    usual = inspect.signature(kind.__init__).parameters
    missing = {k: v for k, v in written.items() if k not in config and not _ITS_OWN.fullmatch(k)}
    for key, value in missing.items():
        # Null says that a window is not used, and so does `use_sliding_window`: then published
        # configs have a number here, and strict readers want one.
        if value is None and f"use_{key}" in written and key in usual:
            missing[key] = usual[key].default
    return config | {key: value for key, value in missing.items() if value is not None}
