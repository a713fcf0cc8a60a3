"""Read a GGUF or a folder back and compare it with the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ExportError
from mlxtune.export.meant import unlike
from mlxtune.gguf.architectures import Architecture, Config, for_config
from mlxtune.gguf.heads import reordering
from mlxtune.gguf.metadata import text_config
from mlxtune.gguf.model import read_config
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.tensors import SourceTensor, gguf_tensors, is_parameter
from mlxtune.gguf.tokenizer import read_tokenizer, templates_by_name
from mlxtune.gguf.writer import Importance
from mlxtune.models.folder import folder_tensors
from mlxtune.models.load import load_tokenizer, model_config
from mlxtune.models.resolve import ModelSource

# Twice what llama.cpp's own quantizers leave, as a share of the weights' size, on weights
# whose distribution is Laplace's: ones with heavy tails come out worse than normal ones.
USUAL_ERROR = {
    Type.F32: 1e-6,
    Type.F16: 1e-3,
    Type.BF16: 4e-3,
    Type.Q8_0: 0.014,
    Type.Q6_K: 0.044,
    Type.Q5_K: 0.086,
    Type.Q5_1: 0.09,
    Type.Q5_0: 0.11,
    Type.Q4_K: 0.17,
    Type.Q4_1: 0.19,
    Type.Q4_0: 0.22,
    Type.Q3_K: 0.36,
    Type.Q2_K: 0.69,
}
# The same of a folder's types; twice what MLX leaves in groups of 128, scales in bfloat16. At
# two bits that would let a matrix of zeros pass.
FOLDER_ERROR = {
    "float32": 1e-6,
    "float16": 1e-3,
    "bfloat16": 4e-3,
    "8 bits": 0.021,
    "6 bits": 0.064,
    "5 bits": 0.13,
    "4 bits": 0.26,
    "3 bits": 0.54,
    "2 bits": 0.9,
}

SAMPLE = (
    "find . -name '*.py' -mtime -7 | xargs grep -n \"TODO\"",
    "Grüße, 世界! 🦙🏽 naïve café",
    "  leading, trailing  \n\n\ttabs\r\nand 1234567890 digits 3.14159",
    "def f(x):\n    return x ** 2  # squared\n",
)


_QUESTION = {"role": "user", "content": "List the files. <b>&amp;</b>"}
_TURNS = [_QUESTION, {"role": "assistant", "content": "ls -la"}, _QUESTION]
_PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
_TOOL = {"name": "ls", "description": "Lists files.", "parameters": _PARAMETERS}
# Arguments of `apply_chat_template`.
CHATS: tuple[dict[str, Any], ...] = (
    {"conversation": _TURNS, "add_generation_prompt": True},
    {"conversation": [{"role": "system", "content": "Be brief."}, *_TURNS[:2]]},
    {
        "conversation": _TURNS,
        "tools": [{"type": "function", "function": _TOOL}],
        "add_generation_prompt": True,
    },
)


@dataclass(frozen=True)
class Readback:
    """How a file differs from its source.

    Attributes:
        tensors: how many were compared.
        error: type to ‖file − source‖ / ‖source‖ over all tensors of that type.
        worst: the tensor with the largest such error.
        worst_error: its error.
        texts: how many texts are tokenized alike, by the tokenizer read back.
        template_kept: whether the chat templates are the source's, and the tokenizer read
            back writes conversations with each as the source's does; None if it has none.
    """

    tensors: int
    error: dict[str, float]
    worst: str
    worst_error: float
    texts: int
    template_kept: bool | None


def read_back(
    path: Path,
    config: dict[str, Any],
    tensors: Iterable[SourceTensor],
    tokenizer: Any,
    texts: Sequence[str] = SAMPLE,
    *,
    importance: Importance | None = None,
    begins: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Readback:
    """Compare a GGUF with its source, one tensor in memory at a time.

    Args:
        path: the GGUF, or its first part.
        config: of the source.
        tensors: of the source.
        tokenizer: of the source, Hugging Face's.
        texts: to tokenize with both.
        importance: that it was written with: errors in columns that count for little may be
            as large as they like.
        begins: whether a text has to begin with the same mark.
        progress: is told how many tensors have been compared.

    Raises:
        ExportError: a tensor is missing or further off than its type explains, the metadata
            is of another model, or the tokenizer or template is not what was written.
    """
    file = GGUFFile(path)
    _, got = read_config(file)
    entry = for_config(config)
    if said := unlike(config, got, entry):
        raise _wrong(said, path)
    types = [info.type for name, info in file.tensors.items() if is_parameter(name, got)]
    written = {
        tensor.name: (tensor, type_.name, USUAL_ERROR.get(type_, np.inf))
        for tensor, type_ in zip(gguf_tensors(file, entry, got), types, strict=True)
    }
    weights = _in_order(importance or {}, entry, config)
    compared = _compared(written, tensors, path, progress, weights)
    again = read_tokenizer(file.metadata, where=str(path))
    alike = _same_tokens(again, tokenizer, texts, path)
    template_kept = _same_templates(again, tokenizer, path)
    _same_marks(again, tokenizer, begins, path)
    return Readback(*compared, texts=alike, template_kept=template_kept)


def read_back_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[SourceTensor],
    tokenizer: Any,
    kind: Callable[[SourceTensor], str],
    texts: Sequence[str] = SAMPLE,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Readback:
    """Compare a folder with its source, one tensor in memory at a time.

    Args:
        folder: of Hugging Face's or MLX's layout.
        config: of the source.
        tensors: of the source.
        tokenizer: of the source, Hugging Face's.
        kind: what a tensor is written as, of `FOLDER_ERROR`.
        texts: to tokenize with both.
        progress: is told how many tensors have been compared.

    Raises:
        ExportError: a tensor is missing or further off than its type explains, the config is
            of another model, or the tokenizer or template is not what was written.
    """
    source = ModelSource(str(folder), folder)
    got = text_config(model_config(source))
    if said := unlike(config, got):
        raise _wrong(said, folder)
    written = {}
    for tensor in folder_tensors(folder, got):
        type_ = kind(tensor)
        written[tensor.name] = tensor, type_, FOLDER_ERROR[type_]
    compared = _compared(written, tensors, folder, progress)
    again = load_tokenizer(source)._tokenizer
    return Readback(
        *compared,
        texts=_same_tokens(again, tokenizer, texts, folder),
        template_kept=_same_templates(again, tokenizer, folder),
    )


def _compared(
    written: dict[str, tuple[SourceTensor, str, float]],
    tensors: Iterable[SourceTensor],
    path: Path,
    progress: Callable[[str], None],
    importance: Importance | None = None,
) -> tuple[int, dict[str, float], str, float]:
    """How many, the error of each type, the worst tensor and its error.

    Args:
        written: tensor, name of its type and the most that this type explains, by name.
        tensors: of the source.
        path: what was written, for errors.
        progress: is told how many have been compared.
        importance: of the columns of some, by name.
    """
    total = len(written)
    sums: dict[str, list[float]] = {}
    worst, worst_error, count = "", -1.0, 0
    for source in tensors:
        if source.name not in written:
            raise _wrong(f"the tensor {source.name} is not in the file", path)
        tensor, type_, most = written.pop(source.name)
        count += 1
        progress(f"reading back ({count} of {total})")
        got, want = tensor.load(), source.load()
        squares = _squares(got, want)
        error = _share(squares)
        weights = (importance or {}).get(source.name)
        if not error <= most and not (
            weights is not None and _typical_error(got, want, weights) <= most
        ):
            raise _too_far(source.name, type_, want, error, most, path)
        sum_of = sums.setdefault(type_, [0.0, 0.0])
        sum_of[0] += squares[0]
        sum_of[1] += squares[1]
        if error > worst_error:
            worst, worst_error = source.name, error
    if written:
        raise _wrong(f"the file has {next(iter(written))}, and its source has not", path)
    errors = {name: _share((both[0], both[1])) for name, both in sums.items()}
    return count, errors, worst, worst_error


def _too_far(
    name: str, type_: str, want: npt.NDArray[np.float32], error: float, most: float, path: Path
) -> ExportError:
    """What to raise for a tensor that differs by more than its type explains.

    Args:
        name: of the tensor.
        type_: that it is written as.
        want: the tensor of the source.
        error: its difference as a share of its size.
        most: what the type explains.
        path: of the file.
    """
    finite = np.isfinite(want)
    if not finite.all():
        return ExportError(
            f"the model itself is damaged: {int((~finite).sum()):,} of {want.size:,} values of "
            f"{name} are no numbers (nan or infinite)",
            where=str(path),
            remedy="nothing was left there. Train again with a lower train.learning_rate if "
            "training made them, else fetch the model again",
        )
    return _wrong(
        f"{name} as {type_} differs from its source by {error:.2g} of its size; "
        f"{most:.2g} is the most that this type explains",
        path,
    )


def _squares(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Sums of squares of the difference and of what is wanted, in blocks: no large copies."""
    if got.shape != want.shape:
        return np.inf, 1.0
    difference, size = 0.0, 0.0
    flat, wanted = got.reshape(-1), want.reshape(-1)
    for start in range(0, flat.size, 1 << 16):
        a, b = flat[start : start + (1 << 16)], wanted[start : start + (1 << 16)]
        with np.errstate(invalid="ignore"):  # of infinite ones there is none
            d = a - b
        difference += float(d @ d)
        size += float(b @ b)
    return difference, size


