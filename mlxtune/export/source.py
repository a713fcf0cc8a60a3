"""What can be converted, opened: a run, a model's folder, a GGUF, a hub id."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtune.arrays import flat
from mlxtune.errors import ExportError, ModelError, RunError
from mlxtune.fuse import model_places
from mlxtune.gguf.architectures import for_config, text_alone
from mlxtune.gguf.metadata import text_config
from mlxtune.gguf.model import read_config
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.sentencepiece import sentencepiece_metadata
from mlxtune.gguf.tensors import SourceTensor, gguf_tensors
from mlxtune.gguf.tokenizer import tokenizer_metadata
from mlxtune.layers.dense import dense_tensors
from mlxtune.models.folder import CODES, folder_tensors
from mlxtune.models.load import LoadedModel, load_model, load_tokenizer, model_config
from mlxtune.models.resolve import ModelSource, resolve_model
from mlxtune.models.skeleton import built
from mlxtune.models.weights import stored_tensors
from mlxtune.train.run import meant
from mlxtune.train.subject import find_subject


@dataclass(frozen=True)
class Convertible:
    """A model whose tensors can be gone through, one in memory at a time.

    Attributes:
        name: for people, and for the metadata.
        config: as in config.json.
        dtype: the float type that it is stored in.
        tokenizer: gives mlx-lm's wrapper.
        vocabulary: gives the tokenizer as GGUF's metadata, told llama.cpp's name of its
            pre-tokenizer where that is not recognised.
        tensors: gives all parameters; each call begins anew.
        load: gives the model, to be run.
        places: files and folders that it is read from.
        only_pieces: whether its tokenizer is SentencePiece's own file, of which transformers,
            unlike SentencePiece and llama.cpp, drops the first of a text's spaces.
    """

    name: str
    config: dict[str, Any]
    dtype: str
    tokenizer: Callable[[], TokenizerWrapper]
    vocabulary: Callable[[str | None], dict[str, Any]]
    tensors: Callable[[], Iterable[SourceTensor]]
    load: Callable[[], LoadedModel]
    places: tuple[Path, ...]
    only_pieces: bool = False


def open_source(name: str) -> Convertible:
    """Open a model for conversion; its weights are not read yet.

    Args:
        name: as in `find_subject`.

    Raises:
        ModelError, RunError: there is no model, or it is damaged.
    """
    path = Path(name).expanduser()
    try:
        subject = find_subject(name)
        if subject.adapter is not None:
            opened = from_loaded(subject.title, subject.load(for_inference=False))
            return replace(opened, places=(*opened.places, subject.adapter))
        source = resolve_model(subject.model.path)
    except (ModelError, RunError) as error:
        error.remedy = _meant(path) or error.remedy
        raise
    return _from_gguf(source) if source.is_gguf else _from_folder(source)


def _meant(path: Path) -> str | None:
    """What lies where no model is, and may be meant."""
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        return f"did you mean {inside[0]}?" if inside else None
    if parts := sorted(path.parent.glob(f"{glob.escape(path.stem)}-00001-of-*.gguf")):
        return f"it is there in parts, of which the first stands for all: {parts[0]}"
    return meant(path)


def require_whole(model: Convertible, where: str) -> None:
    """See that a model has the tensors that its config speaks of, before hours are spent on it.

    Args:
        model: opened.
        where: what the user called it.

    Raises:
        ModelError: one is missing, or is of another shape.
    """
    try:
        arrays = flat(built(model.config).parameters())
    except ModelError:  # mlx-lm cannot build it, and llama.cpp may know it all the same
        return
    wanted = {path: array.shape for path, array in arrays.items()}
    found = {tensor.name: tuple(tensor.shape) for tensor in model.tensors()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(
            f"{len(missing)} of the {len(wanted)} tensors are missing, such as {missing[0]}",
            where=where,
            remedy="a file of it may be missing: download or export it again",
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(
                f"{name} is of shape {found[name]}, and the model's config asks for {shape}",
                where=where,
                remedy="put the config.json there that belongs to these weights",
            )


def from_loaded(name: str, model: LoadedModel) -> Convertible:
    """A model that is loaded already, adapters and all; they are fused."""
    config = _text_config(model.config)
    return Convertible(
        name=name,
        config=config,
        dtype=model.stored_dtype,
        tokenizer=lambda: model.tokenizer,
        vocabulary=_vocabulary(lambda: model.tokenizer, config, model.source.path),
        tensors=lambda: (tensor.source() for tensor in dense_tensors(model.model)),
        load=lambda: model,
        places=model_places(model.source.path),
        only_pieces=_only_pieces(model.source.path),
    )


def _from_gguf(source: ModelSource) -> Convertible:
    file = GGUFFile(source.path)
    entry, config = read_config(file)
    bfloat = any(info.type.name == "BF16" for info in file.tensors.values())
    wide = all(info.type.name == "F32" for info in file.tensors.values())
    tokenizer = cache(lambda: load_tokenizer(source))
    return Convertible(
        name=str(file.metadata.get("general.name") or _called(source)),
        config=config,
        dtype="float32" if wide else "bfloat16" if bfloat else "float16",
        tokenizer=tokenizer,
        vocabulary=_vocabulary(tokenizer, config, source.path),
        tensors=lambda: gguf_tensors(file, entry, config),
        load=lambda: load_model(source, tokenizer=tokenizer()),
        places=file.paths,
    )


def _called(source: ModelSource) -> str:
    """Files in Ollama's store have no suffix, and a digest for a name."""
    return source.path.stem if source.path.suffix else source.name


