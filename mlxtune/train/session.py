"""From a recipe to a trained run, and from a run back to its model.

The one place that knows the whole recipe; each room below is given its own part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlxtune.adapters.saved import SavedAdapter
from mlxtune.arrays import flat
from mlxtune.data.batches import Plan
from mlxtune.data.inspect import histogram
from mlxtune.data.store import lengths_of
from mlxtune.device import device_name
from mlxtune.errors import MlxtuneError
from mlxtune.layers.dense import dense_tensors
from mlxtune.memory import keep_within, memory_budget, wire_weights
from mlxtune.models.heads import split_head
from mlxtune.models.load import LoadedModel
from mlxtune.objectives import objective_of
from mlxtune.recipe.load import dump_recipe
from mlxtune.recipe.schema import Recipe
from mlxtune.train.asking import asked_as, settled
from mlxtune.train.blocks import checkpoint_blocks
from mlxtune.train.check import check_sources
from mlxtune.train.corpus import Corpus, read_corpus
from mlxtune.train.distributed import Workers, end_in_peace, join
from mlxtune.train.ending import trained_ending_notes
from mlxtune.train.facts import facts_of, is_adapter_file, require_same, shared_facts
from mlxtune.train.kept import keep_rows
from mlxtune.train.loop import Interrupted, Trainer
from mlxtune.train.metrics import Outline, Reporter, Several, Silent
from mlxtune.train.model import (
    AdaptedModel,
    adapted_model,
    blocks_computed_twice,
    layout_for,
)
from mlxtune.train.neftune import add_embedding_noise
from mlxtune.train.notes import context_notes, part_lengths, warmup_notes
from mlxtune.train.places import with_absolute_paths
from mlxtune.train.reference import Reference
from mlxtune.train.remedies import Remedies
from mlxtune.train.resume import flat_keys, resumable
from mlxtune.train.run import RECIPE, Run, checkpoints
from mlxtune.train.subject import find_subject, saved_adapter
from mlxtune.train.trackers import Trackers, require_trackers

# Is told the recipe, its records and how many workers train, and says what the run will take, in
# figures for run.json and in lines for people; may refuse it by raising.
Forecast = Callable[[Recipe, Corpus, int], tuple[dict[str, Any] | None, tuple[str, ...]]]


def fine_tune(
    recipe: Recipe,
    path: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    overwrite: bool = False,
    workers: Workers | None = None,
    forecast: Forecast | None = None,
    command: str = "",
) -> Run:
    """Train what a recipe says, in the run folder `path`.

    Args:
        recipe: checked.
        path: folder of the run; made unless resuming.
        reporter: is told how it goes.
        resume: go on from the run's latest checkpoint.
        overwrite: replace a run that is there.
        workers: those to train with; by default the ones that the launcher started
            together with this process, if any. The first one alone writes.
        forecast: is asked before a new run loads its model; what it says is kept in
            run.json as `plan`.
        command: that training was started with, kept in run.json for the report.

    Raises:
        MlxtuneError: whatever is wrong with the recipe's model, data or targets, before
            anything is written; or with the disk, the numbers or the GPU while training.
        Interrupted: after Ctrl-C, with everything saved.
    """
    workers = workers or join()
    with workers:
        workers.require_same({"recipe": dump_recipe(recipe)})
        reporter = reporter if workers.first else Silent()
        recipe = with_absolute_paths(recipe)
        return _fine_tune(recipe, path, reporter, resume, overwrite, workers, forecast, command)


def _fine_tune(
    recipe: Recipe,
    path: Path,
    reporter: Reporter,
    resume: bool,
    overwrite: bool,
    workers: Workers,
    forecast: Forecast | None,
    command: str,
) -> Run:
    if resume and (path / RECIPE).is_file():
        recipe = asked_as(recipe, Run(path).recipe())
    resumption = resumable(path, recipe) if resume and workers.first else None
    run = None if resumption is None else resumption.run
    if run is None and workers.first:
        Run.require_free(path, overwrite=overwrite)
    if workers.first:
        require_trackers(recipe.log.report_to)
    # What is wrong with adapter and data is told before a large model is fetched and loaded.
    initial = None
    # A checkpoint is further on; what other workers begin with is then the first one's.
    further = resume and (run is None or bool(checkpoints(run.checkpoints)))
    if (path_of_initial := recipe.lora.init_from) is not None and not further:
        initial = saved_adapter(Path(path_of_initial))
    check_sources(recipe, rows=100).require_usable()
    workers.barrier()
    asking = settled(recipe)
    recipe, renderer = asking.recipe, asking.renderer()
    corpus = read_corpus(recipe, renderer, reporter.tokenized)
    chosen = bool(recipe.eval.val_size)
    corpus.overlap().require_below(recipe.eval.max_overlap, chosen=chosen)
    workers.barrier()
    before = resumption.status() if resumption is not None else {}
    said: tuple[str, ...] = ()
    expected = before.get("plan")
    if forecast is not None and workers.first and not resume:
        expected, said = forecast(recipe, corpus, workers.size)
    workers.barrier()
    # Packed and expanded products round differently: all workers take the ways they took.
    routes = json.loads(workers.texts(json.dumps(before.get("quantized_matmul")))[0])
    adapted = adapted_model(recipe, initial, routes)
    base, notes = adapted.base, [*asking.notes, *corpus.notes(), *adapted.notes]
    notes += trained_ending_notes(corpus, adapted.base.tokenizer)
    plan = Plan(
        corpus.parts,
        recipe.train.batch_size,
        recipe.train.gradient_accumulation_steps,
        recipe.seed,
        layout_for(adapted.packing, base.config),
        workers.rank,
        workers.size,
    )
    steps = plan.total_steps(epochs=recipe.train.epochs, max_steps=recipe.train.max_steps)
    objective = objective_of(recipe)
    notes += context_notes(part_lengths(corpus.parts), base.config)
    notes += warmup_notes(recipe.train, steps)
    if split_head(base.model) is None:
        notes.append(
            "logits of all tokens: this architecture's head does not come apart in a known way, "
            "which takes memory"
        )
    facts = facts_of(recipe, base.source, renderer, workers)
    workers.require_same(shared_facts(facts))
    facts["quantized_matmul"] = adapted.routes
    facts["lengths"] = _lengths(corpus)
    if expected is not None:
        facts["plan"] = expected
    budget = memory_budget(recipe.train.memory_limit)
    keep_within(budget)
    if recipe.train.wired_memory:
        wire_weights(budget)
    # Blocks computed twice draw their dropout apart, so a resumed run does as it did before.
    if (twice := before.get("checkpointed_blocks")) is None:
        twice = blocks_computed_twice(base.model, plan, recipe.train, budget, notes, objective)
        if run is not None:
            notes.append(
                "other blocks than before may be computed twice: losses may differ in their last "
                "digits, with dropout in what is dropped"
            )
    twice = json.loads(workers.texts(json.dumps(twice))[0])
    facts["checkpointed_blocks"] = twice
    if objective.compares:
        reference = Reference(
            base.model, _initial_of(recipe), _reference_facts(recipe, base, facts["hashes"])
        )
        notes += _references(reference, corpus, plan, reporter, workers)
    checkpoint_blocks(base.model, twice)
    if recipe.train.neftune_noise_alpha:
        add_embedding_noise(base.model, recipe.train.neftune_noise_alpha)
    if not workers.first:
        run = Run(path)  # which it neither reads nor writes
    elif run is None:
        facts = {"command": command, "started": _now(), **facts}
        keep = partial(keep_rows, recipe=recipe, corpus=corpus)
        run = Run.create(path, recipe, facts, overwrite=overwrite, fill=keep)
    else:
        notes += require_same(before, facts)
        run.write_status(checkpointed_blocks=twice)
    trackers = Trackers(recipe.log.report_to if workers.first else (), run, _flat_texts(recipe))
    trainer = Trainer(
        base.model,
        run,
        plan,
        corpus.held_out,
        objective,
        train=recipe.train,
        evaluation=recipe.eval,
        checkpoint=recipe.checkpoint,
        log=recipe.log,
        base=recipe.model.path,
        reporter=Several([reporter, trackers]),
        workers=workers,
    )
    with run.held() if workers.first else nullcontext():
        first = 0
        if resume:
            first, damaged = trainer.resume()
            notes += damaged
        if resumption is not None:
            notes += resumption.begin(first, trainer.total_steps)
        outline = _outline(recipe, run, adapted, corpus, notes, first, trainer.total_steps, workers)
        outline = replace(outline, plan=said, shown=objective.shown)
        all_twice, alone = len(twice) == len(base.model.layers), workers.size == 1
        remedies = Remedies(run.path, recipe.train, budget, all_twice, alone)
        kept = _status_kept(run, trackers, workers) if workers.first else nullcontext()
        with kept, remedies.told(trainer):
            reporter.started(outline)
            trackers.started(outline)
            trainer()
    return run


def _initial_of(recipe: Recipe) -> Callable[[], SavedAdapter] | None:
    """Reads the adapter that training began with; None if it began with fresh ones."""
    path = recipe.lora.init_from
    return None if path is None else partial(saved_adapter, Path(path))


def _reference_facts(recipe: Recipe, base: LoadedModel, hashes: dict[str, str]) -> dict[str, Any]:
    """What log-probabilities of the model before training depend on."""
    initial = sorted(v for name, v in hashes.items() if is_adapter_file(name))
    model = recipe.model.model_dump(
        include={"dtype", "quantize", "double_quantization", "dequantize"}
    )
    return {
        "model": hashes["model"],
        "settings": model | {"dtype": base.dtype},
        "adapter": [initial, recipe.lora.model_dump(exclude={"dropout", "init_from"})]
        if initial
        else [],
        "device": device_name(),
    }


def _references(
    reference: Reference, corpus: Corpus, plan: Plan, reporter: Reporter, workers: Workers
) -> list[str]:
    """Give the corpus the reference's log-probabilities; returns notes for the run."""

    def compute() -> list[str]:
        notes = []
        for store in corpus.stores:
            made = reference.known_to(
                store,
                batch_size=plan.batch_size,
                layout=plan.layout,
                progress=reporter.referenced,
            )
            notes.append(
                "the log-probabilities of the model before training were "
                + ("computed" if made else "taken from the cache")
            )
        return list(dict.fromkeys(notes))

    # The first one computes them for all that share its cache.
    notes = compute() if workers.first else []
    workers.barrier()
    return notes if workers.first else compute()