def _typical_error(
    got: npt.NDArray[np.float32],
    want: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
) -> float:
    """Median over blocks of ‖got − want‖ / ‖want‖ by importance; what no input reaches has none.

    Where most of a block counts for nothing, the few weights that count can be met by a scale
    so large that its neighbours, which share a scale of scales, err: in ggml's files too.

    Args:
        got, want: (out, in), or (experts, out, in).
        importance: (in,), or (experts · in,).
    """
    width = want.shape[-1]
    if got.shape != want.shape or importance.size % width:
        return float("inf")
    block = 256 if width % 256 == 0 else width
    each = importance.reshape(-1, width // block, block).astype(np.float64)
    rows = (len(each), -1, width // block, block)
    errors = []
    for a, b, weights in zip(got.reshape(rows), want.reshape(rows), each, strict=True):
        for start in range(0, len(a), 64):
            part = b[start : start + 64]
            size = np.einsum("rbc,bc->rb", np.square(part), weights)
            off = np.einsum("rbc,bc->rb", np.square(a[start : start + 64] - part), weights)
            errors.append(np.sqrt(off[size > 0] / size[size > 0]))
    found = np.concatenate(errors)
    return float(np.median(found)) if found.size else 0.0


def _in_order(importance: Importance, entry: Architecture, config: Config) -> Importance:
    """Importance by mlx-lm's names of the matrices, of columns in mlx-lm's order."""
    found = {}
    for name, values in importance.items():
        if hf_name := entry.to_hf_name(name):
            heads = reordering(entry, hf_name, config)
            found[hf_name] = heads.to_hf(values) if heads and heads.axis else values
    return found


def _share(squares: tuple[float, float]) -> float:
    difference, size = squares
    if difference == 0:
        return 0.0
    return float(np.sqrt(difference / size)) if size else float("inf")


def _same_tokens(again: Any, tokenizer: Any, texts: Sequence[str], path: Path) -> int:
    for text in texts:
        want = tokenizer(text, add_special_tokens=False).input_ids
        got = again(text, add_special_tokens=False).input_ids
        if got != want:
            raise _wrong(f"its tokenizer cuts {text[:40]!r} differently than the source's", path)
    return len(texts)


def _same_marks(again: Any, tokenizer: Any, begins: bool, path: Path) -> None:
    for mark in ("bos", "eos"):
        want, got = (getattr(one, f"{mark}_token_id") for one in (tokenizer, again))
        if want is not None and got != want:
            raise _wrong(f"its {mark} token is number {got}, and {want} in its source", path)
    first, second = (one("a").input_ids[0] == one.bos_token_id for one in (tokenizer, again))
    if begins and first != second:
        which = ("the file", "its source")[first]
        raise _wrong(f"only {which} puts a mark before a text", path)


def _same_templates(again: Any, tokenizer: Any, path: Path) -> bool | None:
    wanted = templates_by_name(tokenizer.chat_template)
    got = templates_by_name(again.chat_template)
    if got.keys() != wanted.keys():
        raise _wrong(
            f"it has chat templates named {sorted(got)}, and its source {sorted(wanted)}", path
        )
    for name, template in wanted.items():
        which = "chat template" if name == "default" else f"chat template {name!r}"
        if got[name] != template:
            raise _wrong(f"its {which} is not the source's", path)
        for chat in CHATS:
            if _rendered(again, got[name], chat) != _rendered(tokenizer, template, chat):
                raise _wrong(f"its {which} writes a conversation unlike the source's", path)
    return True if wanted else None


def _rendered(tokenizer: Any, template: str, chat: dict[str, Any]) -> str:
    """A conversation as the template writes it, with the marks of this tokenizer."""
    try:
        return str(tokenizer.apply_chat_template(**chat, chat_template=template, tokenize=False))
    except Exception as error:  # a template may refuse any conversation, in any way
        return f"refused: {error}"


def _wrong(what: str, path: Path) -> ExportError:
    return ExportError(
        f"the file does not hold what was converted: {what}",
        where=str(path),
        remedy="nothing was left there; --no-verify writes it all the same. Please report this",
    )
