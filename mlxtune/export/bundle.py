"""A run as a folder to ship: model.gguf, a Modelfile, a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxtune.data.render import Renderer
from mlxtune.export.modelfile import modelfile
from mlxtune.files import atomic_folder, write_text
from mlxtune.fuse import require_outside
from mlxtune.gguf.architectures import for_config
from mlxtune.gguf.tokenizer import tokenizer_metadata
from mlxtune.gguf.writer import SourceTensor, write_gguf
from mlxtune.layers.dense import DenseTensor, dense_tensors
from mlxtune.models.load import LoadedModel
from mlxtune.recipe.schema import Recipe
from mlxtune.train.run import Run
from mlxtune.train.session import open_run

GGUF, MODELFILE, CARD = "model.gguf", "Modelfile", "README.md"


@dataclass(frozen=True)
class Bundle:
    """What was exported.

    Attributes:
        folder: holds model.gguf, Modelfile and README.md.
        file_type: of the GGUF.
        gguf_bytes: its size.
        commands: runtime to the command that runs it.
    """

    folder: Path
    file_type: str
    gguf_bytes: int
    commands: dict[str, str]


def export_run(
    path: Path, *, output: Path | None = None, file_type: str | None, overwrite: bool = False
) -> Bundle:
    """Fuse a run and write it for Ollama, llama.cpp and mistral.rs.

    Args:
        path: the run.
        output: folder to write; `export/<file type>` in the run by default.
        file_type: `f16` or `q8_0`; what the recipe says by default.
        overwrite: replace `output` if it exists.

    Raises:
        ExportError: the model's architecture or tokenizer cannot be written.
        OutputExists, StorageError: nothing was written.
    """
    run, model = open_run(path, for_inference=False)
    recipe = run.recipe()
    file_type = file_type or recipe.export.quantize
    folder = output or path / "export" / file_type
    require_outside(folder, path)
    for_config(model.config)
    tokenizer = tokenizer_metadata(model.tokenizer._tokenizer, int(model.config["vocab_size"]))
    commands = run_commands(folder, recipe.name)
    card = model_card(run, recipe, model, file_type, commands)
    with atomic_folder(folder, overwrite=overwrite, marker=GGUF) as temporary:
        write_gguf(
            temporary / GGUF,
            config=model.config,
            tensors=map(_source, dense_tensors(model.model)),
            tokenizer=tokenizer,
            file_type=file_type,
            name=recipe.name,
        )
        renderer = Renderer(model.tokenizer)
        write_text(temporary / MODELFILE, modelfile(renderer, model.tokenizer))
        write_text(temporary / CARD, card)
    return Bundle(folder, file_type, (folder / GGUF).stat().st_size, commands)


def run_commands(folder: Path, name: str) -> dict[str, str]:
    """The command that runs the exported model, for each runtime."""
    gguf = folder / GGUF
    return {
        "Ollama": f"ollama create {name} -f {folder / MODELFILE} && ollama run {name}",
        "llama.cpp": f"llama-cli -m {gguf} -cnv",
        "mistral.rs": f"mistralrs run -f {gguf}",
    }


def model_card(
    run: Run, recipe: Recipe, model: LoadedModel, file_type: str, commands: dict[str, str]
) -> str:
    """README.md of an exported model: what it is, how it was made, how to run it."""
    train = [entry for entry in run.metrics() if "loss" in entry]
    held_out = [entry["held_out_loss"] for entry in run.metrics() if "held_out_loss" in entry]
    method = "DoRA" if recipe.lora.dora else "LoRA"
    lines = [
        "---",
        f"base_model: {recipe.model.path}",
        "library_name: gguf",
        f"tags: [mlxtune, {method.lower()}]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"A {method} fine-tune of `{recipe.model.path}`, fused and converted to GGUF "
        f"({file_type.upper()}).",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(f'`{Path(s.path).name}`' for s in recipe.data)} |",
        f"| adapter | rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g} on "
        f"{', '.join(recipe.lora.target_modules)} |",
        f"| learning rate | {recipe.train.learning_rate:g}, {recipe.train.lr_scheduler} |",
        f"| seed | {recipe.seed} |",
    ]
    if train:
        last = train[-1]
        lines.append(f"| steps | {last['step']} ({last['examples']} examples) |")
    if held_out:
        lines.append(f"| held-out loss | {held_out[0]:.4f} before, {held_out[-1]:.4f} after |")
    lines += ["", "## How to run it", ""]
    lines += [f"- {runtime}: `{command}`" for runtime, command in commands.items()]
    made_with = run.status().get("versions", {}).get("mlxtune", "of an unknown version")
    lines += ["", f"Made with mlxtune {made_with}."]
    return "\n".join(lines) + "\n"


def _source(tensor: DenseTensor) -> SourceTensor:
    def load() -> npt.NDArray[np.float32]:
        return np.array(tensor.load().astype(mx.float32))

    return SourceTensor(tensor.name, tensor.shape, load)
