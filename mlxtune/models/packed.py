"""Give a packed batch to an unmodified mlx-lm model.

mlx-lm's attention asks three things of the object it knows as a cache: an `offset` that
goes into its rotary embedding, `update_and_fetch(keys, values)`, and a mask from
`make_mask`. `PackCache` answers them for a whole grid of samples at once. The model is
called with all tokens in one row of rows x width; between the rotary embedding and the
attention the grid appears on the batch axis, each row with the shared prefix's keys in
front of its own, so that a token attends to its prefix and its own sample only.

The rotary embedding has to hand out the grid, so the instances in a model are wrapped;
mlx-lm's classes stay as they are. Where it computes the same, `OwnAttention` goes further:
the queries are kept back as they come out of the rotary embedding, attention is computed as
soon as keys and values are known, and the model's own attention is left with one key whose
value is the result.
"""

from __future__ import annotations

import sys
from functools import partial
from math import ceil, inf, isfinite
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxtune.arrays import scalar
from mlxtune.errors import ModelError
from mlxtune.models.attention import Block, attention


class PackCache:
    """Positions and segments of a packed grid, in the form of an mlx-lm cache.

    Args:
        positions: int32 (rows, width), each token's position in its own sample.
        segments: int32 (rows, width): 0 for the prefix, 1, 2, … for samples, -1 for
            padding.
        prefix: length of the shared prefix, which stands at the front of the grid.
    """

    def __init__(self, positions: mx.array, segments: mx.array, prefix: int) -> None:
        self.positions = positions
        self.segments = segments
        self.prefix = prefix
        # What `PackedRope` keeps of the queries of the block that is being computed, for
        # attention of our own: (rows, heads, width, dim), the scale of scores, the window.
        self.asked: tuple[mx.array, float, int | None] | None = None
        # To see in a few tokens what an architecture does to large scores, and which blocks
        # look through a window: a factor on queries and keys, and the widest window.
        self.gain, self.widest = 1.0, sys.maxsize
        self._biases: dict[tuple[int | None, int, int], mx.array] = {}

    @property
    def offset(self) -> PackCache:
        """Handed by the model to `PackedRope`, which takes all positions from it."""
        return self

    def rows(self, x: mx.array) -> mx.array:
        """(1, heads, rows * width, dim) to (rows, heads, width, dim)."""
        _, heads, _, dim = x.shape
        rows, width = self.positions.shape
        return x.reshape(heads, rows, width, dim).transpose(1, 0, 2, 3)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of each row with the prefix's in front.

        Args:
            keys: (rows, heads, width, dim), from `PackedRope`.
            values: (1, heads, rows * width, dim), or as the keys.
        """
        keys, values = self._with_prefix(keys), self._with_prefix(values)
        if self.asked is None:
            return keys, values
        (queries, scale, window), self.asked = self.asked, None
        window = self._reach(window)
        mixed = attention(
            queries,
            keys,
            values,
            scale=scale,
            prefix=self.prefix,
            bias=partial(self._bias, window),
            window=window,
        )
        # One key with one long value: what the model's own attention makes of it is the
        # value, which its reshaping turns into (1, rows * width, heads * dim).
        mixed = mixed.transpose(0, 2, 1, 3).reshape(1, 1, 1, -1)
        return mx.zeros((1, 1, 1, 1), mixed.dtype), mixed

    def _with_prefix(self, x: mx.array) -> mx.array:
        if x.shape[0] != self.positions.shape[0]:
            x = self.rows(x)
        if not self.prefix:
            return x
        rows, heads, width, dim = x.shape
        front = x[: ceil(self.prefix / width)].transpose(1, 0, 2, 3)
        front = front.reshape(1, heads, -1, dim)[:, :, : self.prefix]
        return mx.concatenate([mx.broadcast_to(front, (rows, *front.shape[1:])), x], axis=2)

    def make_mask(
        self, _length: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array | None:
        """As mlx-lm asks for it."""
        return self.mask(self._reach(window_size))

    def _reach(self, window: int | None) -> int | None:
        """How far a token of the pack looks back; None where that takes nothing from it."""
        if window is None:
            return None
        reach = min(window, self.widest)
        return reach if reach < self.prefix + self.positions.shape[1] else None

    def mask(self, window_size: int | None = None, block: Block | None = None) -> mx.array:
        """Who sees whom: bool (rows, 1, width, prefix + width), or of a block alone.

        A sample's token sees the prefix and what precedes it in its sample; a token of
        the prefix sees what precedes it in the prefix. Padding sees itself, so that its
        softmax is over something.
        """
        width = self.positions.shape[1]
        block = block or Block(slice(None), slice(0, width), slice(0, self.prefix + width))
        segments, positions = self.segments[block.rows], self.positions[block.rows]
        segment = segments[:, None, block.queries, None]
        position = positions[:, None, block.queries, None]
        # The block's keys: of the prefix, and of the rows' own.
        ends = block.keys.start, block.keys.stop
        ahead = mx.arange(*(min(end, self.prefix) for end in ends))
        keys = slice(*(max(0, end - self.prefix) for end in ends))
        index = mx.arange(width)
        own = (
            (segment == segments[:, None, None, keys])
            & (index[None, keys] <= index[block.queries, None])
            & ((segment != 0) | (self.prefix == 0))
        )
        front = (segment >= 0) & (ahead <= position)
        if window_size is not None:
            own = own & (position - positions[:, None, None, keys] < window_size)
            front = front & (position - ahead < window_size)
        return mx.concatenate([mx.broadcast_to(front, (*own.shape[:-1], ahead.size)), own], -1)

    def _bias(self, window: int | None, block: Block) -> mx.array:
        """The mask of a block for its scores, made once for all layers alike."""
        key = window, block.rows.start, block.queries.start
        if key not in self._biases:
            self._biases[key] = mx.where(self.mask(window, block), 0.0, _NEVER)[:, :, None]
        return self._biases[key]


class OwnAttention(PackCache):
    """A pack for a model whose attention is ours: it is given one key, and no mask."""

    def make_mask(
        self, _length: int, return_array: bool = True, window_size: int | None = None
    ) -> None:
        """Nothing to mask: `PackedRope` knows its block's window."""


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


