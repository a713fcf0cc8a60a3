"""A small model trained through every path, against the same training done plainly."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtune.arrays import scalar
from mlxtune.data.pack import Batch, grid_of, pack, pad
from mlxtune.device import on_cpu
from mlxtune.layers.gated import use_gated_activations
from mlxtune.layers.inject import dequantize_layers, lora_layers
from mlxtune.layers.routes import choose_routes
from mlxtune.models.enable import enable_packs_by, pack_kind
from mlxtune.models.load import DTYPES
from mlxtune.recipe.load import parse_recipe
from mlxtune.recipe.schema import Recipe
from mlxtune.selfcheck.check import Difference, Found, LeftOutError
from mlxtune.selfcheck.tiny import model_folder, records, samples, scratch
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.loop import Interrupted
from mlxtune.train.metrics import Silent
from mlxtune.train.model import load_base, put_adapters
from mlxtune.train.optim import optimizer_of
from mlxtune.train.run import Run
from mlxtune.train.session import fine_tune
from mlxtune.train.step import TrainStep

Sections = dict[str, dict[str, Any]]

_STEPS = 8
# Loss and gradient of the first step, where only rounding differs, and losses of all: AdamW makes
# a full step of the smallest gradient, whichever way rounding turns it.
_FIRST = {"float32": 5e-3, "bfloat16": 2e-2}
_LATER = {"float32": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: for people.
        sections: of the recipe, where it is not the default.
        dtype: that the model computes in.
        plain: sections of what it is compared with, which runs in float32 on the CPU with
            weights that are expanded; None for the same.
    """

    name: str
    sections: Sections
    dtype: str = "float32"
    plain: Sections | None = None

    def __call__(self) -> Found:
        """Train it, and what it is compared with."""
        trained = train(self.sections, self.dtype)
        plain = self.sections if self.plain is None else self.plain
        with mx.stream(mx.cpu):
            wanted = train(plain, "float32", expanded=True, compiled=False)
        first, later = _FIRST[self.dtype], _LATER[self.dtype]
        differences = (
            Difference("loss of the first step", _apart(trained.losses[:1], wanted.losses), first),
            Difference("its gradient's norm", _apart(trained.norms[:1], wanted.norms), first),
            Difference("losses of all steps", _apart(trained.losses, wanted.losses), later),
        )
        return Found(differences, trained.figures(), _not_falling(trained.losses))


@dataclass(frozen=True)
class Trained:
    """What came of some steps: the loss and the gradient's norm of each, and how they were made."""

    losses: list[float]
    norms: list[float]
    attention: str
    gated: int

    def figures(self) -> dict[str, Any]:
        """For the file: the name of the attention's class shows whether ours was taken."""
        return {"losses": self.losses, "attention": self.attention, "gated_blocks": self.gated}


def train(
    sections: Sections, dtype: str, *, expanded: bool = False, compiled: bool | None = None
) -> Trained:
    """Train the tiny model.

    Args:
        sections: of the recipe.
        dtype: that it computes in.
        expanded: take quantized weights for the plain ones that they stand for.
        compiled: as `TrainStep` takes it.
    """
    recipe = recipe_of(sections, dtype)
    base = load_base(recipe.model)
    model = base.model
    if expanded:
        dequantize_layers(model, DTYPES[dtype])
    elif recipe.model.quantized_matmul == "auto":
        choose_routes(model, DTYPES[dtype])
    if recipe.train.packing:
        enable_packs_by(model, base.config)
    gated = use_gated_activations(model)
    put_adapters(model, recipe.lora)
    _begin_alike(model)
    if recipe.train.gradient_checkpointing is True:
        checkpoint_blocks(model, range(len(model.layers)))
    model.train()
    optimizer = optimizer_of(recipe.train, model)
    step = TrainStep(model, optimizer, max_grad_norm=1.0, compiled=compiled)
    losses, norms = [], []
    batch = _batch(recipe.train.packing)
    for _ in range(_STEPS):
        result = step([batch], recipe.train.learning_rate)
        mx.eval(model.state, optimizer.state, result.loss, result.grad_norm)
        losses.append(scalar(result.loss))
        norms.append(scalar(result.grad_norm))
    return Trained(losses, norms, pack_kind(model).__name__, gated)


