"""What a step takes, from models with a few of the blocks.

Blocks are alike, or alike in a pattern that repeats, so what a step takes grows by the same
for each: two shallow models say what a deep one takes, and are traced in a fraction of the
time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from mlxtune.bench.cost import Rates, cost_of, flops_of
from mlxtune.bench.memory import peak_memory
from mlxtune.bench.step import Sizes, StepModel
from mlxtune.data.pack import Batch
from mlxtune.errors import ModelError, NoPlan
from mlxtune.models.skeleton import Config, Forms, built
from mlxtune.recipe.schema import Recipe
from mlxtune.train.step import batch_arrays

_LEAST, _MORE = 4, 2


@dataclass(frozen=True)
class StepTotals:
    """What a step on one pass takes.

    Attributes:
        peak: most bytes that exist at one time where memory is plenty.
        seconds: None where no rates are known.
        flops: operations of its products.
        find_least: what `least` is found by.
    """

    peak: float
    seconds: float | None
    flops: float
    find_least: Callable[[], float]

    @cached_property
    def least(self) -> float:
        """The peak where memory is scarce, and MLX waits before it lays out more.

        Found when it is asked for: where memory is plenty nobody does.
        """
        return self.find_least()

    def peak_within(self, limit: float) -> int:
        """Bytes at most if MLX is to stay within `limit`."""
        return round(self.peak if self.peak <= limit else min(self.peak, max(self.least, limit)))


class StepEstimator:
    """Estimates steps of a recipe's model.

    Args:
        recipe: checked.
        config: of the model.
        forms: how a GGUF packs it.
        dtype: that it computes in.
        rates: of the device, for seconds.

    Attributes:
        blocks: of the model.
        packing, sizes, trainable: as of `StepModel`.

    Raises:
        ModelError, TargetError: as `StepModel`.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: Config,
        forms: Forms | None,
        dtype: str,
        rates: Rates | None = None,
    ) -> None:
        self._rates = rates
        self.blocks = _block_count(config)
        depths = _depths(config) if recipe.lora.layers is None else (self.blocks,)
        self._models = [
            StepModel(recipe, shallow(config, depth), _of_blocks(forms, depth), dtype)
            for depth in depths
        ]
        self._depths = depths
        self.packing = self._models[0].packing
        each = [(m.sizes.weights, m.sizes.adapters, m.sizes.optimizer) for m in self._models]
        kinds = zip(*each, strict=True)
        self.sizes = Sizes(*(round(self._at_full_depth(values)) for values in kinds))
        self.trainable = round(self._at_full_depth([m.trainable for m in self._models]))
        self._known: dict[Hashable, StepTotals] = {}

    def step(self, batch: Batch, checkpointed: int = 0) -> StepTotals:
        """A step on one pass.

        Args:
            batch: only its shapes matter.
            checkpointed: how many blocks are computed twice.
        """
        none, every = 0, self.blocks
        if len(self._models) == 1 or checkpointed in (none, every):
            key = (_shapes(batch), checkpointed)
            if key not in self._known:
                self._known[key] = self._at_end(batch, checkpointed)
            return self._known[key]
        # What each block saves is alike.
        share = checkpointed / every
        ends = [self.step(batch, none), self.step(batch, every)]
        return _combined(ends, lambda values: values[0] + share * (values[1] - values[0]))

    def _at_end(self, batch: Batch, checkpointed: int) -> StepTotals:
        if len(self._models) == 1:
            return self._traced(self._models[0], batch, checkpointed)
        each = [self._traced(m, batch, m.blocks if checkpointed else 0) for m in self._models]
        return _combined(each, self._at_full_depth)

    def seconds_at(self, batch: Batch, each: Sequence[Rates], checkpointed: int = 0) -> list[float]:
        """Seconds of a step at the rates of several devices; all or no blocks computed twice."""
        graphs = [
            model.graph(batch, range(model.blocks if checkpointed else 0)) for model in self._models
        ]
        return [
            self._at_full_depth([cost_of(graph, rates).seconds for graph in graphs])
            for rates in each
        ]

    def _traced(self, model: StepModel, batch: Batch, checkpointed: int) -> StepTotals:
        graph = model.graph(batch, range(checkpointed))
        seconds = None if self._rates is None else cost_of(graph, self._rates).seconds
        least = partial(peak_memory, graph, 0)
        return StepTotals(peak_memory(graph), seconds, flops_of(graph), least)

    def _at_full_depth(self, values: Sequence[float]) -> float:
        """The straight line through what holds at two depths, at the model's own."""
        if len(values) == 1:
            return values[0]
        (few, more), (least, most) = self._depths, values
        return least + (most - least) * (self.blocks - few) / (more - few)


