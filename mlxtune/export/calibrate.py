"""Importance by calibration: how large the inputs of each matrix are on given texts.

What llama.cpp's `llama-imatrix` sums (tools/imatrix of
https://github.com/ggml-org/llama.cpp, MIT): squares of each input feature over all tokens,
of experts over the tokens that were sent to each. As there, the output matrix is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.data.render import Renderer
from mlxtune.data.sources import Source
from mlxtune.errors import DataError, ExportError, OutputExists
from mlxtune.files import LFS_POINTER, LFS_REMEDY, is_lfs_pointer
from mlxtune.gguf.architectures import for_config
from mlxtune.gguf.heads import reordering
from mlxtune.gguf.imatrix import read_imatrix, write_imatrix
from mlxtune.gguf.metadata import text_config
from mlxtune.gguf.mixing import FILE_TYPES
from mlxtune.layers.inject import lora_layers, own_quantized_layers, projections
from mlxtune.models.load import DTYPES, LoadedModel

Floats = npt.NDArray[np.float32]

# As many as `llama-imatrix` takes at a time, and a hundred times that.
CHUNK = 512
MAX_TOKENS = 100 * CHUNK
# Tokens that go through the model together.
_AT_ONCE = 4 * CHUNK

# Left out: the head, and routers, which are never packed.
_HEAD = "output.weight"
_ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True)
class Calibration:
    """Squares of what went into each matrix, by its GGUF name.

    Attributes:
        sums: float32 (width,), or (experts, width), over all tokens.
        counts: how many tokens those are, float32 (1,), or (experts,).
        tokens: that went through the model.
    """

    sums: dict[str, Floats]
    counts: dict[str, Floats]
    tokens: int

    def importance(self) -> dict[str, Floats]:
        """The mean square of each input feature; ones for an expert that no token met."""
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].reshape((-1,) + (1,) * (sums.ndim - 1))
            means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
        return means


def importance_of(
    load: Callable[[], LoadedModel],
    file_type: str,
    *,
    imatrix: Path | None = None,
    calibration: Path | None = None,
    save: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Floats] | None:
    """Importance by GGUF name, from a file or from texts; None where neither is given.

    Args:
        load: gives the model that the texts are run through.
        file_type: that the importance is for.
        imatrix: llama.cpp's importance matrix.
        calibration: the texts, see `calibrate`.
        save: keep there what was found on them, as llama.cpp keeps it.
        overwrite: replace a file that is there.
        progress: is told what is being done.

    Raises:
        ExportError: the matrix cannot be read, the file type makes no use of it, or the
            model cannot be written.
        DataError: the texts cannot be read.
        OutputExists, StorageError: what is found cannot be kept.
    """
    if imatrix is None and calibration is None:
        return None
    if FILE_TYPES[file_type].type in _UNWEIGHED:
        raise ExportError(
            f"{file_type} weighs no errors, so an importance has no effect on it",
            where="--imatrix" if calibration is None else "--calibrate",
            remedy="it is for types below 8 bits, such as --quantize q4_k_m",
        )
    if imatrix is not None:
        return read_imatrix(imatrix)
    assert calibration is not None
    if save is not None and save.exists() and not overwrite:
        raise OutputExists(
            "this exists already; nothing was written",
            where=str(save),
            remedy="choose another place, or pass --overwrite to replace it",
        )
    found = calibrate(load(), calibration, progress=progress)
    if save is not None:
        write_imatrix(save, found.sums, found.counts, [calibration.name], chunk_size=CHUNK)
    return found.importance()


_UNWEIGHED = (Type.F32, Type.F16, Type.BF16, Type.Q8_0)


def calibrate(
    model: LoadedModel,
    data: Path,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Run texts through a model and sum the squares of what its matrices are given.

    Args:
        model: with or without adapters; its packed layers become ours.
        data: records of any shape that is trained on, rendered as they are for training,
            or plain text, `*.txt`.
        max_tokens: at most so many, from the beginning.
        progress: is told what is being done.

    Raises:
        DataError: there is no text in the file, or a record cannot be read.
        ExportError: the model cannot be written as GGUF, or gives no numbers.
        ModelError: it has no chat template for the records.
    """
    own_quantized_layers(model.model, DTYPES[model.dtype])
    model.model.eval()
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, npt.NDArray[np.float64]] = {}
    tokens = 0
    with _recorded(_matrices(model)) as recorded:
        for batch in _batches(_limited(_chunks(data, model), max_tokens)):
            model.model(mx.array(batch))
            # The logits are not asked for, so they are not computed.
            mx.eval(recorded)
            for name, (squares, number) in recorded.items():
                sums[name] = sums.get(name, 0.0) + np.array(squares, np.float64)
                counts[name] = counts.get(name, 0.0) + np.array(number, np.float64)
            recorded.clear()
            tokens += batch.size
            progress(f"calibrating, {tokens:,} tokens")
    if not tokens:
        raise DataError("there is no text to calibrate on", where=str(data))
    if not all(np.isfinite(squares).all() for squares in sums.values()):
        raise ExportError(
            "the model itself gives no numbers: what its layers compute on these texts is nan or "
            "infinite",
            where=str(data),
            remedy="train again with a lower train.learning_rate, or fetch the model again",
        )
    return Calibration(_in_gguf_order(_single(sums), model.config), _single(counts), tokens)


