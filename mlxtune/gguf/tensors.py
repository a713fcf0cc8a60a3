"""A GGUF file as a stream of tensors under Hugging Face's names, one in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from mlxtune.errors import ExportError, ModelError
from mlxtune.gguf.architectures import Architecture, Config
from mlxtune.gguf.heads import reordering
from mlxtune.gguf.reader import GGUFFile
from mlxtune.gguf.rope import ROPE_TENSORS

_PIECE = 1 << 20
PLAIN = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a model, loaded when its turn comes.

    Attributes:
        name: as mlx-lm calls the parameter, such as `model.norm.weight`.
        shape: (out, in) for a projection, (experts, out, in) for stacked ones.
        load: gives its values as float32.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], npt.NDArray[np.float32]]


def gguf_tensors(file: GGUFFile, entry: Architecture, config: Config) -> Iterator[SourceTensor]:
    """Every parameter of a GGUF file.

    Raises:
        ModelError: a tensor is not part of the architecture.
    """
    for name, info in file.tensors.items():
        if is_parameter(name, config):
            hf_name = parameter_name(file, entry, name)
            change = entry.change(hf_name)
            shape = (*info.shape, *(1,) * (change.axes if change else 0))
            yield SourceTensor(hf_name, shape, _loader(file, name, hf_name, entry, config))


_BLOCK = re.compile(r"blk\.(\d+)\.")


def is_parameter(name: str, config: Config) -> bool:
    """Whether a tensor of a GGUF file is one of the model.

    Others belong to its rotation, or to blocks behind the last that predict further tokens.
    """
    block = _BLOCK.match(name)
    behind = block is not None and int(block[1]) >= config["num_hidden_layers"]
    return name not in ROPE_TENSORS and not behind


def parameter_name(file: GGUFFile, entry: Architecture, name: str) -> str:
    """What mlx-lm calls a tensor of a GGUF file.

    Raises:
        ModelError: it is not part of the architecture.
    """
    hf_name = entry.to_hf_name(name)
    if hf_name is None:
        raise ModelError(
            f"the tensor {name} is not part of a plain {entry.name} model", where=str(file.path)
        )
    return hf_name


def _loader(
    file: GGUFFile, name: str, hf_name: str, entry: Architecture, config: Config
) -> Callable[[], npt.NDArray[np.float32]]:
    def load() -> npt.NDArray[np.float32]:
        try:
            values = expanded(file.read(name), file.tensors[name].type)
            if change := entry.change(hf_name):
                values = change.to_hf(values)
            if heads := reordering(entry, hf_name, config):
                values = heads.to_hf(values)
        except (ValueError, NotImplementedError) as error:
            raise unreadable(file, name, error) from None
        return values

    return load


def unreadable(file: GGUFFile, name: str, error: Exception) -> ModelError:
    """What to raise for a tensor whose type or shape nothing can be made of."""
    info = file.tensors[name]
    return ModelError(
        f"tensor {name} of type {info.type.name} and shape {info.shape} cannot be read: {error}",
        where=str(file.path),
    )


def expanded(data: npt.NDArray[np.generic], type_: Type) -> npt.NDArray[np.float32]:
    """A tensor's data, as `GGUFFile.data` gives it, as float32.

    Raises:
        NotImplementedError: the type cannot be expanded.
    """
    if type_ == Type.BF16:
        wide = data.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if type_ in PLAIN:
        return data.astype(np.float32, copy=False)
    # Row by row, some at a time: what the package needs in between is several times as large.
    rows = data.reshape(-1, data.shape[-1])
    shape = gguf.quant_shape_from_byte_shape(data.shape, type_)
    wide = np.empty((len(rows), shape[-1]), np.float32)
    step = max(1, _PIECE // shape[-1])
    for start in range(0, len(rows), step):
        wide[start : start + step] = gguf.quants.dequantize(rows[start : start + step], type_)
    return wide.reshape(shape)


def to_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Values in float16.

    Raises:
        ExportError: one of them is too large for it.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    if np.isinf(narrow).any() and not np.isinf(values).any():
        raise ExportError(
            f"{np.abs(values).max():.3g} is more than float16 holds",
            remedy="write bf16, or f32",
        )
    return narrow