def _shapes(batch: Batch) -> Hashable:
    """All of a batch that its step's graph hangs on."""
    arrays = batch_arrays(batch)
    return (
        batch.groups,
        batch.prefix,
        batch.packed,
        tuple((name, a.shape) for name, a in arrays.items()),
    )


def _combined(each: Sequence[StepTotals], line: Callable[[Sequence[float]], float]) -> StepTotals:
    """Each figure by itself."""
    seconds = [total.seconds for total in each if total.seconds is not None]
    return StepTotals(
        line([total.peak for total in each]),
        line(seconds) if seconds else None,
        line([total.flops for total in each]),
        lambda: line([total.least for total in each]),
    )


def _depths(config: Config) -> tuple[int, ...]:
    """How many blocks to build: all of them, or two smaller numbers of whole patterns."""
    count, counted = _block_count(config), _counted(config)
    # The last blocks of some have the keys of earlier ones: the first few are no such model.
    if counted is None or counted.get("num_kv_shared_layers"):
        return (count,)
    period = _period(counted)
    few = -(-_LEAST // period) * period
    more = few + -(-_MORE // period) * period
    return (few, more) if more < count else (count,)


def _counted(config: Config) -> Config | None:
    """The part of a config that counts blocks: of a model that also sees, its language model's.

    None where its architecture has another name for them.
    """
    if "num_hidden_layers" in config:
        return config
    text = config.get("text_config")
    return text if isinstance(text, dict) and "num_hidden_layers" in text else None


def _block_count(config: Config) -> int:
    count = (_counted(config) or {}).get("num_hidden_layers")
    if isinstance(count, int) and count > 0:
        return count
    if count is not None:
        raise ModelError(
            f"it says that the model has {count!r} blocks",
            where="config.json",
            remedy="num_hidden_layers is to be a whole number above 0",
        )
    try:  # an architecture that has its own name for it
        return len(built(config).layers)
    except Exception:  # a model that has no such list
        raise NoPlan(
            "it does not say how many blocks the model has",
            where="config.json",
            remedy="num_hidden_layers is missing",
        ) from None


def _period(config: Config) -> int:
    """After how many blocks the architecture repeats."""
    count = int(config["num_hidden_layers"])
    patterns = [v for v in config.values() if isinstance(v, list) and len(v) == count]
    named = [config.get(k) for k in ("sliding_window_pattern", "no_rope_layer_interval")]
    periods = [int(value) for value in named if isinstance(value, int) and value > 0]
    for pattern in patterns:
        fitting = (
            n
            for n in range(1, count + 1)
            if all(a == b for a, b in zip(pattern, pattern[n:], strict=False))
        )
        periods.append(next(fitting))
    return min(count, math.lcm(*periods)) if periods else 1


def shallow(config: Config, depth: int) -> Config:
    """The config of a model with the first so many blocks."""
    counted = _counted(config)
    if counted is None:
        return config
    if counted is not config:
        return config | {"text_config": shallow(counted, depth)}
    count = config["num_hidden_layers"]
    fewer = {
        key: value[:depth] if isinstance(value, list) and len(value) == count else value
        for key, value in config.items()
    }
    return fewer | {"num_hidden_layers": depth}


def _of_blocks(forms: Forms | None, depth: int) -> Forms | None:
    """The forms of what a model with the first so many blocks has."""
    if forms is None:
        return None

    def there(path: str) -> bool:
        number = re.search(r"\.layers\.(\d+)\.", path)
        return number is None or int(number[1]) < depth

    return {path: form for path, form in forms.items() if there(path)}
