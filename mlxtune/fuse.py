"""Adapter into base, with the proof that nothing was lost.

A packed base is expanded and never packed again: rounding the sum back to four bits
would round away most of what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtune.arrays import scalar
from mlxtune.data.render import Renderer
from mlxtune.errors import OutputExists, RunError
from mlxtune.files import atomic_folder, require_apart, write_json
from mlxtune.gguf.ends import ends_of_answers
from mlxtune.gguf.reader import GGUFFile
from mlxtune.layers.dense import dense_tensors
from mlxtune.models.fields import with_all_fields
from mlxtune.models.folder import dense_pieces
from mlxtune.models.load import LoadedModel, load_model, restore_template
from mlxtune.models.resolve import ModelSource
from mlxtune.models.safetensors import write_safetensors
from mlxtune.models.tokenizer_files import save_tokenizer
from mlxtune.models.weights import weight_files
from mlxtune.train.kept import rows_to_try
from mlxtune.train.subject import Subject, find_subject

REPORT = "fuse.json"
# What config.json calls the type of the weights; older readers know the first name alone.
_DTYPES = ("torch_dtype", "dtype")
# Enough to meet every layer with real inputs, and quick for a large model too.
PROOF_CONVERSATIONS = 8
# Where there are no records: an adapter alone, or a run whose data is gone.
_TEXTS = (
    "The harbour was quiet in the morning, and the boats lay close together along the wall.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    "Question: how many days has a leap year? Answer: 366, one more than any other year.",
    "Die Brücke über den Fluss wurde 1894 gebaut; l'été suivant, elle fut élargie.",
)


@dataclass(frozen=True)
class FuseReport:
    """What was written and how near it is to the live adapter.

    Attributes:
        folder: the fused model.
        dtype: of its weights.
        max_logit_difference: largest |Δlogit| between the live adapter and the folder
            read back from disk, over `tokens_compared` tokens of the run's records.
        max_logit: largest |logit| among them, for scale.
        top1_agreement: share of those tokens at which both have the same best token.
        tried_on: `records` of the run, or `texts` that come with mlxtune.
    """

    folder: str
    dtype: str
    max_logit_difference: float
    max_logit: float
    top1_agreement: float
    tokens_compared: int
    tried_on: str


def fuse_run(
    name: str | Path,
    output: Path,
    *,
    adapter: Path | None = None,
    base: str | None = None,
    dtype: str | None = None,
    keep_template: bool = False,
    overwrite: bool = False,
) -> FuseReport:
    """Write a fused model as a Hugging Face folder, and compare it with the live adapter.

    Args:
        name: a run, `RUN@step-N`, an adapter's folder, or with `adapter` any model.
        output: folder to write.
        adapter: an adapter to put on the model, or to use instead of the run's own.
        base: the model to use instead of the one that the run or the adapter names.
        dtype: of the weights; the type that the base stores its own in by default.
        keep_template: leave the chat template as it was before the training, without the values
            that make it ask as the model was trained.
        overwrite: replace `output` if it exists.

    Raises:
        RunError: there is no finished run, no adapter, or its model gives no numbers.
        OutputExists, StorageError: nothing was written.
    """
    subject = find_subject(str(name), adapter=adapter, base=base)
    if subject.run is not None:
        require_outside(output, subject.run.path)
    saved = subject.saved()
    with atomic_folder(output, overwrite=overwrite, marker=REPORT) as folder:
        live = subject.load(for_inference=False)
        given = [Path(saved.where), *([adapter] if adapter else [])]
        require_apart(output, (*model_places(live.source.path), *given))
        prompts, tried_on = _prompts(subject, live.renderer())
        before = _logits(live.model, prompts)
        if any(scalar(mx.isnan(logits).any()) for logits in before):
            raise RunError(
                "the model gives no numbers with this adapter: its logits are nan",
                where=str(name),
                remedy="train again with a lower train.learning_rate",
            )
        dtype = dtype or live.stored_dtype
        if keep_template:
            restore_template(live.tokenizer)
        save_model(folder, live, dtype)
        fused = load_model(ModelSource(str(output), folder), dtype=live.dtype)
        after = _logits(fused.model, prompts)
        difference = max(scalar(mx.abs(a - b).max()) for a, b in zip(before, after, strict=True))
        same = sum(
            scalar((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(before, after, strict=True)
        )
        count = sum(len(p) for p in prompts)
        report = FuseReport(
            folder=str(output),
            dtype=dtype,
            max_logit_difference=difference,
            max_logit=max(scalar(mx.abs(a).max()) for a in before),
            top1_agreement=same / count,
            tokens_compared=count,
            tried_on=tried_on,
        )
        write_json(folder / REPORT, asdict(report))
    return report


def _prompts(subject: Subject, renderer: Renderer) -> tuple[list[list[int]], str]:
    """Tokens to compare models on: the run's records, or texts where those are not at hand."""
    if subject.run is not None:
        chosen = rows_to_try(subject.run, renderer, PROOF_CONVERSATIONS)
        if chosen:
            return [sample.tokens.tolist() for sample in chosen], "records"
    return [renderer.encode(text) for text in _TEXTS], "texts"


