"""A run as a folder to ship: model.gguf, a Modelfile, a model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlxtune
from mlxtune.data.render import Renderer
from mlxtune.errors import ExportError
from mlxtune.export.calibrate import importance_of
from mlxtune.export.convert import Verified, write_model
from mlxtune.export.handover import GGUF, LABELS, MODELFILE, HandOver, run_commands
from mlxtune.export.modelfile import Modelfile, modelfile
from mlxtune.export.record import (
    REPORT,
    SIZE,
    different,
    of_file,
    of_weights,
    read_record,
    require_same,
)
from mlxtune.export.runtime import ROWS, RuntimeCheck
from mlxtune.export.source import from_loaded, language_model
from mlxtune.export.verify import Readback
from mlxtune.files import atomic_folder, require_apart, write_json, write_text
from mlxtune.fuse import model_places, require_outside
from mlxtune.gguf.architectures import for_config
from mlxtune.gguf.mixing import FILE_TYPES
from mlxtune.models.load import LoadedModel, restore_template
from mlxtune.models.resolve import is_hub_id, public_name
from mlxtune.recipe.schema import Recipe
from mlxtune.train.ending import ending_notes
from mlxtune.train.kept import rows_to_try
from mlxtune.train.model import rows_of, tokenizer_of
from mlxtune.train.outcome import adapter_lines, adapter_name, adapter_step, judge, outcome
from mlxtune.train.run import Run
from mlxtune.train.subject import Subject, find_subject

CARD = "README.md"
_DEFAULT = "q8_0"


@dataclass(frozen=True)
class Bundle:
    """What was exported.

    Attributes:
        folder: holds model.gguf, Modelfile, README.md and export.json.
        file_type: of the GGUF.
        gguf_bytes: its size.
        verified: how it differs from the trained model; None if it was not looked at.
        commands: runtime to the command that runs it.
        modelfile: what the file of that name says.
        adapter: what was fused, and after which step it was kept, where that is known.
        warnings: what its run's losses say against it.
        unweighed: how many matrices the importance that was given says nothing of.
        written_before: whether it was there already, and has only been looked at.
        notes: remarks.
    """

    folder: Path
    file_type: str
    gguf_bytes: int
    verified: Verified | None
    commands: dict[str, str]
    modelfile: Modelfile
    adapter: str
    warnings: tuple[str, ...] = ()
    unweighed: int = 0
    written_before: bool = False
    notes: tuple[str, ...] = ()

    def as_json(self, handed: HandOver | None = None) -> str:
        """For `--json`, with what became of it; the Modelfile is in the folder."""
        value: dict[str, Any] = asdict(self)
        del value["modelfile"]
        if handed is not None:
            value["hand_over"] = asdict(handed)
        return json.dumps(value, indent=2, default=str)


def export_run(
    path: str | Path,
    *,
    adapter: Path | None = None,
    base: str | None = None,
    output: Path | None = None,
    file_type: str | None = None,
    name: str | None = None,
    imatrix: Path | None = None,
    pre: str | None = None,
    calibration: Path | None = None,
    save_imatrix: Path | None = None,
    verify: bool = True,
    keep_template: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Fuse a run and write it for Ollama, llama.cpp and mistral.rs.

    Args:
        path: a run, `RUN@step-N`, an adapter's folder, or with `adapter` any model.
        adapter: an adapter to put on the model, or to use instead of the run's own.
        base: the model to use instead of the one that the run or the adapter names.
        output: folder to write; by default `export/<file type>` in the run, of a checkpoint
            `export/<file type>-step-N`.
        file_type: of `FILE_TYPES`; what the recipe says by default.
        name: what Ollama is to call it; what the recipe says by default.
        imatrix: llama.cpp's importance matrix.
        pre: llama.cpp's name of the pre-tokenizer, where it is not recognised.
        calibration: in its place, texts to find the importance by.
        save_imatrix: where to keep what was found.
        verify: read the file back and compare it, in llama.cpp too if that is installed.
        keep_template: leave the chat template as it was before the training, without the values
            that make it ask as the model was trained.
        overwrite: replace `output` if it exists.
        progress: is told what is being done.

    Raises:
        ExportError: the model's architecture, tokenizer or Modelfile cannot be written.
        OutputExists, StorageError: nothing was written.
    """
    subject = find_subject(str(path), adapter=adapter, base=base)
    weights = Path(subject.saved().where)
    recipe = subject.recipe()
    file_type = gguf_type(file_type, recipe)
    folder = export_folder(subject, output, file_type)
    if subject.run is not None:
        require_outside(folder, subject.run.path)
    model = subject.load(for_inference=False)
    given = [p for p in (imatrix, calibration, save_imatrix, weights) if p is not None]
    used = (*model_places(model.source.path), *given)
    for_config(model.config)
    if keep_template:
        restore_template(model.tokenizer)
    name = name or recipe.export.name or recipe.name
    ollama = modelfile(model.renderer(), model.tokenizer, recipe.shipping)
    # The folder is shipped: its card knows no place on this machine.
    card = model_card(subject, recipe, file_type, _commands(Path(), name))
    made_of = _made_of(weights, file_type, pre, imatrix, calibration, keep_template)
    # A folder for Ollama's MLX engine has no GGUF, and one of old has no report.
    marker = REPORT if (folder / REPORT).is_file() else GGUF
    with atomic_folder(folder, overwrite=overwrite, marker=marker) as temporary:
        require_apart(folder, used)
        importance = importance_of(
            lambda: model,
            file_type,
            imatrix=imatrix,
            calibration=calibration,
            save=save_imatrix,
            overwrite=overwrite,
            progress=progress,
        )
        written, verified = write_model(
            temporary / GGUF,
            language_model(from_loaded(recipe.name, model)),
            file_type=file_type,
            importance=importance,
            pre=pre,
            verify=verify,
            rows=partial(_rows_to_try, subject, model),
            progress=progress,
        )
        seen = {} if verified is None else asdict(verified)
        size = {SIZE: (temporary / GGUF).stat().st_size}
        write_json(temporary / REPORT, made_of | size | seen)
        write_text(temporary / MODELFILE, ollama.text())
        write_text(temporary / CARD, card)
    commands = _commands(folder, name)
    return Bundle(
        folder,
        file_type,
        size[SIZE],
        verified,
        commands,
        ollama,
        adapter_name(weights),
        tuple(adapter_lines(weights)),
        unweighed=len(written.unweighed),
        notes=tuple(ending_notes(model.tokenizer)),
    )


