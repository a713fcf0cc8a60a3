"""What config.json of a few hub models says: plans need neither a download nor a licence."""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib import resources
from typing import Any


def known_config(hub_id: str) -> dict[str, Any] | None:
    """The part of a hub model's config.json that mlx-lm reads; None of a model not known here.

    Each is from the document that `_source` names in configs.json, or agrees with it.

    Args:
        hub_id: such as `Qwen/Qwen3-0.6B`, as the hub writes it.
    """
    found = _configs().get(hub_id)
    if found is None:
        return None
    return {key: copy.deepcopy(value) for key, value in found.items() if key[0] != "_"}


@cache
def _configs() -> dict[str, dict[str, Any]]:
    text = (resources.files("mlxtune.models") / "configs.json").read_text(encoding="utf-8")
    configs: dict[str, dict[str, Any]] = json.loads(text)
    return configs