@contextmanager
def _status_kept(run: Run, trackers: Trackers, workers: Workers) -> Iterator[None]:
    """run.json says how it went, and the trackers are told."""
    with trackers.closed() as tell:
        run.write_status(status="running", ended=None, error=None)
        try:
            yield
        except (Interrupted, KeyboardInterrupt, BrokenPipeError):
            run.write_status(status="interrupted", ended=_now())
            tell("interrupted")
            raise
        except Exception as error:
            if workers.size > 1:
                end_in_peace()
            run.write_status(status="failed", ended=_now(), error=_in_short(error))
            raise
        run.write_status(status="finished", ended=_now())
        tell("finished")


def _in_short(error: Exception) -> str:
    """Why a run failed, on one line."""
    if isinstance(error, MlxtuneError):
        text = error.in_short or error.what
    else:
        text = f"{type(error).__name__}: {error}"
    return next(iter(text.splitlines()), "")[:300]


def _now() -> str:
    """ISO 8601, in the zone of this machine."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def open_run(
    path: Path, *, adapter: Path | None = None, for_inference: bool = True
) -> tuple[Run, LoadedModel]:
    """A run and its model, adapter in place.

    Args:
        path: the run.
        adapter: another run or an adapter's folder; by default the run's own.
        for_inference: see `load_base`.

    Raises:
        RunError: there is no run, it has not finished, or the adapter does not fit.
    """
    run = Run.open(path)
    return run, find_subject(str(path), adapter=adapter).load(for_inference=for_inference)


def _flat_texts(recipe: Recipe) -> dict[str, str]:
    """The recipe's keys that have a value, dotted, as trackers take them."""
    return flat_keys(recipe.model_dump(exclude_none=True), form=str)


