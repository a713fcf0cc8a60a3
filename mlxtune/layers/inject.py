"""Swap layers of a loaded mlx-lm model for ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear as MlxQuantizedSwitchLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mlxtune.errors import ModelError
from mlxtune.layers.adapter import Adapter
from mlxtune.layers.dora import DoRALinear
from mlxtune.layers.lora import LoRALinear
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import PackedLayer, QuantizedEmbedding, QuantizedLinear
from mlxtune.layers.switch import LoRASwitchLinear, QuantizedSwitchLinear, plain_experts
from mlxtune.models.targets import routers

_PROJECTIONS = (nn.Linear, QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)

_OURS: dict[type[nn.Module], type[PackedLayer]] = {
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
    MlxQuantizedSwitchLinear: QuantizedSwitchLinear,
}


def own_quantized_layers(model: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Replace MLX's and mlx-lm's quantized layers by ours, which take over the same arrays.

    Args:
        model: a loaded model.
        dtype: that it computes in; for embeddings packed in a mode that has no float type
            of its own.

    Raises:
        ModelError: a layer's weights have one more scale over all of them.
    """
    swaps: list[tuple[str, nn.Module]] = []
    for path, layer in model.named_modules():
        if type(layer) not in _OURS:
            continue
        if layer.get("global_scale") is not None:
            raise ModelError(
                f"this layer is packed as {layer.mode} with a scale over the whole tensor, "
                "which cannot be trained on",
                where=path,
                remedy="use a copy of the model that is packed without one, or not at all",
            )
        swaps.append((path, _OURS[type(layer)].from_mlx(layer, dtype)))
    replace_layers(model, swaps)


def quantize_projections(model: nn.Module, packing: Packing, *, evaluate: bool = True) -> None:
    """Pack the plain projections of the model's blocks, as QLoRA does.

    Embeddings, routers and the output head keep their precision. Each weight is packed at
    once and released, unless `evaluate` is false.

    Raises:
        ModelError: a projection's width does not divide into groups.
    """
    found = projections(model)
    for path, layer in found.items():
        in_block = ".layers." in f".{path}" and path not in routers(found)
        if isinstance(layer, PackedLayer) or not in_block:
            continue
        width = layer.weight.shape[-1]
        if width % packing.group_size:
            raise ModelError(
                f"{width} input features do not divide into groups of {packing.group_size}",
                where=path,
                remedy="leave model.quantize out for this model",
            )
        experts = isinstance(layer, SwitchLinear)
        ours: type[PackedLayer] = QuantizedSwitchLinear if experts else QuantizedLinear
        packed = ours.from_weight(layer, packing)
        if evaluate:
            mx.eval(packed.arrays)
        replace_layers(model, [(path, packed)])


def dequantize_layers(model: nn.Module, dtype: mx.Dtype, *, evaluate: bool = True) -> None:
    """Expand every packed layer into a plain one of type `dtype`, at once if `evaluate`."""
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, PackedLayer):
            continue
        weight = layer.packing.expand(layer.arrays, dtype)
        plain: nn.Module
        if isinstance(layer, QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
            plain.weight = weight
        elif isinstance(layer, QuantizedSwitchLinear):
            plain = plain_experts(weight, layer.get("bias"))
        else:
            plain = nn.Linear(1, 1, bias="bias" in layer)
            plain.weight = weight
            if "bias" in layer:
                plain.bias = layer.bias
        if evaluate:
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
    evaluate: bool = True,
) -> None:
    """Freeze the model and put an adapter on each path: LoRA, or DoRA. Only they train.

    With `evaluate`, what DoRA needs to know of its base is computed at once.

    Raises:
        ModelError: DoRA was asked for on experts.
    """
    model.freeze()
    found = projections(model)

    def adapted(path: str) -> Adapter:
        base: Any = found[path]
        kind: Any = LoRALinear
        if hasattr(base, "num_experts"):
            if dora:
                raise ModelError(
                    "DoRA goes on projections, and this is a layer of experts",
                    where=path,
                    remedy="lora.dora = false, or leave it out by lora.exclude_modules",
                )
            kind = LoRASwitchLinear
        elif dora:
            kind = partial(DoRALinear, evaluate=evaluate)
        adapter: Adapter = kind(base, rank=rank, scale=scale, dropout=dropout)
        return adapter

    replace_layers(model, [(path, adapted(path)) for path in paths])


def fuse_lora(model: nn.Module) -> None:
    """Replace each adapter by the plain float32 layer that it amounts to."""
    for path, layer in list(lora_layers(model)):
        fused = layer.fuse()
        mx.eval(fused.weight)
        replace_layers(model, [(path, fused)])


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Path to layer, for each projection that can carry an adapter, in order."""
    return {
        path: layer
        for path, layer in sorted(model.named_modules(), key=lambda item: _natural(item[0]))
        if isinstance(layer, _PROJECTIONS) and not isinstance(layer, QuantizedEmbedding)
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
