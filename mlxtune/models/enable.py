"""Make a model take packs, and prove on a few tokens that they come out right."""

from __future__ import annotations

import sys
from math import inf, isfinite
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import scalar
from mlxtune.errors import ModelError
from mlxtune.gpu_errors import fault_of
from mlxtune.models.own_calls import leave_packs, take_packs
from mlxtune.models.packed import OwnAttention, PackCache, PackedRope
from mlxtune.models.rotation import take_positions
from mlxtune.models.skeleton import Config, tiny_twin

_Pack = TypeVar("_Pack", bound=PackCache)

# Two samples of a group, 1 2 3 4 5 and 1 2 3 6, and a third, 1 2 7, in a grid of one row for the
# prefix 1 2 and one row that holds 3, which the group shares, then 4 5, 6, 7 and padding.
_PROBE = ((1, 2, 0, 0, 0, 0), (3, 4, 5, 6, 7, 0))
_POSITIONS = ((0, 1, 0, 0, 0, 0), (2, 3, 4, 3, 2, 0))
_SEGMENTS = ((0, 0, -1, -1, -1, -1), (1, 2, 2, 3, 4, -1))
_PARENTS = ((-2,) * 6, (-2, 1, 1, 1, -2, -2))
# Sixteen-bit types round at 1e-2, as TF32 may; a wrong position or mask is off by far more.
_BOUND, _LOOSE = 2e-4, 5e-2
# Scores nine hundred times as large show a cap on them, which small ones do not reach.
_GAIN = 30.0


def enable_packs_by(model: nn.Module, config: Config) -> None:
    """`enable_packs`, proven on a small model of the same architecture in float32.

    In a deep model of sixteen bits two orders of rounding are as far apart as a wrong mask is
    from a right one. The small model is computed on the CPU: some GPUs (Apple's M5, NVIDIA's)
    multiply float32 in TF32, which rounds more than the bound allows. Where no small model can
    be made, it is proven on the model itself.

    Args:
        model: to train on packs.
        config: what config.json says of it.

    Raises:
        ModelError: as `enable_packs`.
    """
    try:
        with mx.stream(mx.cpu):
            twin: nn.Module | None = tiny_twin(config)
    except Exception:  # whatever an unknown architecture makes of small sizes
        twin = None
    if twin is not None:
        with mx.stream(mx.cpu):
            enable_packs(twin)
    enable_packs(model, twin)


def enable_packs(model: nn.Module, proven_on: nn.Module | None = None) -> None:
    """Wrap the rotary embeddings of a model's blocks, and prove that packs come out right.

    Args:
        model: to train on packs.
        proven_on: a model of the same architecture for which they are enabled; then nothing
            is computed.

    Raises:
        ModelError: a block has no attention of the known form, or a packed pair of
            samples does not give the logits of each alone. The model is as before.
    """
    if any(isinstance(module, PackedRope) for module in model.modules()):
        return  # done before
    take_positions(model)
    owners = [
        module for module in model.modules() if isinstance(getattr(module, "rope", None), nn.Module)
    ]
    if len(owners) != len(model.layers):
        raise ModelError("this architecture's attention has no rotary embedding in every block")
    for owner in owners:
        scale = getattr(owner, "scale", None)
        owner.rope = PackedRope(owner.rope, scale if isinstance(scale, float) else None)
        take_packs(owner)
    if proven_on is not None:
        own = pack_kind(proven_on) is OwnAttention and _find_windows(model)
    elif problem := _problem(model):
        for owner in owners:
            owner.rope = owner.rope.inner
            leave_packs(owner)
        raise ModelError(f"packed samples cannot be given to this architecture: {problem}")
    else:
        # A pack needs a mask that is an array. With one MLX keeps the scores of every block for
        # the backward pass on CPUs and on Metal; CUDA's kernels take it (for 16-bit types and
        # heads of up to 128; where a row is no multiple of 128 long, the backward pass computes
        # the scores of one block at a time).
        own = not mx.cuda.is_available() and _find_windows(model) and _takes_own_attention(model)
    for owner in owners:
        owner.rope.own = own