def _from_folder(source: ModelSource) -> Convertible:
    config = _text_config(model_config(source))
    if not any(name.endswith("lm_head.weight") for name in stored_tensors(source.path)):
        config.setdefault("tie_word_embeddings", True)
    tokenizer = cache(lambda: load_tokenizer(source))
    return Convertible(
        name=source.path.name if Path(source.name).exists() else source.name,
        config=config,
        dtype=_stored_dtype(source.path),
        tokenizer=tokenizer,
        vocabulary=_vocabulary(tokenizer, config, source.path),
        tensors=lambda: folder_tensors(source.path, config),
        load=lambda: load_model(source, tokenizer=tokenizer()),
        places=model_places(source.path),
        only_pieces=_only_pieces(source.path),
    )


# What a Gemma 3 that sees leaves to transformers' defaults, and mlx-lm in part to others.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
}
_NOT_TEXT = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    told = text_config(config)
    return _GEMMA3_DEFAULTS | told if told.get("model_type") == "gemma3" else told


def language_model(opened: Convertible) -> Convertible:
    """The language model of one that sees or listens, as those that cannot are kept."""
    try:
        entry = for_config(opened.config)
    except ExportError:  # it may be written as a folder all the same
        return opened
    alone = text_alone(entry)
    if alone is entry:
        return opened

    def tensors() -> Iterator[SourceTensor]:
        for tensor in opened.tensors():
            if not _NOT_TEXT.match(tensor.name):
                name = tensor.name.replace("model.language_model.", "language_model.model.", 1)
                yield replace(tensor, name=name.removeprefix(entry.prefix))

    told = {"model_type": alone.model_types[0], "architectures": [alone.hf_class]}
    return replace(opened, config=opened.config | told, tensors=tensors)


def _vocabulary(
    tokenizer: Callable[[], TokenizerWrapper], config: dict[str, Any], path: Path
) -> Callable[[str | None], dict[str, Any]]:
    """Metadata of a tokenizer; of SentencePiece's own file where a folder has no other."""
    rows = int(config["vocab_size"])

    def vocabulary(pre: str | None) -> dict[str, Any]:
        if _only_pieces(path):
            if pre not in (None, "default"):
                raise ExportError("SentencePiece has no pre-tokenizer to name", where="--pre")
            return sentencepiece_metadata(path / "tokenizer.model", rows)
        merged = for_config(config).name == "gemma4"
        return tokenizer_metadata(tokenizer()._tokenizer, rows, pre=pre, merged=merged)

    return vocabulary


def _only_pieces(path: Path) -> bool:
    return (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()


def _stored_dtype(path: Path) -> str:
    """The float type of most of a folder's bytes."""
    names = {code: name for name, code in CODES.items()}
    sizes = dict.fromkeys(names.values(), 0)
    for tensor in stored_tensors(path).values():
        if tensor.dtype in names:
            sizes[names[tensor.dtype]] += tensor.nbytes
    return max(sizes, key=lambda name: sizes[name])
