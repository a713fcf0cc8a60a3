"""What a verb was given, as a model with its adapter: a run, a checkpoint, a folder, a name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlxtune.adapters.saved import CONFIG, SavedAdapter, read_config
from mlxtune.adapters.store import put_adapter, read_adapter
from mlxtune.errors import ModelError, RunError
from mlxtune.models.load import LoadedModel
from mlxtune.models.resolve import is_hub_id
from mlxtune.recipe.schema import DataSource, ModelSection, Recipe
from mlxtune.train.checkpoint import STATE, checkpoint_adapter
from mlxtune.train.model import load_base
from mlxtune.train.run import STATUS, Run, adapter_folder, meant

_EXPORTED = "model.gguf"
# As such a base is called where an adapter is read.
_UNNAMED = "another model"
_NAMED = ("pkg:", "ollama:")


@dataclass(frozen=True)
class Subject:
    """A model, and the adapter on it if there is one.

    Attributes:
        name: as it was given.
        model: the base, or the whole model where there is no adapter.
        adapter: folder of the adapter: of any layout, or a checkpoint.
        run: whose recipe it goes by.
        own: whether the adapter is the run's final one.
        adapter_name: the adapter as it was given, where it is not the run's own.
    """

    name: str
    model: ModelSection
    adapter: Path | None = None
    run: Run | None = None
    own: bool = False
    adapter_name: str | None = None

    @property
    def checkpoint(self) -> str | None:
        """`step-N` where the adapter is a checkpoint's."""
        is_one = self.adapter is not None and (self.adapter / STATE).is_file()
        return self.adapter.name if self.adapter is not None and is_one else None

    @property
    def title(self) -> str:
        """A name for people and files, without the folders above it."""
        if self.run is not None:
            return self.run.recipe().name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.name).absolute().name).strip("-._") or "x"

    def recipe(self) -> Recipe:
        """The run's recipe, on this base; without a run, one of defaults.

        Raises:
            RunError: the run's recipe is damaged.
        """
        if self.run is not None:
            return self.run.recipe().model_copy(update={"model": self.model})
        return Recipe(name=self.title, model=self.model, data=(DataSource(path=self.name),))

    def require_base(self) -> None:
        """See that the base is known, and is where the run or the adapter says that it is.

        Raises:
            ModelError: it is not.
        """
        if self.model.path == _UNNAMED:
            raise ModelError(
                "this adapter does not say which model it belongs to",
                where=self.name,
                remedy="name it with --model",
            )
        path = Path(self.model.path).expanduser()
        if self.adapter is not None and path.is_absolute() and not path.exists():
            raise ModelError(
                f"the model that it was trained on is not at {path}",
                where=self.name,
                remedy="say with --model where it is now",
            )

    def saved(self) -> SavedAdapter:
        """The adapter, read.

        Raises:
            RunError: there is none, or it is damaged.
        """
        if self.adapter is None:
            raise RunError(
                "there is no adapter here",
                where=self.name,
                remedy="this is a model: name an adapter for it with --adapter",
            )
        return _read(self.adapter)

    def load(self, *, for_inference: bool = True) -> LoadedModel:
        """The model, its adapter in place.

        Args:
            for_inference: see `load_base`.

        Raises:
            ModelError: the model cannot be found or loaded.
            RunError: the adapter is damaged, or does not fit the model.
        """
        saved = self.saved() if self.adapter is not None else None
        self.require_base()
        loaded = load_base(self.model, for_inference=for_inference)
        if saved is not None:
            put_adapter(saved, loaded.model)
        loaded.model.eval()
        return loaded