def pack_kind(model: nn.Module) -> type[PackCache]:
    """What a model for which packs are enabled takes as the cache of its blocks."""
    ropes = [module for module in model.modules() if isinstance(module, PackedRope)]
    return OwnAttention if ropes and all(rope.own for rope in ropes) else PackCache


def _problem(model: nn.Module) -> str | None:
    """What is wrong with the logits of the packed samples; None if nothing is."""
    try:
        got = _logits(model, _probe(PackCache))
        samples = ((1, 2, 3, 4, 5), 2), ((1, 2, 3, 6), 3), ((1, 2, 7), 2)
        alone = [model(mx.array([tokens]))[0, start:] for tokens, start in samples]
        off = _distance(got, mx.concatenate(alone))
    except Exception as error:  # whatever an unknown architecture does with a cache
        if fault_of(error) is not None:
            raise
        return str(error) or type(error).__name__
    return None if off < _bound(got.dtype) else f"logits differ by {off:.1e}"


def _takes_own_attention(model: nn.Module) -> bool:
    """Whether the logits of a pack are the same with attention of our own."""
    try:
        for gain, widest in ((1.0, sys.maxsize), (_GAIN, sys.maxsize), (1.0, 2)):
            got, want = (
                _logits(model, _probe(kind, gain, widest)) for kind in (OwnAttention, PackCache)
            )
            if _distance(got, want) > _bound(got.dtype):
                return False
    except Exception:  # as above
        return False
    return True


def _bound(dtype: mx.Dtype) -> float:
    """What logits may differ by, relative to the largest."""
    exact = dtype == mx.float32 and mx.default_device() == mx.cpu
    return _BOUND if exact else _LOOSE


def _find_windows(model: nn.Module) -> bool:
    """Tell the rotary embeddings how far their blocks look back; nothing is computed.

    Returns:
        False where a block is not given one of the masks that the model has asked for.
    """
    cache = _probe(_Asked)
    windows: list[int | None] = []
    classes = [type(layer) for layer in model.layers]

    def watched(original: type) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                windows.extend(window for mask, window in cache.given if given is mask)
            return original.__call__(self, *args, **kwargs)

        return type(original.__name__, (original,), {"__call__": call})

    try:
        for layer, original in zip(model.layers, classes, strict=True):
            layer.__class__ = watched(original)
        _logits(model, cache)
    except Exception:  # as above
        return False
    finally:
        for layer, original in zip(model.layers, classes, strict=True):
            layer.__class__ = original
    modules = [module for layer in model.layers for module in layer.modules()]
    ropes = [module for module in modules if isinstance(module, PackedRope)]
    if not len(ropes) == len(windows) == len(classes):
        return False
    for rope, window in zip(ropes, windows, strict=True):
        rope.window = window
    return True


def _probe(kind: type[_Pack], gain: float = 1.0, widest: int = sys.maxsize) -> _Pack:
    """The pack of `_PROBE`."""
    positions, segments, parents = map(mx.array, (_POSITIONS, _SEGMENTS, _PARENTS))
    cache = kind(positions, segments, 2, parents)
    cache.gain, cache.widest = gain, widest
    return cache


def _logits(model: nn.Module, cache: PackCache) -> mx.array:
    """Logits of the tokens of `_PROBE` after its prefix."""
    tokens = mx.array(_PROBE).reshape(1, -1)
    logits: mx.array = model(tokens, cache=[cache] * len(model.layers))
    return logits[0, 6:11]


def _distance(got: mx.array, want: mx.array) -> float:
    """Largest difference, relative to the largest value; infinite if there is no number."""
    error = scalar(mx.abs(got - want).max() / mx.abs(want).max())
    return error if isfinite(error) else inf


class _Asked(PackCache):
    """A pack that remembers the masks it has given, and which windows they are of."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.given: list[tuple[mx.array, int | None]] = []

    def make_mask(
        self, _length: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array:
        mask = self.mask(window_size)
        self.given.append((mask, window_size))
        return mask
