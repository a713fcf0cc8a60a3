"""Which projections of a model an adapter goes on: names to layers.

A name is the last part of a path (`q_proj`), a longer end of one (`mlp.up_proj`), or a
shell pattern of whole paths (`*.self_attn.*`), in which `*` stands for anything, dots
too, `?` for one character and `[…]` for one of several. Capitals count. Beside the blocks'
projections that is the output layer, `lm_head`, where it is no embedding's other side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise

import mlx.nn as nn

from mlxtune.errors import TargetError

ALL_LINEAR = "all-linear"
OUTPUT = "lm_head"


def find_targets(
    projections: dict[str, nn.Module],
    names: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    layers: int | Sequence[int | str] | None = None,
    layer_count: int,
) -> list[str]:
    """Paths of the projections that `names` mean, in the model's order.

    Args:
        projections: path to layer, for every projection that can carry an adapter
            (such as `model.layers.0.self_attn.q_proj`).
        names: names or patterns as above, or `all-linear` for every projection inside
            the blocks but their routers.
        exclude: names or patterns of those to leave out again.
        layers: adapt the last so many blocks only, or those of these numbers and ranges
            (`[0, 1, "8-15"]`, from 0, both ends in); all of them when None.
        layer_count: how many blocks the model has.

    Raises:
        TargetError: a name matches nothing, nothing is left, or the model has no such
            blocks.
    """
    chosen = _chosen_blocks(layers, layer_count)
    block_of = {path: _block_of(path) for path in projections}
    in_blocks = [path for path, block in block_of.items() if block is not None]
    able = [*in_blocks, *(path for path in block_of if f".{path}".endswith(f".{OUTPUT}"))]
    usual = {*in_blocks} - routers(projections)

    def meant(name: str, key: str) -> list[str]:
        return list(usual) if name == ALL_LINEAR else _matching(name, able, key)

    found = {path for name in names for path in meant(name, "target_modules")}
    out = {path for name in exclude for path in meant(name, "exclude_modules")}
    if not (found := {path for path in found if block_of[path] in chosen | {None}}):
        where = f"the last {layers} layers" if isinstance(layers, int) else "the layers asked for"
        raise TargetError(
            f"{', '.join(names)} lie in none of {where}",
            where="lora.target_modules",
            remedy="widen lora.layers, or leave it out for all layers",
        )
    if not (found := found - out):
        raise TargetError(
            f"{', '.join(exclude)} leave nothing of {', '.join(names)}",
            where="lora.exclude_modules",
        )
    return [path for path in able if path in found]


def _matching(name: str, paths: list[str], key: str) -> list[str]:
    """Those of the paths that a name means; there is at least one."""
    if any(sign in name for sign in "*?["):
        matching = [path for path in paths if fnmatchcase(path, name)]
    else:
        matching = [path for path in paths if f".{path}".endswith(f".{name}")]
    if matching:
        return matching
    have = sorted({path.rsplit(".", 1)[-1] for path in paths})
    close = get_close_matches(name, have, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    example = f", in paths such as {paths[0]}" if paths else ""
    raise TargetError(
        f"no layer of this model is called {name!r}",
        where=f"lora.{key}",
        remedy=f"{hint}the model has: {', '.join(have)}{example}; or {ALL_LINEAR} for all",
    )


def _chosen_blocks(layers: int | Sequence[int | str] | None, count: int) -> set[int]:
    """Numbers of the blocks that `layers` means."""
    if layers is None:
        return set(range(count))
    if isinstance(layers, int):
        if layers > count:
            raise TargetError(
                f"{layers} layers were asked for, and the model has {count}",
                where="lora.layers",
                remedy=f"set it to {count} or less, or leave it out for all layers",
            )
        return set(range(count - layers, count))
    ends = [str(part).partition("-") for part in layers]
    ranges = [(int(first), int(last or first)) for first, _, last in ends]
    if (highest := max(last for _, last in ranges)) >= count:
        raise TargetError(
            f"layer {highest} was asked for, and the model's {count} layers are numbered "
            f"0 to {count - 1}",
            where="lora.layers",
            remedy="correct the list, or leave it out for all layers",
        )
    return {block for first, last in ranges for block in range(first, last + 1)}


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