def exported_before(
    path: str | Path,
    *,
    adapter: Path | None = None,
    base: str | None = None,
    output: Path | None = None,
    file_type: str | None = None,
    name: str | None = None,
    imatrix: Path | None = None,
    pre: str | None = None,
    calibration: Path | None = None,
    verify: bool = True,
    keep_template: bool = False,
) -> Bundle | None:
    """What `export_run` has written of this run, to be handed over again.

    Args:
        path, adapter, base, output, file_type, name, imatrix, pre, calibration, keep_template: as
            in `export_run`.
        verify: it has to have been read back.

    Returns:
        None if no export is there.

    Raises:
        OutputExists: an export is there that is not what `export_run` would write.
    """
    subject = find_subject(str(path), adapter=adapter, base=base)
    recipe = subject.recipe()
    file_type = gguf_type(file_type, recipe)
    folder = export_folder(subject, output, file_type)
    record = read_record(folder)
    if record is None or not (folder / GGUF).is_file():
        return None
    subject.require_base()
    size = (folder / GGUF).stat().st_size
    weights = Path(subject.saved().where)
    wanted = _made_of(weights, file_type, pre, imatrix, calibration, keep_template) | {SIZE: size}
    require_same(folder, record, wanted)
    verified = _read_verified(record)
    if verify and verified is None:
        raise different(folder, "it was not read back (--no-verify hands it over as it is)")
    tokenizer = tokenizer_of(recipe.model)
    if keep_template:
        restore_template(tokenizer)
    renderer = Renderer(tokenizer, rows=rows_of(recipe.model))
    ollama = modelfile(renderer, tokenizer, recipe.shipping)
    commands = _commands(folder, name or recipe.export.name or recipe.name)
    return Bundle(
        folder,
        file_type,
        size,
        verified,
        commands,
        ollama,
        adapter_name(weights),
        tuple(adapter_lines(weights)),
        written_before=True,
        notes=tuple(ending_notes(tokenizer)),
    )


def gguf_type(asked: str | None, recipe: Recipe) -> str:
    """The type of a GGUF's weights: as asked, as the recipe says, or q8_0.

    Raises:
        ExportError: it is a type of Ollama's MLX engine.
    """
    said = recipe.export.quantize
    found = asked or (_DEFAULT if said == "auto" else said)
    if found not in FILE_TYPES:
        raise ExportError(
            f"{found} is a type of Ollama's MLX engine, not of a GGUF",
            where="--quantize" if asked else "export.quantize",
            remedy="choose a type of GGUF, such as q8_0, or --engine mlx",
        )
    return found


