"""A model's parameters as they are after fusing adapters and expanding packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxtune.gguf.tensors import SourceTensor
from mlxtune.layers.adapter import Adapter
from mlxtune.layers.quantized import PackedLayer


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of a fused model, computed when it is asked for.

    Attributes:
        name: as the model's parameter is called, such as `model.norm.weight`.
        shape: of the array.
        load: gives the array, in float32 where it was computed.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], mx.array]

    def source(self) -> SourceTensor:
        """The same as NumPy's float32."""

        def load() -> npt.NDArray[np.float32]:
            return np.array(self.load().astype(mx.float32))

        return SourceTensor(self.name, self.shape, load)


def dense_tensors(model: nn.Module) -> Iterator[DenseTensor]:
    """Every parameter of a model as it is after fusing and expanding, in a fixed order.

    Experts stay stacked, (experts, out, in), as mlx-lm keeps and loads them.
    """
    owned: set[str] = set()
    for path, layer in sorted(model.named_modules()):
        if any(path.startswith(f"{owner}.") for owner in owned):
            continue
        if isinstance(layer, Adapter):
            owned.add(path)
            yield from _projection(path, layer.linear, layer.fused_weight)
        elif isinstance(layer, PackedLayer):
            owned.add(path)
            yield from _projection(path, layer, layer.dequantized)
        else:
            for name, value in layer.items():
                if isinstance(value, mx.array) and not name.startswith("_"):
                    full = f"{path}.{name}" if path else name
                    yield DenseTensor(full, value.shape, _given(value))


def _projection(
    path: str, base: nn.Module, weight: Callable[[], mx.array]
) -> Iterator[DenseTensor]:
    shape = base.shape if isinstance(base, PackedLayer) else base.weight.shape
    yield DenseTensor(f"{path}.weight", tuple(shape), weight)
    if "bias" in base:
        yield DenseTensor(f"{path}.bias", base.bias.shape, _given(base.bias))


def _given(array: mx.array) -> Callable[[], mx.array]:
    return lambda: array