def require_outside(output: Path, run: Path) -> None:
    """Refuse an output folder that is the run itself or holds it.

    Raises:
        OutputExists: it is.
    """
    if output.resolve() in (run.resolve(), *run.resolve().parents):
        raise OutputExists(
            "the run itself is in there, so it cannot be written to",
            where=str(output),
            remedy="choose another place with --output",
        )


def model_places(path: Path) -> tuple[Path, ...]:
    """What a model is read from: the files of a GGUF, or its folder and its weights.

    Weights may be links to elsewhere.
    """
    return GGUFFile(path).paths if path.is_file() else (path, *weight_files(path))


def save_model(folder: Path, model: LoadedModel, dtype: str) -> None:
    """Write a model, adapter fused in, as config, safetensors and tokenizer files.

    Args:
        folder: exists.
        model: with or without adapter.
        dtype: `float32`, `float16` or `bfloat16`.
    """
    # Small files first: if the disk fills up, it is at a file that we write ourselves.
    save_tokenizer(folder, model.tokenizer)
    config = dense_config(with_all_fields(model.config, model.source.path), dtype)
    write_configs(folder, config, model.tokenizer, model.source.path)
    tensors = (tensor.source() for tensor in dense_tensors(model.model))
    write_safetensors(folder, dense_pieces(tensors, dtype, model.config))


def dense_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of a model whose weights are expanded.

    The type of the weights stands under its older name too where the config has that, and in
    the parts of the config that are configs themselves.
    """
    packed = {"quantization", "quantization_config"}
    kept = {k: v for k, v in config.items() if k not in packed and v is not None}
    for key, part in kept.items():
        if key.endswith("_config") and isinstance(part, dict):
            kept[key] = part | {k: dtype for k in _DTYPES if k in part}
    return kept | {"dtype": dtype} | {k: dtype for k in _DTYPES if k in kept}


def write_configs(
    folder: Path, config: dict[str, Any], tokenizer: TokenizerWrapper, source: Path
) -> None:
    """Write config.json and generation_config.json, which say at which tokens an answer ends.

    transformers and vLLM stop where generation_config.json says, mlx-lm there or else where
    config.json does.

    Args:
        folder: exists.
        config: for config.json.
        tokenizer: of the model.
        source: the folder or file that the model was read from; what a folder's own
            generation_config.json says of sampling is kept.
    """
    ends = ends_of_answers(tokenizer, config.get("eos_token_id"))
    said: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    kept = read_generation_config(source) or {
        name: config[name] for name in ("bos_token_id", "pad_token_id") if name in config
    }
    write_json(folder / "config.json", config | said)
    write_json(folder / "generation_config.json", kept | said)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model's folder; empty where there is none that is readable."""
    try:
        value = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _logits(model: nn.Module, prompts: Sequence[list[int]]) -> list[mx.array]:
    results = []
    for tokens in prompts:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        mx.eval(logits)
        results.append(logits)
    return results
