"""An adapter alone, in the layout of another library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxtune.adapters.gguf import write_gguf_adapter
from mlxtune.adapters.peft import write_peft
from mlxtune.adapters.saved import CONFIG, SavedAdapter
from mlxtune.adapters.store import read_adapter, write_mlx_lm
from mlxtune.errors import ExportError
from mlxtune.files import atomic_folder
from mlxtune.fuse import require_outside
from mlxtune.models.load import model_config
from mlxtune.models.resolve import resolve_model
from mlxtune.train.run import STATUS, Run, adapter_folder

GGUF = "adapter.gguf"

# What each library reads, and how to load it there.
_LAYOUTS: dict[str, str] = {
    "peft": 'PeftModel.from_pretrained(model, "{folder}")',
    "mlx-lm": "mlx_lm.generate --model {base} --adapter-path {folder}",
    "gguf": "llama-server -m BASE.gguf --lora {folder}/adapter.gguf",
}


@dataclass(frozen=True)
class AdapterExport:
    """What was written.

    Attributes:
        folder: the adapter.
        layout: of which library.
        kind: `lora` or `dora`.
        layers: how many layers it goes on.
        load: how that library loads it.
    """

    folder: Path
    layout: str
    kind: str
    layers: int
    load: str


def export_adapter(
    path: Path, layout: str, *, output: Path | None = None, overwrite: bool = False
) -> AdapterExport:
    """Write an adapter for another library; the base model is not touched.

    Args:
        path: a run, or an adapter's folder as mlxtune, mlx-lm or PEFT writes it.
        layout: `peft`, `mlx-lm`, or `gguf` for llama.cpp and Ollama.
        output: folder to write; `export/<layout>` in the run by default.
        overwrite: replace `output` if it exists.

    Raises:
        RunError: there is no finished run, and no adapter that is known, at `path`.
        ExportError: `path` is no run and `output` was not given.
        OutputExists, StorageError: nothing was written.
    """
    run = Run(path) if (path / STATUS).is_file() else None
    adapter = read_adapter(adapter_folder(path))
    if output is None:
        if run is None:
            raise ExportError(
                "an adapter that is no run's has no place to be written to",
                where=str(path),
                remedy="name one with --output",
            )
        output = path / "export" / layout
    require_outside(output, path)
    revision = None
    if run is not None and run.recipe().model.path == adapter.base:
        revision = run.recipe().model.revision
    write = _writer(layout, run, revision)
    marker = GGUF if layout == "gguf" else CONFIG
    with atomic_folder(output, overwrite=overwrite, marker=marker) as folder:
        write(folder, adapter)
    load = _LAYOUTS[layout].format(folder=output, base=adapter.base)
    return AdapterExport(output, layout, adapter.kind, len(adapter.targets), load)


def _writer(
    layout: str, run: Run | None, revision: str | None
) -> Callable[[Path, SavedAdapter], None]:
    if layout == "mlx-lm":
        return write_mlx_lm
    if layout == "gguf":
        return lambda folder, adapter: _write_gguf(folder, adapter, revision)
    rslora = run is not None and run.recipe().lora.rslora
    return lambda folder, adapter: write_peft(folder, adapter, rslora=rslora)


def _write_gguf(folder: Path, adapter: SavedAdapter, revision: str | None) -> None:
    """Which rows are reordered is known of the base; its config suffices."""
    base = resolve_model(adapter.base, revision=revision, weights=False)
    write_gguf_adapter(folder / GGUF, adapter, model_config(base))