def _read_verified(record: dict[str, Any]) -> Verified | None:
    """What `export_run` has kept of what it saw; None where it did not look."""
    try:
        ran = record["llamacpp"]
        return Verified(
            Readback(**record["readback"]),
            None if ran is None else RuntimeCheck(**ran),
            record["tried_on"],
            record["not_run"],
        )
    except (KeyError, TypeError):
        return None


def export_folder(subject: Subject, output: Path | None, file_type: str) -> Path:
    """Where an export is written: as asked, or into the run that it is of.

    Raises:
        ExportError: it is of no run, and nobody says where.
    """
    if output is not None:
        return output
    if subject.run is None:
        raise ExportError(
            "an adapter that is no run's has no place to be written to",
            where=subject.name,
            remedy="name one with --output",
        )
    step = subject.checkpoint
    return subject.run.path / "export" / (file_type if step is None else f"{file_type}-{step}")


def _made_of(
    adapter: Path,
    file_type: str,
    pre: str | None,
    imatrix: Path | None,
    calibration: Path | None,
    keep_template: bool,
) -> dict[str, Any]:
    """What tells an export from others, and from those of the run before it was overwritten."""
    return {
        "file_type": file_type,
        "pre": pre,
        "adapter": of_weights(adapter),
        "imatrix": of_file(imatrix),
        "calibration": of_file(calibration),
        "keep_template": keep_template,
    }


def _rows_to_try(subject: Subject, model: LoadedModel) -> list[list[int]] | None:
    """What the file is tried with; None where there are no records, or they are gone."""
    if subject.run is None:
        return None
    samples = rows_to_try(subject.run, model.renderer(), ROWS)
    return [sample.tokens.tolist() for sample in samples] or None


def _commands(folder: Path, name: str) -> dict[str, str]:
    """The command that runs the exported model, for each runtime."""
    commands = {label: run_commands(to, folder, name) for to, label in LABELS.items()}
    return {
        label: " && ".join(lines) if label == "Ollama" else lines[-1]
        for label, lines in commands.items()
    }


def model_card(
    subject: Subject,
    recipe: Recipe,
    file_type: str,
    commands: dict[str, str],
    *,
    library: str = "gguf",
) -> str:
    """README.md of an exported model: what it is, how it was made, how to run it.

    Of an adapter that is not the run's own it is not known how it was made.

    Args:
        subject: what was exported.
        recipe: of it.
        file_type: of the weights.
        commands: runtime to the command that runs it.
        library: that the files are for, as the hub calls it: `gguf` or `mlx`.
    """
    run, kind = subject.run, subject.saved().kind
    method = "DoRA" if kind == "dora" else "LoRA"
    base = public_name(recipe.model.path)
    lines = [
        "---",
        *([f"base_model: {base}"] if is_hub_id(base) else []),
        f"library_name: {library}",
        f"tags: [mlxtune, {method.lower()}]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"A {method} fine-tune of `{base}`, fused and converted to {library.upper()} "
        f"({file_type.upper()}).",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
    ]
    if run is not None and subject.own:
        lines += _made(run, recipe)
    elif subject.adapter is not None:
        step = adapter_step(subject.adapter)
        after = f", after step {step}" if step else ""
        given = subject.adapter_name or subject.adapter
        lines.append(f"| adapter | `{Path(given).name}`{after} |")
    lines += ["", "## How to run it", "", "In this folder:", ""]
    lines += [f"- {runtime}: `{command}`" for runtime, command in commands.items()]
    versions = run.status().get("versions", {}) if run is not None else {}
    made_with = versions.get("mlxtune", "of an unknown version") if run else mlxtune.__version__
    lines += ["", f"Made with mlxtune {made_with}."]
    return "\n".join(lines) + "\n"


def _made(run: Run, recipe: Recipe) -> list[str]:
    """Rows of a table that says how a run was trained."""
    train = [entry for entry in run.metrics() if "loss" in entry]
    found = outcome(run.metrics())
    lines = [
        f"| data | {', '.join(f'`{Path(s.path).name}`' for s in recipe.data)} |",
        f"| adapter | rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g} on "
        f"{', '.join(recipe.lora.target_modules)} |",
        f"| learning rate | {recipe.train.learning_rate:g}, {recipe.train.lr_scheduler} |",
        f"| seed | {recipe.seed} |",
    ]
    if train:
        last = train[-1]
        lines.append(f"| steps | {last['step']} ({last['examples']} examples) |")
    if found.before is not None and found.after is not None:
        worse = ": worse than before training" * (judge(found.before, found.after) == "worse")
        lines.append(
            f"| held-out loss | {found.before:.4f} before, {found.after:.4f} after{worse} |"
        )
    return lines