def _in_gguf_order(sums: dict[str, Floats], config: dict[str, Any]) -> dict[str, Floats]:
    """Input features in the order of the columns that they meet in the file."""
    entry = for_config(config)
    if entry.tiled_values:
        for name in sums:
            order = reordering(entry, entry.to_hf_name(name) or "", text_config(config))
            if order is not None and order.axis:
                sums[name] = order.to_gguf(sums[name])
    return sums


def _single(values: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Floats]:
    return {name: array.astype(np.float32) for name, array in values.items()}


def _limited(
    chunks: Iterable[npt.NDArray[np.int32]], count: int
) -> Iterator[npt.NDArray[np.int32]]:
    """Chunks of `count` tokens altogether."""
    for chunk in chunks:
        if not count:
            return
        yield chunk[:count]
        count -= len(chunk[:count])


def _batches(chunks: Iterable[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    """Chunks of one length together, (rows, length): nothing is padded or seen by others."""
    for length, group in groupby(sorted(chunks, key=len), key=len):
        same = list(group)
        rows = max(1, _AT_ONCE // max(1, length))
        for start in range(0, len(same), rows):
            yield np.stack(same[start : start + rows])


def _chunks(data: Path, model: LoadedModel) -> Iterator[npt.NDArray[np.int32]]:
    """Token ids, at most `CHUNK` at a time; no chunk has tokens of two records."""
    renderer = model.renderer()
    if data.suffix == ".txt":
        yield from _of_text(_text(data), renderer, model.tokenizer)
        return
    for number, conversation in enumerate(Source(str(data)), 1):
        for sample in renderer.samples(conversation, number):
            for start in range(0, len(sample.tokens), CHUNK):
                yield sample.tokens[start : start + CHUNK]


def _text(path: Path) -> str:
    if is_lfs_pointer(path):
        raise DataError(LFS_POINTER, where=str(path), remedy=LFS_REMEDY)
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None


def _of_text(text: str, renderer: Renderer, tokenizer: Any) -> Iterator[npt.NDArray[np.int32]]:
    """Chunks that each begin as texts of this tokenizer do."""
    first = list(tokenizer.encode(""))[:1]
    begin = first if first == [tokenizer.bos_token_id] else []
    renderer.require_rows(begin)
    ids, room = renderer.encode(text), CHUNK - len(begin)
    for start in range(0, len(ids), room):
        yield np.array(begin + ids[start : start + room], np.int32)


# ------------------------------------------------------------------------ layers


def _matrices(model: LoadedModel) -> dict[str, nn.Module]:
    """GGUF name to layer, of all whose inputs count."""
    entry = for_config(model.config)
    adapters = dict(lora_layers(model.model))
    bare = {
        path: layer
        for path, layer in projections(model.model).items()
        if path.removesuffix(".linear") not in adapters
    }
    named = {entry.to_gguf_name(f"{path}.weight"): x for path, x in (bare | adapters).items()}
    return {
        name: x
        for name, x in named.items()
        if name and name != _HEAD and not name.endswith(_ROUTER)
    }


Recorded = dict[str, tuple[mx.array, mx.array]]


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[Recorded]:
    """Sums of squares and counts of what the layers are called with, by name.

    The instances get a class of their own while the block lasts.
    """
    found: Recorded = {}
    classes = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.__class__ = _recording(type(layer), name, found)
        yield found
    finally:
        for name, layer in layers.items():
            layer.__class__ = classes[name]


def _recording(original: type, name: str, found: Recorded) -> type:
    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if args:  # experts are told which of them each row is for
            base = self.get("linear", self)
            added = _squares_of_experts(x, args[0], base.num_experts)
        else:
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            added = rows.square().sum(axis=0), mx.array([float(rows.shape[0])])
        if name in found:
            added = found[name][0] + added[0], found[name][1] + added[1]
        found[name] = added
        result: mx.array = original.__call__(self, x, *args, **kwargs)
        return result

    return type(original.__name__, (original,), {"__call__": call})


def _squares_of_experts(x: mx.array, indices: mx.array, experts: int) -> tuple[mx.array, mx.array]:
    """Sums (experts, width) and counts (experts,) of what `SwitchLinear` is called with."""
    rows = mx.broadcast_to(x[..., 0, :], (*indices.shape, x.shape[-1]))
    squares = rows.reshape(-1, x.shape[-1]).astype(mx.float32).square()
    # (experts, rows): a product is faster than adding at indices.
    meets = mx.arange(experts)[:, None] == indices.reshape(1, -1)
    meets = meets.astype(mx.float32)
    return meets @ squares, meets.sum(axis=1)
