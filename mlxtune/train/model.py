"""The model of a recipe: loaded, with our layers in it, ready to train or to run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.adapters.saved import SavedAdapter
from mlxtune.adapters.store import start_from
from mlxtune.arrays import flat
from mlxtune.data.batches import Plan
from mlxtune.data.passes import Layout
from mlxtune.data.template_values import TemplateValues
from mlxtune.device import on_cpu
from mlxtune.errors import ModelError
from mlxtune.layers.gated import use_gated_activations
from mlxtune.layers.inject import (
    add_lora,
    dequantize_layers,
    own_quantized_layers,
    projections,
    quantize_projections,
)
from mlxtune.layers.quantized import packing_named
from mlxtune.layers.routes import Routes, choose_routes, fix_routes
from mlxtune.memory import GB, keep_within, memory_budget
from mlxtune.models.enable import enable_packs_by, pack_kind
from mlxtune.models.fused_attention import keeps_no_scores, prepare_backward
from mlxtune.models.load import (
    DTYPES,
    LoadedModel,
    embedding_rows,
    load_model,
    load_tokenizer,
    model_classes,
    model_config,
)
from mlxtune.models.packed import PackCache
from mlxtune.models.resolve import ModelSource, is_hub_id, resolve_model
from mlxtune.models.targets import find_targets
from mlxtune.models.weights import stored_tensors
from mlxtune.objectives import Objective
from mlxtune.recipe.schema import LoraSection, ModelSection, Recipe, TrainSection
from mlxtune.train.memory import blocks_to_checkpoint
from mlxtune.train.optim import optimizer_of


@dataclass(frozen=True)
class AdaptedModel:
    """A model with adapters in place.

    Attributes:
        base: the model.
        packing: whether it takes packed batches.
        routes: which way each shape of packed weights is multiplied (`choose_routes`).
        notes: what there is to say about it.
    """

    base: LoadedModel
    packing: bool
    routes: Routes
    notes: tuple[str, ...]


def adapted_model(
    recipe: Recipe, initial: SavedAdapter | None = None, recorded: Any = None
) -> AdaptedModel:
    """The model that a recipe trains, adapters in place.

    Args:
        recipe: checked.
        initial: what the adapters start from.
        recorded: the routes of a run that is to be continued.

    Raises:
        ModelError: the model cannot be loaded.
        TargetError: the recipe's targets are not the model's.
    """
    base = load_base(recipe.model)
    routes: Routes = {}
    if recipe.model.quantized_matmul == "auto":
        routes = choose_routes(base.model, DTYPES[base.dtype], recorded)
    notes = []
    if recipe.model.dtype == "auto" and base.dtype != base.stored_dtype:
        notes.append(
            f"computed in {base.dtype}, the only type that is fast on a CPU, not in "
            f"{base.stored_dtype}"
        )
    packing = recipe.train.packing
    if packing:
        try:
            enable_packs_by(base.model, base.config)
        except ModelError as error:
            packing = False
            notes.append(f"batches are padded, not packed: {error.what}")
        else:
            if pack_kind(base.model) is PackCache and not mx.cuda.is_available():
                notes.append(
                    "attention is mlx-lm's own, which keeps all scores: memory grows with the "
                    "square of a row's length"
                )
    use_gated_activations(base.model)
    prepare_backward(base.model)
    mx.random.seed(recipe.seed)
    put_adapters(base.model, recipe.lora)
    if initial is not None:
        start_from(initial, base.model)
    return AdaptedModel(base, packing, routes, tuple(notes))


def put_adapters(model: nn.Module, lora: LoraSection, *, evaluate: bool = True) -> None:
    """Put a recipe's adapters on its targets; only they train. `evaluate` as in `add_lora`.

    Raises:
        TargetError: the targets are not the model's.
    """
    targets = find_targets(
        dict(projections(model)),
        lora.target_modules,
        exclude=lora.exclude_modules,
        layers=lora.layers,
        layer_count=len(model.layers),
    )
    add_lora(
        model,
        targets,
        rank=lora.rank,
        scale=lora.scale,
        dropout=lora.dropout,
        dora=lora.dora,
        evaluate=evaluate,
    )


def blocks_computed_twice(
    model: nn.Module,
    plan: Plan,
    train: TrainSection,
    budget: int,
    notes: list[str],
    objective: Objective,
) -> list[int]:
    """Numbers of the blocks to checkpoint; what there is to say of it goes to `notes`.

    `budget` is the memory that a step may take, in bytes.
    """
    blocks, wish = list(range(len(model.layers))), train.gradient_checkpointing
    if wish is False:
        return []
    if wish is True:
        return blocks
    if wish != "auto":
        return blocks[::wish]
    try:
        state = sum(a.nbytes for a in flat(optimizer_of(train, model).state).values())
        steps = plan.total_steps(epochs=train.epochs, max_steps=train.max_steps)
        largest = plan.largest_of_run(steps)
        count = blocks_to_checkpoint(model, largest, budget, state, objective=objective)
    except ModelError as error:
        notes.append(f"no gradient checkpointing: {error.what}")
        return []
    if count:
        notes.append(
            f"gradient checkpointing in {count} of {len(blocks)} blocks, to stay within "
            f"{budget / GB:.1f} GB (train.memory_limit)"
        )
    # The first ones: they are computed again when the others have let go of their memory.
    return blocks[:count]


def layout_for(packing: bool, config: dict[str, Any]) -> Layout:
    """How passes are laid out on this device.

    Args:
        packing: whether the model takes packed batches.
        config: of the model.
    """
    if on_cpu():
        return Layout(packing)
    # Each new shape is traced and compiled anew, and a small pass leaves a GPU idle.
    causal = not mx.cuda.is_available() and keeps_no_scores(config)
    return Layout(packing, few_shapes=True, pass_cost=256, causal_rows=causal)


def load_base(section: ModelSection, *, for_inference: bool = False) -> LoadedModel:
    """The model of a recipe with our layers in it.

    Args:
        section: `[model]`.
        for_inference: on a CPU, expand packed weights: a packed product of a single row
            is many times slower there than a plain one. The numbers are the same.
    """
    template = _template_of(section)
    source = resolve_model(section.path, revision=section.revision)
    values = template_values(section)
    keep_within(memory_budget())  # whatever the verb is; training sets the recipe's own limit
    base = load_model(source, dtype=section.dtype, chat_template=template, values=values)
    put_own_layers(base.model, section, DTYPES[base.dtype])
    if for_inference and on_cpu():
        dequantize_layers(base.model, DTYPES[base.dtype])
    mx.eval(base.model.parameters())
    return base


def put_own_layers(
    model: nn.Module, section: ModelSection, dtype: mx.Dtype, *, evaluate: bool = True
) -> None:
    """Our layers instead of MLX's, packed or expanded as the recipe says.

    Args:
        model: as it was loaded.
        section: `[model]`.
        dtype: that it computes in.
        evaluate: compute the new weights at once, one after another.
    """
    own_quantized_layers(model, dtype)
    if section.quantize is not None:
        packing = packing_named(section.quantize, double_quantization=section.double_quantization)
        quantize_projections(model, packing, evaluate=evaluate)
    if section.dequantize:
        dequantize_layers(model, dtype, evaluate=evaluate)
    if section.quantized_matmul != "auto":
        fix_routes(model, section.quantized_matmul == "expand")


def check_model(section: ModelSection) -> None:
    """See that a model on this machine can be loaded, as far as its headers say.

    A hub id is not asked for.

    Raises:
        ModelError: it is not there, damaged, quantized in a way that is not read here, or of an
            architecture that mlx-lm does not have.
    """
    if is_hub_id(section.path):
        return
    source = resolve_model(section.path, revision=section.revision)
    config = model_config(source)
    model_classes(config, where=str(source.path))
    if not source.is_gguf:
        stored_tensors(source.path)


def rows_of(section: ModelSection, source: ModelSource | None = None) -> int | None:
    """How many tokens the model of a recipe has rows for; None where its config says nothing.

    Args:
        section: `[model]`.
        source: where the model is, if that is known.
    """
    if source is None:
        source = resolve_model(section.path, revision=section.revision, weights=False)
    return embedding_rows(model_config(source))


def tokenizer_of(section: ModelSection, source: ModelSource | None = None) -> Any:
    """The tokenizer of a recipe's model, which alone is fetched and loaded.

    Args:
        section: `[model]`.
        source: where the model is, if that is known.
    """
    template = _template_of(section)
    if source is None:
        source = resolve_model(section.path, revision=section.revision, weights=False)
    return load_tokenizer(source, chat_template=template, values=template_values(section))


def template_values(section: ModelSection) -> TemplateValues | None:
    """What is written into the model's chat template; None if nothing is to be."""
    today = section.chat_template_date
    if today is None and not section.chat_template_kwargs:
        return None
    day = None if today is None else date.fromisoformat(today)
    return TemplateValues(section.chat_template_kwargs, day)


def _template_of(section: ModelSection) -> str | None:
    if section.chat_template is None:
        return None
    try:
        return Path(section.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"the chat template {section.chat_template!r} cannot be read: {error}",
            where="model.chat_template",
        ) from None
