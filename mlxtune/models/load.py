"""Load a model and its tokenizer, from a folder or from GGUF."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_map_with_path
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)

from mlxtune.arrays import flat
from mlxtune.data.render import Renderer
from mlxtune.data.template_values import TemplateValues, without_values
from mlxtune.device import on_cpu
from mlxtune.errors import ModelError
from mlxtune.files import LFS_POINTER, LFS_REMEDY, is_lfs_pointer
from mlxtune.gguf.ends import ends_of_answers
from mlxtune.gguf.metadata import end_tokens
from mlxtune.gguf.model import open_model, read_config
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.tokenizer import read_tokenizer
from mlxtune.gpu_errors import fault_of
from mlxtune.models.quantization import in_mlx_form, readable
from mlxtune.models.resolve import ModelSource
from mlxtune.models.rotation import take_positions, with_older_keys
from mlxtune.models.safetensors import StoredTensor
from mlxtune.models.weights import stored_tensors

DTYPES: dict[str, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        source: where it came from.
        model: an mlx-lm model; packed layers are MLX's own.
        tokenizer: mlx-lm's wrapper around a Hugging Face tokenizer.
        config: what config.json says.
        stored_dtype: the float type that the weights are stored in.
        dtype: the float type that it computes in.
    """

    source: ModelSource
    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    stored_dtype: str
    dtype: str

    def renderer(self) -> Renderer:
        """What turns conversations into this model's tokens."""
        return Renderer(self.tokenizer, rows=embedding_rows(self.config))


def load_model(
    source: ModelSource,
    *,
    dtype: str = "auto",
    chat_template: str | None = None,
    values: TemplateValues | None = None,
    tokenizer: TokenizerWrapper | None = None,
) -> LoadedModel:
    """Load a model; its weights stay lazy until they are first used.

    Args:
        source: from `resolve_model`.
        dtype: `float32`, `float16`, `bfloat16`, or `auto`: as stored on a GPU, and
            float32 on a CPU, where MLX multiplies nothing else fast.
        chat_template: Jinja text that replaces the model's own template.
        values: that are written into the template.
        tokenizer: its own, where it is loaded already: a large one takes seconds.

    Raises:
        ModelError: the files are missing, damaged or of an unknown kind.
    """
    read = _from_gguf if source.is_gguf else _from_folder
    model, tokenizer, config = read(source, tokenizer)
    take_positions(model)
    stored = _stored_dtype(model)
    if dtype == "auto":
        dtype = "float32" if on_cpu() else stored
    _cast(model, DTYPES[dtype])
    _with_template(tokenizer, chat_template, values)
    model.eval()
    return LoadedModel(source, model, tokenizer, config, stored, dtype)


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Weights in this type, but for those that their architecture keeps as they are stored."""
    wanted = getattr(model, "cast_predicate", lambda _name: True)

    def cast(name: str, array: mx.array) -> mx.array:
        floats = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floats and wanted(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def load_tokenizer(
    source: ModelSource,
    *,
    chat_template: str | None = None,
    values: TemplateValues | None = None,
) -> TokenizerWrapper:
    """The tokenizer of a model alone; its weights are not touched.

    Args:
        source: from `resolve_model`.
        chat_template: Jinja text that replaces the model's own template.
        values: that are written into the template.

    Raises:
        ModelError: the files are missing, damaged or of an unknown kind.
    """
    if source.is_gguf:
        tokenizer = _gguf_tokenizer(GGUFFile(source.path), source)
    else:
        tokenizer = _folder_tokenizer(source, model_config(source))
    return _with_template(tokenizer, chat_template, values)


def model_config(source: ModelSource) -> dict[str, Any]:
    """config.json of a model, or what a GGUF says in its place; no weights are read.

    As mlx-lm does, it takes the tokens that end an answer from generation_config.json, which
    has more of them. The rotation stands under the keys that mlx-lm reads, and so does how the
    weights are packed.

    Raises:
        ModelError: it is missing, damaged, the weights are quantized in a way that is not read
            here, or the GGUF is of an unknown kind.
    """
    if source.is_gguf:
        return read_config(GGUFFile(source.path))[1]
    _require_pulled(source.path)
    where = str(source.path / "config.json")
    try:
        config: dict[str, Any] = mlx_lm.utils.load_config(source.path)
        config["model_type"]
    except (TypeError, AttributeError):
        raise ModelError("this is no config: it has no keys", where=where) from None
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"this is no readable config: {error}", where=where) from None
    return with_older_keys(readable(config, source.path))


def embedding_rows(config: dict[str, Any]) -> int | None:
    """How many tokens a model has rows for; None where its config does not say.

    mlx-lm's own defaults count, and a model whose weights are of another size does not load.
    """
    try:
        args = model_classes(config)[1].from_dict(copy.deepcopy(config))
    except Exception:  # whatever is missing from a config is said where the model is built
        return None
    text = getattr(args, "text_config", None)
    # Some architectures make an object of that part; Phixtral has a name of its own.
    nested = text.get("vocab_size") if isinstance(text, dict) else getattr(text, "vocab_size", None)
    rows = getattr(args, "vocab_size", None) or nested or getattr(args, "num_vocab", None)
    return rows if type(rows) is int else None


def _require_pulled(path: Path) -> None:
    """See that no file that is read beside the weights is a pointer of Git LFS."""
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".model", ".jinja", ".txt") and is_lfs_pointer(file):
            raise ModelError(LFS_POINTER, where=str(file), remedy=LFS_REMEDY)


def _gguf_tokenizer(file: GGUFFile, source: ModelSource) -> TokenizerWrapper:
    hf_tokenizer = read_tokenizer(file.metadata, where=str(source.path))
    detokenizer: Any = BPEStreamingDetokenizer
    if hf_tokenizer.backend_tokenizer.model.byte_fallback:
        prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
        detokenizer = partial(SPMStreamingDetokenizer, trim_space=prefix)
    return TokenizerWrapper(hf_tokenizer, detokenizer, eos_token_ids=end_tokens(file.metadata))


def _with_template(
    tokenizer: TokenizerWrapper, chat_template: str | None, values: TemplateValues | None
) -> TokenizerWrapper:
    """The tokenizer with this template and these values, stopping where the template ends."""
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        tokenizer.has_chat_template = True
    if values is not None:
        write_values(tokenizer, values)
    tokenizer.eos_token_ids = ends_of_answers(tokenizer)
    return tokenizer


def write_values(tokenizer: TokenizerWrapper, values: TemplateValues) -> None:
    """Write values into a tokenizer's chat template, instead of any that are there."""
    own = tokenizer.chat_template
    if isinstance(own, str):
        tokenizer.chat_template = values.written_into(own)
    elif isinstance(own, dict):
        tokenizer.chat_template = {name: values.written_into(text) for name, text in own.items()}


