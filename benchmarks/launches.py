"""How many kernels a training step launches on a GPU, counted in its graph.

    python benchmarks/launches.py

Nothing is computed, and no GPU is needed: the step of SmolLM2-135M is traced as it is laid out
for a GPU, with adapters updated together and with each updated by itself.
"""

from __future__ import annotations

from unittest.mock import patch

from mlxtune.bench.cost import launches_of
from mlxtune.bench.graph import Graph
from mlxtune.bench.lengths import samples_of
from mlxtune.bench.step import StepModel
from mlxtune.data.pack import pack, pad
from mlxtune.device import as_on_gpu
from mlxtune.models.known import known_config
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.stacks import stacks_of

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTHS = (100, 80, 60, 120, 90, 70, 150, 40)
RECIPES = {
    "LoRA": {},
    "LoRA, padded": {"train": {"packing": False}},
    "4 bits": {"model": {"quantize": 4}},
    "NF4, 8-bit AdamW": {"model": {"quantize": "nf4"}, "train": {"optimizer": "adamw_8bit"}},
}


def graph_of(sections: dict[str, dict[str, object]]) -> Graph:
    """The graph of a step, as for a GPU in bfloat16."""
    values = {"name": "t", "data": [{"path": "t"}], **sections}
    values["model"] = {"path": "t", **sections.get("model", {})}
    with as_on_gpu():
        recipe = parse_recipe(values, where="launches")
        step = StepModel(recipe, known_config(MODEL) or {}, None, "bfloat16")
        layout = pack if recipe.train.packing else pad
        return step.graph(layout(samples_of(LENGTHS)))


def main() -> None:
    """Print a table."""
    print("| SmolLM2-135M, 8 samples | each by itself | together | operations, views too |")
    print("|---|--:|--:|--:|")
    for name, sections in RECIPES.items():
        together = graph_of(sections)
        by_itself = patch(
            "mlxtune.train.optim.stacks_of", lambda a, _: stacks_of(a, lambda _: False)
        )
        with by_itself:
            alone = graph_of(sections)
        counts = [launches_of(graph) for graph in (alone, together)]
        before, after = (f"{count:,}" for count in counts)
        operations = f"{len(alone.order):,} → {len(together.order):,}"
        print(f"| {name} | {before} | {after} ({counts[1] / counts[0]:.2f}) | {operations} |")


if __name__ == "__main__":
    main()
