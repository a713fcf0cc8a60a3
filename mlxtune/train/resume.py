"""Which runs can be gone on with, and with which recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from mlxtune.errors import RecipeError, RunError
from mlxtune.recipe.schema import Recipe
from mlxtune.train.run import RECIPE, STATUS, Run, meant

# How much memory training may take: a run that had too little goes on with less of it.
_MEMORY = ("train.memory_limit", "train.gradient_checkpointing", "train.wired_memory")
# What may change while a run is interrupted: nothing of it reaches the weights, but for
# rounding where blocks are checkpointed. That the model is the same is seen when it is loaded.
_FREE = (
    "checkpoint.",
    "log.",
    "export.",
    "prep.",
    "judge.",
    "eval.suite",
    "eval.max_overlap",
    "model.path",
    *_MEMORY,
)
# How long a run is.
_LENGTH = ("train.epochs", "train.max_steps")
# Results of a run that goes on: they are kept under another name.
_RESULTS = ("adapter", "eval")


@dataclass(frozen=True)
class Resumption:
    """A run to go on with.

    Attributes:
        run: its folder.
        recipe: what it goes on with.
        changed: keys in which that differs from the recipe so far.
        finished: whether it had come to its end, and is to go on beyond it.
    """

    run: Run
    recipe: Recipe
    changed: tuple[str, ...] = ()
    finished: bool = False

    def status(self) -> dict[str, Any]:
        """What run.json says, as far as it holds for what comes."""
        status = self.run.status()
        if any(key in _MEMORY for key in self.changed):
            status["checkpointed_blocks"] = None  # to be chosen anew
        return status

    def begin(self, step: int, total: int) -> list[str]:
        """Keep the recipe that the run goes on with, and return remarks on it.

        Args:
            step: how many steps are done.
            total: how many there are to be.

        Raises:
            RunError: there is nothing left to do.
        """
        run, longer = self.run, any(key in _LENGTH for key in self.changed)
        if longer and total <= step:
            raise RunError(
                f"this run has done {step} steps already, and was to go on to step {total}",
                where=str(run.path),
                remedy="ask for more train.epochs, or more train.max_steps",
            )
        if self.changed or run.moved():
            run.write_recipe(self.recipe)
        if not self.finished:
            return []
        kept = []
        for name in _RESULTS:
            earlier, place = run.path / name, run.path / f"{name}-step-{step}"
            if earlier.is_dir():
                shutil.rmtree(place, ignore_errors=True)
                earlier.rename(place)
                kept.append(place.name)
        notes = [f"what there was after step {step} is kept in {' and '.join(kept)}"]
        ratio = self.recipe.train.warmup_ratio or 0.0
        if round(ratio * step) != round(ratio * total):
            notes.append(
                f"the rate rose over {round(ratio * step)} steps; in a run of {total} steps it "
                f"would have risen over {round(ratio * total)} (train.warmup_ratio)"
            )
        return notes


def resumable(path: Path, recipe: Recipe) -> Resumption:
    """A run that can be gone on with.

    Args:
        path: its folder.
        recipe: what it is to go on with.

    Raises:
        RunError: there is no such run, somebody trains in it, or it has finished.
        RecipeError: what has changed in the recipe would make it another run.
    """
    run = Run.open(path)
    with run.held():
        pass  # nobody else trains in it
    finished = run.adapter.is_dir()
    if finished and run.status()["status"] != "finished":  # killed before it could say so
        run.write_status(status="finished")
    before, now = (flat_keys(r.model_dump(exclude_none=True)) for r in (run.recipe(), recipe))
    changed = tuple(sorted({key for key, _ in before.items() ^ now.items()}))
    longer = any(key in _LENGTH for key in changed)
    # With any other schedule the steps so far had the rates of a run of that length.
    steady = recipe.train.lr_scheduler == "constant"
    if finished and not (longer and steady):
        raise _finished(run, recipe, longer)
    free = (*_FREE, *(_LENGTH if steady else ()))
    if fixed := [key for key in changed if not key.startswith(free)]:
        told = (f"{key} was {before.get(key)} and is {now.get(key)}" for key in fixed)
        raise RecipeError(
            f"the recipe has changed since the run began: {', '.join(told)}",
            where=str(path),
            remedy=f"resume with the recipe as it was ({path / RECIPE}), or start anew with "
            "--overwrite",
        )
    if finished and (why := _no_way_on(run, recipe)):
        raise _finished(run, recipe, longer, why=why)
    return Resumption(run, recipe, changed, finished)


def recipe_of_run(path: Path, overrides: Iterable[str], *, resume: bool) -> Recipe:
    """The recipe of a run whose folder was given where a recipe's file goes.

    Args:
        path: the folder.
        overrides: `section.key=value`.
        resume: whether the run is to be gone on with.

    Raises:
        RunError: it is no run, or is not to be gone on with.
        RecipeError: an override is wrong.
    """
    if not path.exists():
        Run.open(path)  # which says so
    if not (path / STATUS).is_file():
        raise RunError(
            "a recipe is a TOML file, and this is a folder that holds no run",
            where=str(path),
            remedy=meant(path) or "`mlxtune init` writes a recipe",
        )
    if not resume:
        raise RunError(
            "this is the folder of a run, not a recipe",
            where=str(path),
            remedy=f"go on with the run: mlxtune lora {quote(str(path))} --resume",
        )
    return Run(path).recipe(overrides)


def flat_keys(values: dict[str, Any], form: Callable[[object], str] = repr) -> dict[str, str]:
    """Dotted key to value as text."""
    parts: dict[str, str] = {}
    for key, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, tuple) else value
        if isinstance(inner, dict):
            parts |= {f"{key}.{k}": v for k, v in flat_keys(inner, form).items()}
        else:
            parts[key] = form(value)
    return parts


def _finished(run: Run, recipe: Recipe, longer: bool, *, why: str | None = None) -> RunError:
    """What to raise for a run that has come to its end: why it stays there, and what to do."""
    path, new = quote(str(run.path)), quote(f"{run.path}-more")
    remedy = (
        f"train on from its adapter: mlxtune lora {quote(str(run.path / RECIPE))} -o {new} "
        f"--set lora.init_from={path}"
    )
    schedule = recipe.train.lr_scheduler
    if why is not None:
        pass
    elif longer:
        why = (
            "this run has finished, and its learning rate has come to its end with it "
            f'(train.lr_scheduler = "{schedule}"), so a longer run cannot be made of it'
        )
    else:
        why = "this run has finished; there is nothing to go on with"
        if schedule == "constant":
            key = "epochs" if recipe.train.max_steps is None else "max_steps"
            remedy = f"train longer: mlxtune lora {path} --resume --set train.{key}=N"
    return RunError(why, where=str(run.path), remedy=remedy)


def _no_way_on(run: Run, recipe: Recipe) -> str | None:
    """Why a finished run cannot be made longer, if it cannot."""
    names = run.checkpoint_names()
    if not names:
        return "this run has finished, and its checkpoints are gone"
    state: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        state = json.loads((run.checkpoint(names[-1]) / "state.json").read_text(encoding="utf-8"))
    patience = recipe.eval.patience
    if patience is not None and state.get("no_better", 0) >= patience:
        return "this run has ended early: the held-out loss got no better (eval.patience)"
    return None