def restore_template(tokenizer: TokenizerWrapper) -> None:
    """Take out of a tokenizer's chat template the values that a run has written into it."""
    own = tokenizer.chat_template
    if isinstance(own, str):
        tokenizer.chat_template = without_values(own)
    elif isinstance(own, dict):
        tokenizer.chat_template = {name: without_values(text) for name, text in own.items()}


def _from_gguf(
    source: ModelSource, tokenizer: TokenizerWrapper | None
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    file, read = open_model(source.path)
    if tokenizer is None:
        tokenizer = _gguf_tokenizer(file, source)
    model_class, args_class = model_classes(read.config)
    with _told(source):
        model = model_class(args_class.from_dict(copy.deepcopy(read.config)))  # some change theirs
        nn.quantize(
            model,
            class_predicate=lambda path, _layer: read.packing.get(path, False),
        )
    # Where a model learns from its weights that its head is tied.
    sanitize = getattr(model, "sanitize", dict)
    try:
        model.load_weights(list(sanitize(read.weights).items()), strict=True)
    except ValueError as error:
        raise ModelError(
            f"its tensors are not those of its architecture: {error}", where=str(source.path)
        ) from None
    return model, tokenizer, read.config


def _from_folder(
    source: ModelSource, tokenizer: TokenizerWrapper | None
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    config = model_config(source)
    stored = stored_tensors(source.path)  # MLX itself does not survive a truncated file
    if tokenizer is None:
        tokenizer = _folder_tokenizer(source, config)
    model, config = _mlx_lm_model(source, config, in_mlx_form(_arrays(stored), config))
    return model, tokenizer, config


def _folder_tokenizer(source: ModelSource, config: dict[str, Any]) -> TokenizerWrapper:
    with _told(source):
        return mlx_lm.utils.load_tokenizer(source.path, eos_token_ids=config.get("eos_token_id"))


def _arrays(stored: dict[str, StoredTensor]) -> dict[str, mx.array]:
    """Tensors as lazy arrays, each from its own file."""
    files: dict[Path, Any] = {
        file: mx.load(str(file), format="safetensors")
        for file in sorted({tensor.file for tensor in stored.values()})
    }
    return {name: files[tensor.file][tensor.name] for name, tensor in stored.items()}


def _mlx_lm_model(
    source: ModelSource, config: dict[str, Any], weights: dict[str, mx.array]
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model of a config with these weights.

    mlx-lm takes every file of a folder that is called `model*.safetensors`, whatever its index
    says. So it is given a folder without weights, and a class to build that has them.
    """
    model_class, args_class = model_classes(config, where=str(source.path / "config.json"))

    class Given(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, _found: dict[str, mx.array]) -> dict[str, mx.array]:
            own = getattr(super(), "sanitize", dict)
            sanitized: dict[str, mx.array] = own(weights)
            return sanitized

    with TemporaryDirectory() as name, _told(source):
        folder = Path(name)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        mx.save_safetensors(str(folder / "model.safetensors"), {})
        model, config = mlx_lm.utils.load_model(
            folder,
            lazy=True,
            model_config=config,
            get_model_classes=lambda **_: (Given, args_class),
        )
    model.__class__ = model_class
    return model, config


# How MLX begins when it is given others than the parameters of a model.
_MISFITS = ("Expected shape", "Missing", "Received")


@contextmanager
def _told(source: ModelSource) -> Iterator[None]:
    """mlx-lm and transformers raise all sorts for a folder they cannot make sense of."""
    try:
        yield
    except Exception as error:
        if fault_of(error) is not None:  # of the GPU, or of memory: not the folder's
            raise
        reason = " ".join(str(error).split())[:300]
        damaged = None if source.is_gguf else _damaged_json(source.path)
        if damaged is not None:
            raise ModelError(
                "this is no readable JSON file", where=str(damaged), remedy="download it again"
            ) from error
        if reason.startswith(_MISFITS):
            raise ModelError(
                f"its tensors are not those that its config.json asks for: {reason}",
                where=str(source.path),
                remedy="a file of its weights may be missing: download the model again"
                if reason.startswith("Missing")
                else "put the config.json there that belongs to these weights",
            ) from error
        raise ModelError(
            f"the model cannot be loaded: {type(error).__name__}: {reason}",
            where=str(source.path),
            remedy="--debug shows where it failed",
        ) from error


def _damaged_json(path: Path) -> Path | None:
    """The first JSON file of a model's folder that cannot be read."""
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return file
    return None


def model_classes(
    config: dict[str, Any], where: str | None = None
) -> tuple[Callable[..., nn.Module], Any]:
    """mlx-lm's model and argument classes for a config; `where` it is, for errors.

    Raises:
        ModelError: mlx-lm has none.
    """
    model_type = str(config["model_type"])
    name = mlx_lm.utils.MODEL_REMAPPING.get(model_type, model_type)
    try:
        with redirect_stdout(StringIO()) as said:
            module = importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError:
        raise ModelError(f"mlx-lm has no model of type {model_type!r}", where=where) from None
    except SystemExit:  # how its module for olmo says that a package is missing
        reason = said.getvalue().strip()
        raise ModelError(
            f"mlx-lm cannot load models of type {model_type!r}: {reason}", where=where
        ) from None
    return module.Model, module.ModelArgs


def _stored_dtype(model: nn.Module) -> str:
    """The float type of the largest float parameter; norms alone may be kept wider."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    sizes: dict[str, int] = {}
    for path, array in flat(model.parameters()).items():
        if array.dtype not in names:
            continue
        name = names[array.dtype]
        if path.endswith((".scales", ".biases")) and name == "float32":
            name = "float16"  # of K types, products of two float16 numbers kept exactly
        sizes[name] = sizes.get(name, 0) + array.size
    return max(sizes, key=lambda name: sizes[name])
