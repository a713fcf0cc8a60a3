"""A run's folder: everything needed to continue, judge or ship it.

recipe.toml     the recipe as it was resolved
run.json        status, why it failed, versions, device, hashes, seed
metrics.jsonl   one object a report
held-out.jsonl  the records that were held out, as they are
trained-rows.u64  fingerprints of the records that are trained on
checkpoints/    step-N/, the latest few
adapter/        the final adapter
adapter-best/   the adapter with the lowest held-out loss
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

from mlxtune.errors import OutputExists, RecipeError, RunError
from mlxtune.files import (
    atomic_folder,
    require_writable,
    storage_errors,
    write_json,
    write_text,
)
from mlxtune.recipe.load import dump_recipe, load_recipe
from mlxtune.recipe.schema import Recipe
from mlxtune.train.places import moved_places, places_of, relocated, with_paths

RECIPE = "recipe.toml"
STATUS = "run.json"
_MEND = (
    "restore it from a copy; the adapter may be whole, and `mlxtune eval MODEL --adapter FOLDER` "
    "takes it"
)
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A handle on a run's folder.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def create(
        cls,
        path: Path,
        recipe: Recipe,
        facts: dict[str, Any],
        *,
        overwrite: bool,
        fill: Callable[[Path], None] = lambda _folder: None,
    ) -> Run:
        """Make the folder of a new run.

        Args:
            path: of the folder.
            recipe: of the run.
            facts: entries of run.json.
            overwrite: replace a run that is there.
            fill: writes more into the folder; it appears whole or not at all.

        Raises:
            OutputExists: the folder exists and `overwrite` is false, or it exists and is
                no run, which is never overwritten.
            RunError: somebody is training in it.
            StorageError: the disk refuses the write; a run that was there still is.
        """
        if overwrite and (path / STATUS).is_file():
            with cls(path).held():
                pass  # nobody trains in what is replaced
        with atomic_folder(path, overwrite=overwrite, marker=STATUS) as folder:
            write_text(folder / RECIPE, dump_recipe(recipe))
            cls(folder).write_status(status="running", places=places_of(recipe, path), **facts)
            fill(folder)
        return cls(path)

    @staticmethod
    def require_free(path: Path, *, overwrite: bool) -> None:
        """Say early that `create` would refuse.

        Raises:
            OutputExists, RunError: as `create`.
            StorageError: nothing can be written there.
        """
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            require_writable(path)
            return
        is_run = (path / STATUS).is_file()
        if is_run and overwrite:
            with Run(path).held():
                return
        raise OutputExists(
            f"this {'run' if is_run else 'place'} exists already; nothing was written",
            where=str(path),
            remedy="go on with it by --resume, replace it by --overwrite, or give the recipe "
            "another name"
            if is_run
            else "it is no run, so it is never replaced: choose another place with --output",
        )

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run.

        Raises:
            RunError: the folder is no run.
        """
        if not (path / STATUS).is_file():
            raise RunError(
                "there is no run in this folder" if path.is_dir() else "there is no such run",
                where=str(path),
                remedy=meant(path) or "`mlxtune lora recipe.toml` makes one, in runs/<name>",
            )
        return cls(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from training in this folder.

        Raises:
            RunError: somebody does.
        """
        # A lock on the folder itself: it leaves no file behind, and ends with its process.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    "another process is training in this run",
                    where=str(self.path),
                    remedy="wait for it or stop it, or give the recipe another name",
                ) from None
            except OSError:
                pass  # a filesystem without locks
            yield
        finally:
            os.close(descriptor)

    @property
    def adapter(self) -> Path:
        """The final adapter's folder."""
        return self.path / "adapter"

    @property
    def best_adapter(self) -> Path:
        """Folder of the adapter with the lowest held-out loss."""
        return self.path / "adapter-best"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def finished_adapter(self) -> Path:
        """The final adapter's folder.

        Raises:
            RunError: the run has not come to its end.
        """
        if not self.adapter.is_dir():
            remedy = f"finish it: mlxtune lora {quote(str(self.path))} --resume"
            if steps := self.checkpoint_names():
                remedy += f"; or take it as it is: {self.path}@{steps[-1]}"
            raise RunError(
                f"this run has no adapter yet; its status is '{status_text(self.status())}'",
                where=str(self.path),
                remedy=remedy,
            )
        return self.adapter

    def checkpoint_names(self) -> list[str]:
        """`step-N` of each checkpoint, oldest first."""
        return [path.name for path in checkpoints(self.checkpoints)]

    def checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint.

        Args:
            name: `step-N`.

        Raises:
            RunError: there is none of that name.
        """
        names = self.checkpoint_names()
        if name not in names:
            have = f"it has: {', '.join(names)}" if names else "it has none"
            raise RunError(f"this run has no checkpoint {name}", where=str(self.path), remedy=have)
        return self.checkpoints / name

    def recipe(self, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe as it was resolved; what was moved together with the run is found there.

        Args:
            overrides: `section.key=value`, as in `load_recipe`.

        Raises:
            RunError: the file is missing or was damaged.
            RecipeError: an override is wrong.
        """
        try:
            load_recipe(self.path / RECIPE)
        except RecipeError as error:
            raise RunError(
                f"the run's recipe cannot be read: {error}", where=str(self.path / RECIPE)
            ) from None
        recipe = load_recipe(self.path / RECIPE, overrides)
        moved = self.moved()
        return with_paths(recipe, lambda path: moved.get(path, path)) if moved else recipe

    def moved(self) -> dict[str, str]:
        """Absolute paths of the recipe where nothing is any more, and where it is now."""
        try:
            places = self._written_status().get("places")
        except RunError:
            return {}
        return moved_places(places, self.path) if isinstance(places, dict) else {}

    def write_recipe(self, recipe: Recipe) -> None:
        """Keep another recipe with the run, or the same with its paths as they are now."""
        kept = {k: v for k, v in self.status().items() if k == "hashes"}
        write_text(self.path / RECIPE, dump_recipe(recipe))
        self.write_status(places=places_of(recipe, self.path), **kept)

    def status(self) -> dict[str, Any]:
        """What run.json says; a run that nobody trains any more is not `running`.

        Raises:
            RunError: it cannot be read.
        """
        value = self._written_status()
        if value["status"] == "running" and not self._is_held():
            value["status"] = "interrupted"  # it was killed before it could say so
        if (hashes := value.get("hashes")) and (moved := self.moved()):
            value["hashes"] = {relocated(name, moved): known for name, known in hashes.items()}
        return value

    def _is_held(self) -> bool:
        """Whether somebody trains here; where that cannot be told, it is so."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _written_status(self) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self.path / STATUS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"the run's status cannot be read: {error}",
                where=str(self.path / STATUS),
                remedy=_MEND,
            ) from None
        if not isinstance(value, dict) or "status" not in value:
            raise RunError(
                "the run's status is damaged", where=str(self.path / STATUS), remedy=_MEND
            )
        return value

    def write_status(self, **changes: Any) -> None:
        """Change entries of run.json."""
        before = self._written_status() if (self.path / STATUS).is_file() else {}
        write_json(self.path / STATUS, before | changes)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        path = self.path / METRICS
        with storage_errors(path), path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Objects of metrics.jsonl; a line cut off by a crash is passed over."""
        if not (self.path / METRICS).is_file():
            return
        text = (self.path / METRICS).read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            with suppress(ValueError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry

    def forget_after(self, step: int) -> None:
        """Drop what metrics.jsonl says of steps after `step`, which will be run again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        write_text(self.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))


def status_text(status: Mapping[str, Any]) -> str:
    """A run's status for people; of one that failed also why, as in `failed: out of memory`.

    Args:
        status: what run.json says.
    """
    word, why = str(status["status"]), status.get("error")
    return f"{word}: {why}" if word == "failed" and why else word


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter: of a finished run, of a checkpoint (`RUN@step-N`), or as given.

    Raises:
        RunError: it is a run that has not come to its end, or has no such checkpoint.
    """
    if (path / STATUS).is_file():
        return Run(path).finished_adapter()
    return checkpoint_named(path) or path


def checkpoint_named(path: Path) -> Path | None:
    """The folder of what `RUN@step-N` names; None where that is not meant.

    Raises:
        RunError: there is no such run, or it has no such checkpoint.
    """
    run, at, name = path.name.rpartition("@")
    if not at or not run or not name.startswith("step-") or path.exists():
        return None
    return Run.open(path.with_name(run)).checkpoint(name)


def meant(path: Path) -> str | None:
    """What lies beside a path where nothing is, and may be meant: a remedy, or None."""
    if path.exists():
        return None
    folders = [path.parent]
    if path.parent == Path():
        folders.append(Path("runs"))
    beside: dict[str, Path] = {}
    for folder in folders:
        with suppress(OSError):
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() or entry.suffix.lower() == ".gguf":
                    beside.setdefault(entry.name, entry)
    near = get_close_matches(path.name, beside, n=3)
    if near:
        return f"did you mean {' or '.join(str(beside[name]) for name in near)}?"
    runs = [str(entry) for entry in beside.values() if (entry / STATUS).is_file()]
    return f"runs there are: {', '.join(runs[:8])}" if runs else None
