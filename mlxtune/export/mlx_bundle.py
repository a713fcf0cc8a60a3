"""A run as a folder for Ollama's MLX engine: safetensors, tokenizer, a Modelfile, a model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.data.records import Conversation
from mlxtune.data.render import Sample
from mlxtune.evaluate.answers import answers
from mlxtune.export.bundle import CARD, export_folder, model_card
from mlxtune.export.handover import MODELFILE, HandOver
from mlxtune.export.mlx_engine import FLOATS, NotForEngine, refusal, renderers_for, type_for
from mlxtune.export.mlx_folder import Quantized, write_mlx_folder
from mlxtune.export.mlx_handover import TOKENS, create_command, hand_to_engine
from mlxtune.export.modelfile import Modelfile, modelfile
from mlxtune.export.record import REPORT, of_weights, read_record, require_same
from mlxtune.files import atomic_folder, require_apart, write_json, write_text
from mlxtune.fuse import model_places, require_outside
from mlxtune.models.load import LoadedModel, restore_template
from mlxtune.recipe.schema import ModelSection
from mlxtune.train.ending import ending_notes
from mlxtune.train.heldout import held_out_loss
from mlxtune.train.kept import records_to_try, rows_to_try
from mlxtune.train.model import layout_for, load_base
from mlxtune.train.outcome import adapter_lines, adapter_name
from mlxtune.train.subject import Subject, find_subject

# Records that losses are measured on, and of them those that Ollama is asked.
_MEASURED, _ASKED = 200, 12


@dataclass(frozen=True)
class MlxBundle:
    """What was exported.

    Attributes:
        folder: holds config.json, safetensors, the tokenizer, Modelfile, README.md, export.json.
        kind: how its matrices are quantized: of `TYPES`, `keep`, or a float type.
        size: of its weights, bytes.
        quantized: what became of its matrices.
        loss_before: of the model with its adapter, on held-out records, nats a token; None where
            there are no records.
        loss_after: of the folder, on the same.
        measured_on: how many records that are.
        modelfile: what the file of that name says.
        adapter: what was fused, and after which step it was kept, where that is known.
        why: why it is for this engine.
        warnings: what its run's losses say against it.
        written_before: whether it was there already, and has only been looked at.
        notes: remarks.
    """

    folder: Path
    kind: str
    size: int
    quantized: Quantized
    loss_before: float | None
    loss_after: float | None
    measured_on: int
    modelfile: Modelfile
    adapter: str
    why: str = ""
    warnings: tuple[str, ...] = ()
    written_before: bool = False
    notes: tuple[str, ...] = ()
    _records: tuple[Conversation, ...] = field(default=(), repr=False)

    def as_json(self, handed: HandOver | None = None) -> str:
        """For `--json`, with what became of it; the Modelfile is in the folder."""
        value = asdict(self)
        del value["modelfile"], value["_records"]
        if handed is not None:
            value["hand_over"] = asdict(handed)
        return json.dumps(value, indent=2, default=str)

    def hand_over(
        self,
        name: str,
        *,
        dry_run: bool = False,
        by_default: bool = False,
        progress: Callable[[str], None],
    ) -> HandOver:
        """Give it to Ollama; see `hand_to_engine`."""
        model = _opened(self.folder)
        renderer = model.renderer()
        prompts = [renderer.prompt(record) for record in self._records]
        expected: list[str] = []
        if not dry_run and prompts:
            progress("answering in MLX")
            expected = answers(model.model, model.tokenizer, prompts, max_tokens=TOKENS)
        return hand_to_engine(
            self.folder,
            name,
            self.modelfile,
            model.config,
            renderer,
            records=self._records,
            answers=expected,
            dry_run=dry_run,
            by_default=by_default,
            progress=progress,
        )


def export_for_mlx(
    path: str | Path,
    *,
    kind: str | None = None,
    adapter: Path | None = None,
    base: str | None = None,
    output: Path | None = None,
    name: str | None = None,
    keep_template: bool = False,
    overwrite: bool = False,
    why: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> MlxBundle:
    """Fuse a run and write it for Ollama's MLX engine, or find what was written before.

    Args:
        path: a run, `RUN@step-N`, an adapter's folder, or with `adapter` any model.
        kind: of `mlx_engine.TYPES`; `bf16`, `f16` or `f32`; or `keep`, the default: as the base
            is quantized, or floats where it is not.
        adapter: an adapter to put on the model, or to use instead of the run's own.
        base: the model to use instead of the one that the run or the adapter names.
        output: folder to write; by default `export/mlx-<kind>` in the run.
        name: what Ollama is to call it; what the recipe says by default.
        keep_template: leave the chat template as it was before the training.
        overwrite: replace `output` if it exists.
        why: why it is for this engine, to be said.
        progress: called with what is being done.

    Raises:
        NotForEngine: the engine would not compute, tokenize or ask as was trained.
        OutputExists, StorageError: nothing was written.
    """
    subject = find_subject(str(path), adapter=adapter, base=base)
    recipe = subject.recipe()
    kind = type_for(kind, recipe.export.quantize)
    weights = Path(subject.saved().where)
    folder = export_folder(subject, output, f"mlx-{kind}")
    if subject.run is not None:
        require_outside(folder, subject.run.path)
    model = subject.load(for_inference=False)
    if said := refusal(model.config):
        raise NotForEngine(
            f"Ollama's MLX engine would not compute this model: {said}", where=subject.name
        )
    if keep_template:
        restore_template(model.tokenizer)
    renderer = model.renderer()
    made = modelfile(renderer, model.tokenizer, recipe.shipping, gguf=".")
    if made.template is None and not renderers_for(model.config):
        raise NotForEngine(
            "Ollama's MLX engine does not run the model's own chat template, and none in its "
            "language is known that writes the same",
            where=subject.name,
        )
    records = () if subject.run is None else tuple(records_to_try(subject.run, _ASKED))
    samples = [] if subject.run is None else rows_to_try(subject.run, renderer, _MEASURED)
    made_of: dict[str, Any] = {
        "kind": kind,
        "adapter": of_weights(weights),
        "keep_template": keep_template,
    }
    kept = None if overwrite else read_record(folder)
    if kept is not None:
        require_same(folder, kept, made_of)
    record = kept or _written(
        folder, subject, model, made_of, made, samples, overwrite, name, progress
    )
    return MlxBundle(
        folder=folder,
        kind=kind,
        size=sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
        quantized=Quantized(**record["quantized"]),
        loss_before=record["loss_before"],
        loss_after=record["loss_after"],
        measured_on=record["measured_on"],
        modelfile=made,
        adapter=adapter_name(weights),
        why=why,
        warnings=tuple(adapter_lines(weights)),
        written_before=kept is not None,
        notes=tuple(ending_notes(model.tokenizer)),
        _records=records,
    )


def _written(
    folder: Path,
    subject: Subject,
    model: LoadedModel,
    made_of: dict[str, Any],
    made: Modelfile,
    samples: Sequence[Sample],
    overwrite: bool,
    name: str | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write the folder, measure it, and say what it keeps of that."""
    recipe, kind = subject.recipe(), made_of["kind"]
    called = name or recipe.export.name or recipe.name
    command = f"{shlex.join(create_command(Path(), called))} && ollama run {shlex.quote(called)}"
    card = model_card(subject, recipe, kind, {"Ollama": command}, library="mlx")
    used = (*model_places(model.source.path), Path(subject.saved().where))
    with atomic_folder(folder, overwrite=overwrite, marker=REPORT) as temporary:
        require_apart(folder, used)
        before = _loss(model, samples, progress)
        stored = FLOATS.get(kind, kind)
        texts = [model.renderer().decode(sample.tokens) for sample in samples]
        quantized = write_mlx_folder(temporary, model, stored, texts, progress=progress)
        write_text(temporary / MODELFILE, made.text())
        write_text(temporary / CARD, card)
        after = _loss(_opened(temporary), samples, progress)
        found = made_of | {
            "quantized": asdict(quantized),
            "loss_before": before,
            "loss_after": after,
            "measured_on": len(samples),
        }
        write_json(temporary / REPORT, found)
    return found


def _opened(folder: Path) -> LoadedModel:
    return load_base(ModelSection(path=str(folder)))


def _loss(
    model: LoadedModel, samples: Sequence[Sample], progress: Callable[[str], None]
) -> float | None:
    if not samples:
        return None
    progress(f"measuring the loss on {len(samples)} records")
    return held_out_loss(model.model, samples, batch_size=8, layout=layout_for(False, model.config))
