"""Checkpoints: all that a run needs to go on exactly where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_unflatten

from mlxtune.adapters.saved import SavedAdapter, load_arrays, save_arrays
from mlxtune.adapters.store import adapter_arrays, set_adapter_arrays
from mlxtune.arrays import flat, random_key, set_random_key
from mlxtune.errors import RunError
from mlxtune.files import atomic_folder, sha256, write_json
from mlxtune.recipe.schema import LoraSection
from mlxtune.train.distributed import Workers
from mlxtune.train.run import checkpoints

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its arrays.

    Attributes:
        step: steps done; with the seed it fixes the place in the data.
        best: best held-out figure so far, as the objective has it; None before the first.
        best_step: steps done when it was measured.
        no_better: measurements of it since then.
        tokens, supervised_tokens, examples: seen so far.
        seconds: time spent training so far.
        sums, counts: of the steps since the last report, by figure and by unit.
        reported_tokens, reported_examples, reported_seconds: what they were at that report.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    no_better: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    examples: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    reported_tokens: int = 0
    reported_examples: int = 0
    reported_seconds: float = 0.0


class DamagedCheckpoint(RunError):
    """A checkpoint is not what was written."""


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: mlx.optimizers.Optimizer,
    progress: Progress,
    *,
    keep: int,
) -> Path:
    """Write `folder/step-N`, whole or not at all; then drop all but the latest `keep`.

    The one of the best held-out figure stays too.

    Raises:
        StorageError: the disk refuses the write; earlier checkpoints stand.
    """
    path = folder / f"step-{progress.step}"
    with atomic_folder(path, overwrite=True) as temporary:
        save_arrays(temporary / ADAPTER, adapter_arrays(model))
        arrays = {f"optimizer.{name}": a for name, a in flat(optimizer.state).items()}
        arrays["random"] = random_key()
        save_arrays(temporary / OPTIMIZER, arrays)
        hashes = {name: sha256(temporary / name) for name in (ADAPTER, OPTIMIZER)}
        values = asdict(progress)
        write_json(temporary / STATE, values | {"hashes": hashes | {STATE: _digest(values)}})
    for old in checkpoints(folder)[:-keep]:
        if old.name != f"step-{progress.best_step}":
            shutil.rmtree(old, ignore_errors=True)
    return path


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_checkpoint(path: Path, model: nn.Module, optimizer: mlx.optimizers.Optimizer) -> Progress:
    """Put everything back as it was when the checkpoint was written.

    Raises:
        DamagedCheckpoint: a file is missing, or is not what was written; nothing was put
            back.
        RunError: it belongs to another model, or cannot be read now.
    """
    try:
        values: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        hashes = values.pop("hashes")
        progress = Progress(**values)
        found = {name: sha256(path / name) for name in (ADAPTER, OPTIMIZER)}
        found[STATE] = _digest(asdict(progress))
        changed = [name for name, digest in found.items() if digest != hashes[name]]
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"this checkpoint cannot be read: {error}", where=str(path)
        ) from None
    except OSError as error:  # rights, or a disk that is away: it may be whole all the same
        raise RunError(
            f"this checkpoint cannot be read: {error}",
            where=str(path),
            remedy="make it readable, or remove it to go on from the one before",
        ) from None
    if changed:
        raise DamagedCheckpoint(f"its {changed[0]} is not what was written", where=str(path))
    set_adapter_arrays(model, load_arrays(path / ADAPTER), where=str(path))
    arrays = load_arrays(path / OPTIMIZER)
    state = {
        name.removeprefix("optimizer."): array
        for name, array in arrays.items()
        if name.startswith("optimizer.")
    }
    optimizer.state = tree_unflatten(list(state.items()))
    set_random_key(arrays["random"])
    return progress


def checkpoint_adapter(path: Path, lora: LoraSection, base: str) -> SavedAdapter:
    """The adapter that a checkpoint holds.

    Args:
        path: its folder.
        lora: `[lora]` of its run.
        base: name of the model that it belongs to.

    Raises:
        DamagedCheckpoint: a file is missing, or is not what was written.
    """
    try:
        hashes = json.loads((path / STATE).read_text(encoding="utf-8"))["hashes"]
        whole = sha256(path / ADAPTER) == hashes[ADAPTER]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(
            f"this checkpoint cannot be read: {error}", where=str(path)
        ) from None
    if not whole:
        raise DamagedCheckpoint(f"its {ADAPTER} is not what was written", where=str(path))
    kind, arrays = "dora" if lora.dora else "lora", load_arrays(path / ADAPTER)
    return SavedAdapter(kind, lora.rank, lora.scale, arrays, base, None, str(path))


def share_state(
    workers: Workers,
    model: nn.Module,
    optimizer: mlx.optimizers.Optimizer,
    progress: Progress,
) -> Progress:
    """Give all workers what the first one has: adapter, optimizer, random state, progress.

    Only the first needs the run's folder. Nothing changes where all are alike already, as
    they are if the engine's sums are the same to the last bit on every worker; not all
    engines promise that for more than two, and small differences would add up.
    """
    if workers.size == 1:
        return progress
    adapter, state = flat(model.trainable_parameters()), flat(optimizer.state)
    arrays = {f"adapter.{name}": array for name, array in adapter.items()}
    arrays |= {f"optimizer.{name}": array for name, array in state.items()}
    taken = workers.from_first(arrays | {"random": random_key()})
    if not workers.first:
        model.update(tree_unflatten([(name, taken[f"adapter.{name}"]) for name in adapter]))
        new = tree_unflatten([(name, taken[f"optimizer.{name}"]) for name in state])
        _put(new, optimizer.state)
        set_random_key(taken["random"])
    [given, *_] = workers.texts(json.dumps(asdict(progress)))
    return Progress(**json.loads(given))


def _put(new: Any, tree: Any) -> None:
    """Replace the leaves of a tree in place: a compiled step holds on to the tree itself."""
    for key, value in new.items() if isinstance(new, dict) else enumerate(new):
        if isinstance(value, dict | list):
            _put(value, tree[key])
        else:
            tree[key] = value
