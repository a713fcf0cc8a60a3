"""What is trained for: one file an objective, each a function of per-token quantities."""

from __future__ import annotations

from mlxtune.objectives.base import Objective
from mlxtune.objectives.dpo import DPO
from mlxtune.objectives.sft import SFT
from mlxtune.recipe.schema import Recipe

__all__ = ["DPO", "SFT", "Objective", "objective_of"]


_OF_TABLES = {"dpo": DPO}


def objective_of(recipe: Recipe) -> Objective:
    """The objective of a recipe, with the settings of its table."""
    table = getattr(recipe, recipe.objective, None)
    return SFT() if table is None else _OF_TABLES[recipe.objective](table)