class PackedRope(nn.Module):
    """A rotary embedding that can also place a packed grid.

    Args:
        inner: the model's own rotary embedding. Given anything but a pack as offset, it
            is simply called.
        scale: of the scores of the attention that it belongs to; None if unknown.

    Attributes:
        own: whether the attention that it belongs to may be ours.
        window: how far that looks back, in tokens; None for without bounds.
    """

    def __init__(self, inner: nn.Module, scale: float | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner
        self.scale = scale
        self.own = False
        self.window: int | None = None

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate (1, heads, rows * width, dim); a packed grid comes back as its rows."""
        if not isinstance(offset, PackCache):
            plain: mx.array = self.inner(x, offset=offset)
            return plain
        # `mx.fast.rope` takes one offset for each entry of the batch axis: with time on
        # it, every token has its own position.
        turned = self.inner(x.transpose(2, 1, 0, 3), offset=offset.positions.reshape(-1))
        grid = offset.rows(turned.transpose(2, 1, 0, 3))
        if offset.gain != 1:
            grid = grid * offset.gain
        if isinstance(offset, OwnAttention) and offset.asked is None:
            # The first that is turned are the queries: `update_and_fetch` has use for them.
            assert self.scale is not None
            offset.asked = grid, self.scale, self.window
            return mx.zeros((1, 1, 1, 1), grid.dtype)
        return grid


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
    owners = [
        module for module in model.modules() if isinstance(getattr(module, "rope", None), nn.Module)
    ]
    if len(owners) != len(model.layers):
        raise ModelError("this architecture's attention has no rotary embedding in every block")
    for owner in owners:
        scale = getattr(owner, "scale", None)
        owner.rope = PackedRope(owner.rope, scale if isinstance(scale, float) else None)
    if proven_on is not None:
        own = pack_kind(proven_on) is OwnAttention and _find_windows(model)
    elif problem := _problem(model):
        for owner in owners:
            owner.rope = owner.rope.inner
        raise ModelError(f"packed samples cannot be given to this architecture: {problem}")
    else:
        # CUDA has a fused attention with a backward pass; elsewhere MLX keeps all scores.
        own = not mx.cuda.is_available() and _find_windows(model) and _takes_own_attention(model)
    for owner in owners:
        owner.rope.own = own


def pack_kind(model: nn.Module) -> type[PackCache]:
    """What a model for which packs are enabled takes as the cache of its blocks."""
    ropes = [module for module in model.modules() if isinstance(module, PackedRope)]
    return OwnAttention if ropes and all(rope.own for rope in ropes) else PackCache


_NEVER = -1e30
_Pack = TypeVar("_Pack", bound=PackCache)


# Two samples, 1 2 3 and 1 2 4 5, in a grid of one row for the prefix 1 2 and one row that
# holds 3, 4 5 and padding.
_PROBE = ((1, 2, 0, 0), (3, 4, 5, 0))
# Sixteen-bit types round at 1e-2; a wrong position or mask is off by far more.
_BOUNDS = {mx.float32: 2e-4}
_LOOSE = 5e-2
# Scores nine hundred times as large show a cap on them, which small ones do not reach.
_GAIN = 30.0


def _problem(model: nn.Module) -> str | None:
    """What is wrong with the logits of two packed samples; None if nothing is."""
    try:
        got = _logits(model, _probe(PackCache))
        alone = [model(mx.array([[1, 2, 3]]))[0, 2:], model(mx.array([[1, 2, 4, 5]]))[0, 2:]]
        off = _distance(got, mx.concatenate(alone))
    except Exception as error:  # whatever an unknown architecture does with a cache
        return str(error) or type(error).__name__
    return None if off < _BOUNDS.get(got.dtype, _LOOSE) else f"logits differ by {off:.1e}"


def _takes_own_attention(model: nn.Module) -> bool:
    """Whether the logits of a pack are the same with attention of our own."""
    if getattr(getattr(model, "args", None), "attn_logit_softcapping", None):
        return False
    try:
        for gain, widest in ((1.0, sys.maxsize), (_GAIN, sys.maxsize), (1.0, 2)):
            got, want = (
                _logits(model, _probe(kind, gain, widest)) for kind in (OwnAttention, PackCache)
            )
            if _distance(got, want) > _BOUNDS.get(got.dtype, _LOOSE):
                return False
    except Exception:  # as above
        return False
    return True


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
    positions, segments = [[0, 1, 0, 0], [2, 2, 3, 0]], [[0, 0, -1, -1], [1, 2, 2, -1]]
    cache = kind(mx.array(positions), mx.array(segments), 2)
    cache.gain, cache.widest = gain, widest
    return cache


def _logits(model: nn.Module, cache: PackCache) -> mx.array:
    """Logits of the three tokens of `_PROBE` after its prefix."""
    tokens = mx.array(_PROBE).reshape(1, -1)
    logits: mx.array = model(tokens, cache=[cache] * len(model.layers))
    return logits[0, 4:7]


def _distance(got: mx.array, want: mx.array) -> float:
    """Largest difference, relative to the largest value; infinite if there is no number."""
    error = scalar(mx.abs(got - want).max() / mx.abs(want).max())
    return error if isfinite(error) else inf
