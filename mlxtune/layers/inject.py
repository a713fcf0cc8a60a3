"""Swap layers of a loaded mlx-lm model for ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtune.errors import ModelError
from mlxtune.layers.adapter import Adapter
from mlxtune.layers.dora import DoRALinear
from mlxtune.layers.lora import LoRALinear
from mlxtune.layers.quantized import QuantizedEmbedding, QuantizedLinear

Projection = nn.Linear | QuantizedLinear


def own_quantized_layers(model: nn.Module) -> None:
    """Replace MLX's quantized layers by ours, which take over the same arrays.

    Raises:
        ModelError: a layer is packed in a mode other than affine.
    """
    swaps: list[tuple[str, nn.Module]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        if layer.mode != "affine":
            raise ModelError(
                f"this layer is packed as {layer.mode}, and only affine packing can be trained on",
                where=path,
                remedy="use an affine-quantized or an unquantized copy of the model",
            )
        ours = QuantizedLinear if isinstance(layer, nn.QuantizedLinear) else QuantizedEmbedding
        swaps.append((path, ours.from_mlx(layer)))
    replace_layers(model, swaps)


def quantize_projections(model: nn.Module, *, bits: int, group_size: int = 64) -> None:
    """Pack the plain projections of the model's blocks, as QLoRA does.

    Embeddings and the output head keep their precision. Each weight is released as soon
    as it is packed.

    Raises:
        ModelError: a projection's width does not divide into groups.
    """
    for path, layer in list(projections(model).items()):
        if isinstance(layer, QuantizedLinear) or ".layers." not in f".{path}":
            continue
        if layer.weight.shape[-1] % group_size:
            raise ModelError(
                f"{layer.weight.shape[-1]} input features do not divide into groups of "
                f"{group_size}",
                where=path,
                remedy="leave model.quantize out for this model",
            )
        packed = QuantizedLinear.from_linear(layer, group_size=group_size, bits=bits)
        mx.eval(packed.weight, packed.scales, packed.biases)
        replace_layers(model, [(path, packed)])


def dequantize_layers(model: nn.Module, dtype: mx.Dtype) -> None:
    """Expand every packed layer into a plain one of type `dtype`, one at a time."""
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, QuantizedLinear):
            continue
        weight = layer.dequantized().astype(dtype)
        plain: nn.Module
        if isinstance(layer, QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
        else:
            plain = nn.Linear(1, 1, bias="bias" in layer)
            if "bias" in layer:
                plain.bias = layer.bias
        plain.weight = weight
        mx.eval(weight)
        replace_layers(model, [(path, plain)])


def add_lora(
    model: nn.Module,
    paths: Iterable[str],
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    dora: bool = False,
) -> None:
    """Freeze the model and put an adapter on each path: LoRA, or DoRA. Only they train."""
    model.freeze()
    found = projections(model)
    kind = DoRALinear if dora else LoRALinear
    replace_layers(
        model,
        [
            (path, kind.from_base(found[path], rank=rank, scale=scale, dropout=dropout))
            for path in paths
        ],
    )


def fuse_lora(model: nn.Module) -> None:
    """Replace each adapter by the plain float32 layer that it amounts to."""
    for path, layer in list(lora_layers(model)):
        fused = layer.fuse()
        mx.eval(fused.weight)
        replace_layers(model, [(path, fused)])


def projections(model: nn.Module) -> dict[str, Projection]:
    """Path to layer, for each projection that can carry an adapter, in order."""
    return {
        path: layer
        for path, layer in sorted(model.named_modules(), key=lambda item: _natural(item[0]))
        if isinstance(layer, nn.Linear | QuantizedLinear)
        and not isinstance(layer, QuantizedEmbedding)
    }


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Path and layer of each adapter in the model."""
    for path, layer in model.named_modules():
        if isinstance(layer, Adapter):
            yield path, layer


def replace_layers(model: nn.Module, swaps: list[tuple[str, nn.Module]]) -> None:
    """Put each layer at its path."""
    if swaps:
        model.update_modules(tree_unflatten(swaps))


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in path.split(".")]
