"""Give a packed batch to a model of mlx-lm.

mlx-lm's attention asks three things of the object it knows as a cache: an `offset` that
goes into its rotary embedding, `update_and_fetch(keys, values)`, and a mask from
`make_mask`. `PackCache` answers them for a whole grid of samples at once. The model is
called with all tokens in one row of rows x width; between the rotary embedding and the
attention the grid appears on the batch axis, each row with the shared prefix's keys in
front of its own, so that a token attends to its prefix, to what its group shares and to its own
sample only.

The rotary embedding has to hand out the grid, so the instances in a model are wrapped;
mlx-lm's classes stay as they are. Where it computes the same, `OwnAttention` goes further:
the queries are kept back as they come out of the rotary embedding, attention is computed as
soon as keys and values are known, and the model's own attention is left with one key whose
value is the result.
"""

from __future__ import annotations

import sys
from functools import partial
from math import ceil
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.models.attention import Block, attention

Given = tuple[mx.array, mx.array, mx.array]  # queries, keys, values
Cap = float | None

_NEVER = -1e30  # added to a score that is not to be seen


class PackCache:
    """Positions and segments of a packed grid, in the form of an mlx-lm cache.

    Args:
        positions: int32 (rows, width), each token's position in its own sample.
        segments: int32 (rows, width): 0 for the prefix, 1, 2, … for samples and for what groups
            share, -1 for padding.
        prefix: length of the shared prefix, which stands at the front of the grid.
        parents: int32 (rows, width), for each token another segment that it sees, which stands
            before it in its row; -2 where there is none. None if no token has one.
    """

    def __init__(
        self,
        positions: mx.array,
        segments: mx.array,
        prefix: int,
        parents: mx.array | None = None,
    ) -> None:
        self.positions = positions
        self.segments = segments
        self.prefix = prefix
        self.parents = parents
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

    def fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of each row with the prefix's in front.

        Args:
            keys, values: (rows, heads, width, dim), or (1, heads, rows * width, dim).
        """
        return self._with_prefix(keys), self._with_prefix(values)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As mlx-lm asks for keys and values."""
        return self.fetch(keys, values)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | None = None,
        window: int | None = None,
        cap: float | None = None,
    ) -> mx.array:
        """What every token takes from the values that it sees: (1, rows * width, heads * dim).

        Args:
            queries: (rows, heads, width, dim).
            keys, values: as `fetch` gives them.
            scale: of the scores.
            mask: who sees whom, where attention is not ours.
            window: how far a token looks back, where it is.
            cap: of the scores, see `attention`.
        """
        mixed = self._attended((queries, keys, values), scale, mask, window, cap)
        rows, heads, width, dim = mixed.shape
        return mixed.transpose(0, 2, 1, 3).reshape(1, rows * width, heads * dim)

    def _attended(
        self, given: Given, scale: float, mask: mx.array | None, _window: int | None, cap: Cap
    ) -> mx.array:
        """`attend`, by rows: (rows, heads, width, dim)."""
        queries, keys, values = given
        if cap is None:
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask
            )
        rows, heads, width, dim = queries.shape
        grouped = (queries * scale).reshape(rows, keys.shape[1], -1, width, dim)
        scores = mx.tanh(grouped @ keys[:, :, None].swapaxes(-1, -2) / cap) * cap
        if mask is not None:
            scores = mx.where(mask[:, :, None], scores, mx.finfo(scores.dtype).min)
        scores = mx.softmax(scores, axis=-1, precise=True)
        return (scores @ values[:, :, None]).reshape(rows, heads, width, -1)

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

        A sample's token sees the prefix, what its group shares and what precedes it in its
        sample; a token of the prefix sees what precedes it in the prefix. Padding sees itself, so
        that its softmax is over something.
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
        own = segment == segments[:, None, None, keys]
        if self.parents is not None:
            parent = self.parents[block.rows][:, None, block.queries, None]
            own = own | (parent == segments[:, None, None, keys])
        own = (
            own
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

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # What `PackedRope` keeps of the queries of the block that is being computed: (rows,
        # heads, width, dim), the scale of scores, the window.
        self.asked: tuple[mx.array, float, int | None] | None = None

    def make_mask(
        self, _length: int, return_array: bool = True, window_size: int | None = None
    ) -> None:
        """Nothing to mask: `PackedRope` knows its block's window."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """One key with one long value: what the model's own attention makes of it is the
        value, which its reshaping turns into (1, rows * width, heads * dim)."""
        assert self.asked is not None
        (queries, scale, window), self.asked = self.asked, None
        mixed = self.attend(queries, *self.fetch(keys, values), scale=scale, window=window)
        return mx.zeros((1, 1, 1, 1), mixed.dtype), mixed.reshape(1, 1, 1, -1)

    def _attended(
        self, given: Given, scale: float, _mask: mx.array | None, window: int | None, cap: Cap
    ) -> mx.array:
        window = self._reach(window)
        bias = partial(self._bias, window)
        # Behind what a group shares stand its samples one after another: the last of them sees
        # it from further along the row than its positions say, so no keys are left out.
        near = window if self.parents is None else None
        return attention(*given, scale=scale, prefix=self.prefix, bias=bias, window=near, cap=cap)


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
        grid = self.place(x, offset)
        if isinstance(offset, OwnAttention) and offset.asked is None:
            # The first that is turned are the queries: `update_and_fetch` has use for them.
            assert self.scale is not None
            offset.asked = grid, self.scale, self.window
            return mx.zeros((1, 1, 1, 1), grid.dtype)
        return grid

    def place(self, x: mx.array, pack: PackCache) -> mx.array:
        """Rotate (1, heads, rows * width, dim) to where a pack's tokens are, as its rows."""
        # `mx.fast.rope` takes one offset for each entry of the batch axis: with time on
        # it, every token has its own position.
        turned = self.inner(x.transpose(2, 1, 0, 3), offset=pack.positions.reshape(-1))
        grid = pack.rows(turned.transpose(2, 1, 0, 3))
        return grid * pack.gain if pack.gain != 1 else grid
