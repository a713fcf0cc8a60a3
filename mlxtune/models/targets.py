"""Which projections of a model an adapter goes on: names to layers."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise

import mlx.nn as nn

from mlxtune.errors import TargetError

ALL_LINEAR = "all-linear"


def find_targets(
    projections: dict[str, nn.Module],
    names: tuple[str, ...],
    *,
    layers: int | None = None,
    layer_count: int,
) -> list[str]:
    """Paths of the projections that `names` mean, in the model's order.

    Args:
        projections: path to layer, for every projection that can carry an adapter
            (such as `model.layers.0.self_attn.q_proj`).
        names: last parts of paths (`q_proj`), longer ends of them (`mlp.up_proj`), or
            `all-linear` for every projection inside the blocks but their routers.
        layers: adapt the last `layers` blocks only; all of them when None.
        layer_count: how many blocks the model has.

    Raises:
        TargetError: a name matches nothing, or the model has fewer blocks than asked for.
    """
    if layers is not None and layers > layer_count:
        raise TargetError(
            f"{layers} layers were asked for, and the model has {layer_count}",
            where="lora.layers",
            remedy=f"set it to {layer_count} or less, or leave it out for all layers",
        )
    first = 0 if layers is None else layer_count - layers
    in_blocks = {path: block for path in projections if (block := _block_of(path)) is not None}
    usual = in_blocks.keys() - routers(projections)
    found: set[str] = set()
    for name in names:
        matching = [
            path
            for path in in_blocks
            if (path in usual if name == ALL_LINEAR else f".{path}".endswith(f".{name}"))
        ]
        if not matching:
            have = sorted({path.rsplit(".", 1)[-1] for path in in_blocks})
            close = get_close_matches(name, have, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise TargetError(
                f"no layer of this model is called {name!r}",
                where="lora.target_modules",
                remedy=f"{hint}the model has: {', '.join(have)}; or {ALL_LINEAR} for all",
            )
        found.update(path for path in matching if in_blocks[path] >= first)
    if not found:
        raise TargetError(
            f"{', '.join(names)} lie in none of the last {layers} layers",
            where="lora.target_modules",
            remedy="raise lora.layers, or leave it out for all layers",
        )
    return [path for path in in_blocks if path in found]


def routers(projections: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the plain projections that choose or weigh experts.

    They stand in the same module as the experts' own, as `mlp.gate` and
    `mlp.shared_expert_gate` do beside `mlp.switch_mlp`, or somewhere in it with an output
    for each expert.
    """
    experts = {
        path.rsplit(".", 2)[0]: layer.num_experts
        for path, layer in projections.items()
        if hasattr(layer, "num_experts")
    }
    return {
        path
        for path, layer in projections.items()
        for owner, count in experts.items()
        if path.startswith(f"{owner}.")
        and not hasattr(layer, "num_experts")
        and (path.rpartition(".")[0] == owner or layer.weight.shape[0] == count)
    }


def _block_of(path: str) -> int | None:
    """Number of the block a path lies in: 3 for `model.layers.3.mlp.up_proj`."""
    parts = path.split(".")
    for before, part in pairwise(parts):
        if before == "layers" and part.isdigit():
            return int(part)
    return None
