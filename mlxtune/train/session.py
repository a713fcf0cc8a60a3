"""From a recipe to a trained run, and from a run back to its model.

The one place that knows the whole recipe; each room below is given its own part.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlxtune
from mlxtune.adapters.store import load_adapter
from mlxtune.arrays import flat
from mlxtune.data.batches import Plan
from mlxtune.data.render import Renderer
from mlxtune.data.sources import HUB
from mlxtune.device import device_name
from mlxtune.errors import ModelError, RecipeError, RunError
from mlxtune.files import sha256
from mlxtune.layers.dense import dense_tensors
from mlxtune.layers.inject import (
    add_lora,
    dequantize_layers,
    own_quantized_layers,
    projections,
    quantize_projections,
)
from mlxtune.layers.quantized import packing_named
from mlxtune.layers.routes import choose_routes, fix_routes
from mlxtune.models.load import DTYPES, LoadedModel, load_model, load_tokenizer
from mlxtune.models.packed import enable_packs
from mlxtune.models.resolve import ModelSource, resolve_model
from mlxtune.models.targets import find_targets
from mlxtune.recipe.schema import ModelSection, Recipe
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.corpus import Corpus, check_sources, held_out_source, read_corpus, source_of
from mlxtune.train.loop import Interrupted, Trainer
from mlxtune.train.metrics import Outline, Reporter
from mlxtune.train.run import Run


def fine_tune(
    recipe: Recipe,
    path: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train what a recipe says, in the run folder `path`.

    Args:
        recipe: checked.
        path: folder of the run; made unless resuming.
        reporter: is told how it goes.
        resume: go on from the run's latest checkpoint.
        overwrite: replace a run that is there.

    Raises:
        MlxtuneError: whatever is wrong with the recipe's model, data or targets, before
            anything is written; or with the disk or the numbers while training.
        Interrupted: after Ctrl-C, with everything saved.
    """
    recipe = _with_absolute_paths(recipe)
    run = _resumable(path, recipe) if resume else None
    if run is None:
        Run.require_free(path, overwrite=overwrite)
    # What is wrong with the data is told before a large model is fetched and loaded.
    check_sources(recipe, rows=100)
    corpus = read_corpus(recipe, Renderer(tokenizer_of(recipe.model)), reporter.tokenized)
    base = load_base(recipe.model)
    routes = {}
    if recipe.model.quantized_matmul == "auto":
        recorded = run.status().get("quantized_matmul") if run is not None else None
        routes = choose_routes(base.model, DTYPES[base.dtype], recorded)
    notes = list(corpus.notes())
    packing = recipe.train.packing
    if packing:
        try:
            enable_packs(base.model)
        except ModelError as error:
            packing = False
            notes.append(f"batches are padded, not packed: {error.what}")
    mx.random.seed(recipe.seed)
    targets = find_targets(
        dict(projections(base.model)),
        recipe.lora.target_modules,
        layers=recipe.lora.layers,
        layer_count=len(base.model.layers),
    )
    lora = recipe.lora
    add_lora(base.model, targets, rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
    if recipe.train.gradient_checkpointing:
        checkpoint_blocks(base.model)
    facts = _facts(recipe, base.source) | {"quantized_matmul": routes}
    if run is None:
        run = Run.create(path, recipe, facts, overwrite=overwrite)
    else:
        _require_same(run.status(), facts)
    trainer = Trainer(
        base.model,
        run,
        Plan(
            corpus.parts,
            recipe.train.batch_size,
            recipe.train.gradient_accumulation_steps,
            recipe.seed,
            packing,
        ),
        corpus.held_out,
        train=recipe.train,
        evaluation=recipe.eval,
        checkpoint=recipe.checkpoint,
        log=recipe.log,
        base=recipe.model.path,
        reporter=reporter,
    )
    first = 0
    if resume:
        first, damaged = trainer.resume()
        notes += damaged
    reporter.started(
        _outline(recipe, run, base, corpus, packing, notes, first, trainer.total_steps)
    )
    run.write_status(status="running")
    try:
        trainer()
    except (Interrupted, KeyboardInterrupt):
        run.write_status(status="interrupted")
        raise
    except Exception:
        run.write_status(status="failed")
        raise
    run.write_status(status="finished")
    return run


def load_base(section: ModelSection, *, for_inference: bool = False) -> LoadedModel:
    """The model of a recipe with our layers in it.

    Args:
        section: `[model]`.
        for_inference: on a CPU, expand packed weights: a packed product of a single row
            is many times slower there than a plain one. The numbers are the same.
    """
    template = _template_of(section)
    source = resolve_model(section.path, revision=section.revision)
    base = load_model(source, dtype=section.dtype, chat_template=template)
    own_quantized_layers(base.model, DTYPES[base.dtype])
    if section.quantize is not None:
        packing = packing_named(section.quantize, double_quantization=section.double_quantization)
        quantize_projections(base.model, packing)
    if section.dequantize or (for_inference and mx.default_device() == mx.cpu):
        dequantize_layers(base.model, DTYPES[base.dtype])
    if section.quantized_matmul != "auto":
        fix_routes(base.model, section.quantized_matmul == "expand")
    mx.eval(base.model.parameters())
    return base


def tokenizer_of(section: ModelSection) -> Any:
    """The tokenizer of a recipe's model, which alone is loaded."""
    template = _template_of(section)
    source = resolve_model(section.path, revision=section.revision)
    return load_tokenizer(source, chat_template=template)


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


def open_run(path: Path, *, for_inference: bool = True) -> tuple[Run, LoadedModel]:
    """A finished run and its model, adapter in place.

    Raises:
        RunError: there is no run, or it has not finished.
    """
    run = Run.open(path)
    adapter = run.finished_adapter()
    base = load_base(run.recipe().model, for_inference=for_inference)
    load_adapter(adapter, base.model)
    base.model.eval()
    return run, base


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it will be kept with the run, usable from any folder."""

    def absolute(path: str) -> str:
        return path if path.startswith(HUB) else str(Path(path).expanduser().absolute())

    data = tuple(s.model_copy(update={"path": absolute(s.path)}) for s in recipe.data)
    held_out = recipe.eval.path
    evaluation = recipe.eval.model_copy(
        update={"path": absolute(held_out) if held_out is not None else None}
    )
    model = recipe.model
    if Path(model.path).expanduser().exists():
        model = model.model_copy(update={"path": absolute(model.path)})
    if model.chat_template is not None:
        model = model.model_copy(update={"chat_template": absolute(model.chat_template)})
    return recipe.model_copy(update={"data": data, "eval": evaluation, "model": model})


def _resumable(path: Path, recipe: Recipe) -> Run:
    run = Run.open(path)
    if run.adapter.is_dir():
        raise RunError(
            "this run has finished; there is nothing to go on with",
            where=str(path),
            remedy="start anew with --overwrite, or under another name",
        )
    before, now = run.recipe().model_dump(), recipe.model_dump()
    changed = sorted(_flat(before).items() ^ _flat(now).items(), key=lambda item: item[0])
    if changed:
        key = changed[0][0]
        raise RecipeError(
            f"the recipe has changed since the run began: {key} was {_flat(before).get(key)} "
            f"and is {_flat(now).get(key)}",
            where=str(path),
            remedy="resume with the recipe as it was (runs/<name>/recipe.toml), or start anew",
        )
    return run


def _flat(values: dict[str, Any]) -> dict[str, str]:
    """Dotted key to value as text."""
    parts: dict[str, str] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, tuple) else value
        if isinstance(inner, dict):
            parts |= {f"{key}.{k}": v for k, v in _flat(inner).items()}
        else:
            parts[key] = repr(value)
    return parts


def _facts(recipe: Recipe, source: ModelSource) -> dict[str, Any]:
    """What run.json says of the circumstances."""
    sources = [source_of(section) for section in recipe.data]
    if (held_out := held_out_source(recipe.eval)) is not None:
        sources.append(held_out)
    files = [file for s in sources for file in s.files()]
    if recipe.model.chat_template is not None:
        files.append(Path(recipe.model.chat_template))
    return {
        "versions": {
            "mlxtune": mlxtune.__version__,
            "mlx": _version("mlx"),
            "mlx-lm": _version("mlx-lm"),
        },
        "device": device_name(),
        "seed": recipe.seed,
        "hashes": {
            "model": _fingerprint(source),
            **{str(path): sha256(path) for path in files},
            **{s.path: s.fingerprint() for s in sources if s.path.startswith(HUB)},
        },
    }


def _fingerprint(source: ModelSource) -> str:
    """SHA-256 of a GGUF, or of a folder's config with its weight files' sizes.

    Hashing tens of gigabytes at each start would take longer than loading them.
    """
    if source.is_gguf:
        return sha256(source.path)
    sizes = ",".join(
        f"{f.name}:{f.stat().st_size}" for f in sorted(source.path.glob("*.safetensors"))
    )
    return f"{sha256(source.path / 'config.json')} {sizes}"


def _require_same(status: dict[str, Any], facts: dict[str, Any]) -> None:
    for name, value in facts["hashes"].items():
        if status.get("hashes", {}).get(name) != value:
            raise RunError(
                f"{name} has changed since the run began, so it cannot go on as it would have",
                remedy="put it back as it was, or start anew with --overwrite",
            )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _outline(
    recipe: Recipe,
    run: Run,
    base: LoadedModel,
    corpus: Corpus,
    packing: bool,
    notes: list[str],
    first: int,
    total: int,
) -> Outline:
    return Outline(
        run=run.path,
        model=recipe.model.path,
        device=device_name(),
        dtype=base.dtype,
        packed=packing,
        notes=tuple(notes),
        trainable=_count(base.model, trainable=True),
        parameters=_count(base.model, trainable=False),
        samples=corpus.size,
        held_out=len(corpus.held_out),
        first_step=first,
        total_steps=total,
    )


def _count(model: nn.Module, *, trainable: bool) -> int:
    """Parameters, packed ones counted as the weights they hold."""
    if trainable:
        return sum(a.size for a in flat(model.trainable_parameters()).values())
    return sum(math.prod(tensor.shape) for tensor in dense_tensors(model))
