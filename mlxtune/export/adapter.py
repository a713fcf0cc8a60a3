"""An adapter alone, in the layout of another library."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune.adapters.gguf import write_gguf_adapter
from mlxtune.adapters.peft import write_peft
from mlxtune.adapters.saved import CONFIG, SavedAdapter
from mlxtune.adapters.store import write_mlx_lm
from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError
from mlxtune.export.handover import MODELFILE, HandOver, run_commands
from mlxtune.export.modelfile import Modelfile, modelfile
from mlxtune.export.ollama import require_name
from mlxtune.export.record import REPORT, SIZE, of_weights, read_record, require_same
from mlxtune.files import atomic_folder, write_json, write_text
from mlxtune.fuse import require_outside
from mlxtune.models.load import model_config
from mlxtune.models.resolve import resolve_model
from mlxtune.train.model import rows_of, tokenizer_of
from mlxtune.train.subject import Subject, find_subject

GGUF = "adapter.gguf"

# What each library reads, and how to load it there.
_LAYOUTS: dict[str, str] = {
    "peft": 'PeftModel.from_pretrained(model, "{folder}")',
    "mlx-lm": "mlx_lm.generate --model {base} --adapter-path {folder}",
    "gguf": "llama-server -m BASE.gguf --lora {folder}/adapter.gguf",
}


# Laid out as for llama.cpp, with a Modelfile.
OLLAMA = "ollama"


@dataclass(frozen=True)
class AdapterExport:
    """What was written.

    Attributes:
        folder: the adapter.
        layout: of which library.
        kind: `lora` or `dora`.
        layers: how many layers it goes on.
        load: how that library loads it.
        name: what Ollama is to call the model.
        modelfile: what the file of that name says; None for other layouts.
        written_before: whether it was there already, and has only been looked at.
    """

    folder: Path
    layout: str
    kind: str
    layers: int
    load: str
    name: str = ""
    modelfile: Modelfile | None = None
    written_before: bool = False

    def as_json(self, handed: HandOver | None = None) -> str:
        """For `--json`, with what became of it; the Modelfile is in the folder."""
        value: dict[str, Any] = asdict(self)
        del value["modelfile"], value["name"]
        if handed is not None:
            value["hand_over"] = asdict(handed)
        return json.dumps(value, indent=2, default=str)


def export_adapter(
    path: str | Path,
    layout: str,
    *,
    output: Path | None = None,
    model: str | None = None,
    base: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> AdapterExport:
    """Write an adapter for another library; the base model is not touched.

    Args:
        path: a run, `RUN@step-N`, or an adapter's folder as mlxtune, mlx-lm or PEFT writes it.
        layout: `peft`, `mlx-lm`, `gguf` for llama.cpp, or `ollama` for that and a Modelfile.
        output: folder to write; by default `export/<layout>` in the run, of a checkpoint
            `export/<layout>-step-N`.
        model: where its base model is, instead of where the run or the adapter says.
        base: for Ollama, what the adapter goes on: a model that Ollama has, or a .gguf file.
            By default the model that was trained, where that is Ollama's.
        name: what Ollama is to call the model; what the recipe says by default.
        overwrite: replace `output` if it exists. What was written for Ollama of the same
            adapter and on the same base is taken as it is without that.

    Raises:
        RunError: there is no finished run, and no adapter that is known, at `path`.
        ExportError: `path` is no run and `output` was not given, or Ollama is not told what
            the adapter goes on.
        OutputExists, StorageError: nothing was written.
    """
    subject = find_subject(str(path), base=model)
    run, adapter = subject.run, subject.saved()
    place = Path(adapter.where)
    if (model is not None or run is not None) and not Path(adapter.base).expanduser().exists():
        adapter = replace(adapter, base=subject.model.path)  # the project may have been moved
    if output is None:
        if run is None or (subject.checkpoint is None and not subject.own):
            raise ExportError(
                "an adapter that is no run's has no place to be written to",
                where=str(path),
                remedy="name one with --output",
            )
        step = subject.checkpoint
        output = run.path / "export" / (layout if step is None else f"{layout}-{step}")
    require_outside(output, Path(path) if run is None else run.path)
    write = _writer(layout, subject)
    marker = GGUF if layout in ("gguf", OLLAMA) else CONFIG
    made = None
    if layout == OLLAMA:
        recipe = subject.recipe()
        name = name or recipe.export.name or recipe.name
        require_name(name)
        made = _modelfile(adapter, subject, base)
    load = _LAYOUTS[layout].format(folder=output, base=adapter.base) if made is None else ""
    if made is not None and name is not None:
        load = " && ".join(run_commands(OLLAMA, output, name))
    export = AdapterExport(
        output, layout, adapter.kind, len(adapter.targets), load, name or "", made
    )
    if made is not None and not overwrite and _exported_before(output, place, made):
        return replace(export, written_before=True)
    with atomic_folder(output, overwrite=overwrite, marker=marker) as folder:
        write(folder, adapter)
        if made is not None:
            write_text(folder / MODELFILE, made.text())
            size = {SIZE: (folder / GGUF).stat().st_size}
            write_json(folder / REPORT, _made_of(place, made) | size)
    return export


def _exported_before(output: Path, place: Path, made: Modelfile) -> bool:
    """Whether what would be written is there, to be handed over again.

    Raises:
        OutputExists: an export is there that is another.
    """
    record = read_record(output)
    if record is None or not (output / GGUF).is_file():
        return False
    size = {SIZE: (output / GGUF).stat().st_size}
    require_same(output, record, _made_of(place, made) | size)
    return True


def _made_of(place: Path, made: Modelfile) -> dict[str, Any]:
    return {"adapter": of_weights(place), "modelfile": made.text()}


def _modelfile(adapter: SavedAdapter, subject: Subject, base: str | None) -> Modelfile:
    """FROM what the adapter goes on, with all else as the run's model wants it."""
    if base is None and adapter.base.startswith("ollama:"):
        base = adapter.base.removeprefix("ollama:")
    if base is None:
        raise ExportError(
            f"the adapter was trained on {adapter.base}; by what name Ollama has that is not known",
            where="--base",
            remedy="--base NAME, as `ollama list` has it, or a .gguf file, such as `mlxtune "
            f"convert {shlex.quote(adapter.base)} base.gguf` writes",
        )
    if base.endswith(".gguf"):
        file = Path(base).expanduser().absolute()
        if not file.is_file():
            raise ExportError("there is no such file", where=f"--base {base}")
        base = str(file)
    else:
        require_name(base, where="--base")
    subject.require_base()
    tokenizer, settings = tokenizer_of(subject.model), subject.recipe().shipping
    renderer = Renderer(tokenizer, rows=rows_of(subject.model))
    made = modelfile(renderer, tokenizer, settings, gguf=base)
    return replace(made, adapter=f"./{GGUF}")


def _writer(layout: str, subject: Subject) -> Callable[[Path, SavedAdapter], None]:
    if layout == "mlx-lm":
        return write_mlx_lm
    if layout in ("gguf", OLLAMA):
        return lambda folder, adapter: _write_gguf(folder, adapter, subject)
    rslora = subject.run is not None and subject.recipe().lora.rslora
    return lambda folder, adapter: write_peft(folder, adapter, rslora=rslora)


def _write_gguf(folder: Path, adapter: SavedAdapter, subject: Subject) -> None:
    """Which rows are reordered is known of the base; its config suffices."""
    subject.require_base()
    model = subject.model
    base = resolve_model(model.path, revision=model.revision, weights=False)
    write_gguf_adapter(folder / GGUF, adapter, model_config(base))