def find_subject(name: str, *, adapter: Path | None = None, base: str | None = None) -> Subject:
    """What is meant by a name.

    Args:
        name: a run's folder, `RUN@step-N` for a checkpoint of it, an adapter's folder as
            mlxtune, mlx-lm or PEFT writes it, a folder that `mlxtune export` wrote, or what a
            recipe takes as `model.path`.
        adapter: another adapter than the run's own, or one to put on the model: a folder, a
            run or `RUN@step-N`.
        base: the model to use instead of the one that the run or the adapter names.

    Raises:
        RunError: there is nothing of that name; or the run has no adapter yet, or no such
            checkpoint.
        ModelError: the base is no longer where the run has it.
    """
    path = Path(name).expanduser()
    run, named = _run_and_adapter(path)
    if base is not None and run is None and named is None:
        raise ModelError(
            "--model names the base of a run or of an adapter, and this is neither", where=name
        )
    folder = named
    if adapter is not None:
        folder = adapter_folder(adapter.expanduser())
    elif run is not None and named is None:
        folder = run.finished_adapter()
    own = run is not None and folder == run.adapter
    if run is not None:
        section = run.recipe().model
    elif named is not None:
        section = _base_of(named, base)
    else:
        section = ModelSection(path=_model_named(name))
    if base is not None:
        section = section.model_copy(update={"path": base, "revision": None})
    given = adapter or folder
    return Subject(name, section, folder, run, own, None if own or not given else str(given))


def saved_adapter(path: Path) -> SavedAdapter:
    """An adapter by its place: a folder, a finished run, or a checkpoint.

    Raises:
        RunError: there is none, it is damaged, or of a kind that cannot be used here.
    """
    return _read(adapter_folder(path))


def _read(folder: Path) -> SavedAdapter:
    run = _run_of_checkpoint(folder)
    if run is None:
        return read_adapter(folder)
    recipe = run.recipe()
    return checkpoint_adapter(folder, recipe.lora, recipe.model.path)


def _run_and_adapter(path: Path) -> tuple[Run | None, Path | None]:
    """The run that is meant or that an adapter lies in, and the adapter's folder."""
    if (path / STATUS).is_file():
        return Run(path), None
    folder = adapter_folder(path)
    if (run := _run_of_checkpoint(folder)) is not None:
        return run, folder
    if not _is_adapter(folder):
        return None, None
    beside = folder.absolute().parent
    return (Run(folder.parent) if (beside / STATUS).is_file() else None), folder


def _run_of_checkpoint(folder: Path) -> Run | None:
    run = folder.absolute().parent.parent
    there = (folder / STATE).is_file() and (run / STATUS).is_file()
    return Run(folder.parent.parent) if there else None


def _is_adapter(folder: Path) -> bool:
    """A folder of an adapter alone: a model may have the config of one beside its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def _base_of(folder: Path, base: str | None) -> ModelSection:
    """The model that an adapter says it belongs to."""
    config = read_config(folder)
    named = base or config.get("base_model_name_or_path") or config.get("model") or _UNNAMED
    beside = folder / Path(str(named)).expanduser()
    if not Path(str(named)).expanduser().exists() and beside.exists():
        named = beside
    revision = config.get("revision")
    return ModelSection(path=str(named), revision=revision if isinstance(revision, str) else None)


def _model_named(name: str) -> str:
    """What a recipe would call the model; one that can only be a run's or a file's is refused."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        return _exported_in(path) or name
    if path.exists() or name.startswith(_NAMED):
        return name
    if name.lower().endswith(".gguf") or (is_hub_id(name) and not _among_runs(path)):
        return name
    raise RunError(
        "there is no such run and no such model",
        where=name,
        remedy=meant(path)
        or "a run is a folder that `mlxtune lora` has made, a model a folder, a .gguf file or a "
        "hub id, OWNER/NAME",
    )


def _exported_in(folder: Path) -> str | None:
    """The GGUF of a folder that an export wrote."""
    if (folder / _EXPORTED).is_file():
        return str(folder / _EXPORTED)
    inside = sorted(folder.glob("*.gguf"))
    if len(inside) == 1 and inside[0].name != "adapter.gguf":
        return str(inside[0])
    return None


def _among_runs(path: Path) -> bool:
    """Whether a name has the form of a hub id and lies where runs are."""
    if path.parent.name == "runs":
        return True
    return path.parent.is_dir() and any(path.parent.glob(f"*/{STATUS}"))