def _lengths(corpus: Corpus) -> dict[str, list[int]]:
    """Samples by tokens: bin i has `counts[i]` of `edges[i]` to `edges[i + 1] - 1`."""
    lengths = np.concatenate([lengths_of(part.samples) for part in corpus.parts])
    bins = histogram(lengths, bins=24)
    return {
        "edges": [*(b.low for b in bins), bins[-1].high + 1],
        "counts": [b.count for b in bins],
    }


def _outline(
    recipe: Recipe,
    run: Run,
    adapted: AdaptedModel,
    corpus: Corpus,
    notes: list[str],
    first: int,
    total: int,
    workers: Workers,
) -> Outline:
    return Outline(
        run=run.path,
        model=recipe.model.path,
        device=device_name(),
        dtype=adapted.base.dtype,
        packed=adapted.packing,
        notes=tuple(notes),
        trainable=_count(adapted.base.model, trainable=True),
        parameters=_count(adapted.base.model, trainable=False),
        samples=corpus.size,
        held_out=corpus.held_out_size,
        first_step=first,
        total_steps=total,
        workers=workers.size,
    )


def _count(model: nn.Module, *, trainable: bool) -> int:
    """Parameters, packed ones counted as the weights they hold."""
    if trainable:
        return sum(a.size for a in flat(model.trainable_parameters()).values())
    return sum(math.prod(tensor.shape) for tensor in dense_tensors(model))
