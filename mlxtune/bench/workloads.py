"""Training workloads made from the sizes of known models: no download, random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtune.bench.cost import Rates
from mlxtune.bench.depth import StepEstimator, StepTotals
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.step import Measured, StepModel
from mlxtune.data.pack import Batch, pack
from mlxtune.device import on_cpu
from mlxtune.errors import ModelError
from mlxtune.models.known import known_config
from mlxtune.recipe.load import parse_recipe

# Requests and answers of a few dozen tokens; a row of running text.
SHORT = (100, 80, 60, 120, 90, 70, 150, 40)
LONG = (1024,)


@dataclass(frozen=True)
class Workload:
    """Steps of one kind.

    Attributes:
        name: for people.
        model: hub id of which the sizes are taken.
        lengths: of a step's samples, in tokens.
        recipe: sections of the recipe that are not the default.
    """

    name: str
    model: str
    lengths: tuple[int, ...]
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return sum(self.lengths)


_CHECKPOINTING = {"train": {"gradient_checkpointing": True}}
WORKLOADS = (
    Workload("SmolLM2-135M, 8 pairs", "HuggingFaceTB/SmolLM2-135M-Instruct", SHORT),
    Workload("SmolLM2-135M, 1,024 tokens", "HuggingFaceTB/SmolLM2-135M-Instruct", LONG),
    Workload("Qwen3-0.6B, 8 pairs", "Qwen/Qwen3-0.6B", SHORT),
    Workload("Llama-3.2-1B, 8 pairs", "meta-llama/Llama-3.2-1B-Instruct", SHORT),
    Workload(
        "Llama-3.2-3B, 1,024 tokens", "meta-llama/Llama-3.2-3B-Instruct", LONG, _CHECKPOINTING
    ),
    Workload("Mistral-7B, 4 bits, 8 pairs", "mlx-community/Mistral-7B-Instruct-v0.3-4bit", SHORT),
    Workload(
        "Mistral-7B, 4 bits, 1,024 tokens",
        "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
        LONG,
        _CHECKPOINTING,
    ),
)


class Bench:
    """A workload on the device at hand, or on one that is assumed (`as_on_gpu`).

    Args:
        workload: one of `WORKLOADS`, or another.
        rates: for estimates of its time.

    Raises:
        ModelError: the sizes of its model are not known here.
    """

    def __init__(self, workload: Workload, rates: Rates | None = None) -> None:
        config = known_config(workload.model)
        if config is None:
            raise ModelError("the sizes of this model are not known here", where=workload.model)
        self.workload = workload
        self._config = config
        values: dict[str, Any] = {
            "name": "bench",
            "model": {"path": workload.model},
            "data": [{"path": "random"}],
        }
        self._recipe = parse_recipe(values | workload.recipe, where=workload.name)
        self._dtype = "float32" if on_cpu() else "bfloat16"
        self._estimator = StepEstimator(self._recipe, config, None, self._dtype, rates)
        self._all_twice = self._recipe.train.gradient_checkpointing is True
        self.batch: Batch = pack(samples_of(workload.lengths))

    def planned(self) -> StepTotals:
        """What a step takes, as planned."""
        return self._estimator.step(self.batch, self._estimator.blocks * self._all_twice)

    def seconds_at(self, rates: Sequence[Rates]) -> list[float]:
        """What a step takes at each of these rates."""
        return self._estimator.seconds_at(
            self.batch, rates, self._estimator.blocks * self._all_twice
        )

    def needed_flops(self) -> float:
        """Of products, when nothing is computed twice."""
        return self._estimator.step(self.batch).flops

    def measured(self, *, steps: int = 4) -> Measured:
        """What a step takes, with random weights."""
        model = StepModel(self._recipe, self._config, None, self._dtype)
        model.materialize()
        return model.measure(self.batch, range(model.blocks * self._all_twice), steps=steps)