def recipe_of(sections: Sections, dtype: str = "float32", name: str = "check") -> Recipe:
    """A recipe for the tiny model."""
    values: dict[str, Any] = {
        "name": name,
        "model": {"path": str(model_folder()), "dtype": dtype},
        "data": [{"path": str(records())}],
        "train": {"learning_rate": 1e-2, "gradient_checkpointing": False},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return parse_recipe(values, where=name)


def _begin_alike(model: Any) -> None:
    """Adapters that have an effect, and the same on every device."""
    with mx.stream(mx.cpu):
        for number, (_, layer) in enumerate(lora_layers(model)):
            for place, name in enumerate(("lora_a", "lora_b")):
                shape, key = layer[name].shape, mx.random.key(2 * number + place)
                layer[name] = 0.05 * mx.random.normal(shape, key=key)
        mx.eval(model.trainable_parameters())


def _batch(packing: bool) -> Batch:
    few = not on_cpu()
    if not packing:
        return pad(samples(), few_shapes=few)
    return pack(samples(), grid_of(samples(), few_shapes=few))


def _apart(got: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest difference of two rows of numbers, as a share of the first; or not a number."""
    apart = [abs(a - b) / abs(wanted[0]) for a, b in zip(got, wanted, strict=False)]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def _not_falling(losses: Sequence[float]) -> tuple[str, ...]:
    """What is wrong with losses that do not fall, or are no numbers."""
    if losses[-1] < 0.9 * losses[0]:
        return ()
    return (f"the loss does not fall: {losses[0]:.4g} at first, {losses[-1]:.4g} at last",)


# A CPU computes fast in float32 alone, and there it shows more.
def _usual() -> str:
    return "float32" if on_cpu() else "bfloat16"


def ways() -> list[Way]:
    """Every way to train that has code of its own."""
    usual = _usual()
    lora: Sections = {}
    padded: Sections = {"train": {"packing": False}}
    packed: Sections = {"model": {"quantize": 4, "quantized_matmul": "packed"}}
    expanded: Sections = {"model": {"quantize": 4, "quantized_matmul": "expand"}}
    eight: Sections = {"train": {"optimizer": "adamw_8bit"}}
    return [
        Way("LoRA, float32", lora, plain=padded),
        Way("LoRA, bfloat16", lora, "bfloat16"),
        Way("padded batches", padded, usual, plain=lora),
        Way("gradient checkpointing", {"train": {"gradient_checkpointing": True}}, usual, lora),
        Way("DoRA", {"lora": {"dora": True}}, usual),
        Way("8-bit AdamW", eight, usual, plain=lora),
        Way("QLoRA, 4 bits, packed products", packed, usual),
        Way("QLoRA, 4 bits, expanded", expanded, usual),
        Way("QLoRA, nf4", {"model": {"quantize": "nf4"}}, usual),
        Way("QLoRA, mxfp4", {"model": {"quantize": "mxfp4"}}, usual),
    ]


# ------------------------------------------------------------------------- compiled or not

_COMPILED: dict[str, Sections] = {
    "LoRA": {},
    "QLoRA, 4 bits": {"model": {"quantize": 4, "quantized_matmul": "packed"}},
    "nf4, checkpointing, 8-bit AdamW": {
        "model": {"quantize": "nf4"},
        "train": {"gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    },
}


def compiled_or_not() -> Found:
    """Losses of compiled steps against those of steps that are not."""
    if on_cpu():
        raise LeftOutError("on a CPU steps are not compiled: a C++ compiler would take a minute")
    cases = [(n, s, dtype) for n, s in _COMPILED.items() for dtype in ("float32", "bfloat16")]
    found = {f"{name}, {dtype}": both_ways(sections, dtype) for name, sections, dtype in cases}
    return Found(tuple(Difference(name, each.value, each.allowed) for name, each in found.items()))


def both_ways(sections: Sections, dtype: str) -> Difference:
    """How far compiled steps are from plain ones."""
    plain, compiled = (train(sections, dtype, compiled=way) for way in (False, True))
    return Difference("losses", _apart(compiled.losses, plain.losses), _LATER[dtype])


# -------------------------------------------------------------------------- a whole run


class _StopAt(Silent):
    """Asks a run to stop after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, step: int) -> None:
        """Called after each step."""
        if step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def whole_run() -> Found:
    """A run from its recipe to its adapter; and one that is stopped half-way and resumed."""
    steps = 6
    sections: Sections = {
        "train": {"max_steps": steps, "batch_size": 4, "lr_scheduler": "constant"},
        "checkpoint": {"steps": steps // 2},
        "log": {"steps": 1},
    }
    recipe = recipe_of(sections, _usual(), "run")
    once = fine_tune(recipe, scratch() / "once", Silent(), overwrite=True)
    resumed = _stopped_and_resumed(recipe, steps // 2)
    whole, other = (_losses(run) for run in (once, resumed))
    apart = Difference("losses of the resumed run", _apart(other, whole), _LATER[_usual()])
    # Scatter-adds of a GPU come in any order, so the last bits may differ there.
    figures = {"losses": whole, "resumed_to_the_bit": whole == other}
    return Found((apart,), figures, _not_falling(whole))


def _stopped_and_resumed(recipe: Recipe, step: int) -> Run:
    folder = scratch() / "resumed"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        fine_tune(recipe, folder, _StopAt(step))
    except Interrupted:
        return fine_tune(recipe, folder, Silent(), resume=True)
    raise RuntimeError("a run that was interrupted went on")


def _losses(run: Run) -> list[float]:
    return [float(entry["loss"]) for entry in run.metrics() if "loss" in entry]


def checks() -> list[tuple[str, Callable[[], Found]]]:
    """Name and function of each."""
    return [
        *((way.name, way) for way in ways()),
        ("compiled steps against plain ones", compiled_or_not),
        ("a run, stopped and resumed", whole_run),
    ]
