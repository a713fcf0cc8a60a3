"""What is trained for: one file an objective, each a function of per-token quantities."""

from __future__ import annotations

from collections.abc import Mapping

from mlxtune.objectives.base import Objective
from mlxtune.objectives.dpo import DPO
from mlxtune.objectives.sft import SFT
from mlxtune.recipe.schema import Recipe

__all__ = ["DPO", "SFT", "Objective", "meanings_of", "objective_of"]


_OF_TABLES = {"dpo": DPO}


def meanings_of(name: str) -> Mapping[str, str]:
    """What the figures of an objective say; nothing of one that is not known here."""
    return _OF_TABLES[name].meanings if name in _OF_TABLES else {}


def objective_of(recipe: Recipe) -> Objective:
    """The objective of a recipe, with the settings of its table."""
    table = getattr(recipe, recipe.objective, None)
    return SFT() if table is None else _OF_TABLES[recipe.objective](table)
