"""Attention that keeps no scores: block by block, and computed again in the backward pass.

The algorithm is that of FlashAttention-2 (Dao 2023, arXiv:2307.08691) in MLX's own
operations. Blocks above the diagonal or out of a window's sight are never computed, and a
block is small enough to stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxtune.arrays import custom_gradient, exp
from mlxtune.device import on_cpu

# Scores of one block: 2 MiB of float32 on a CPU, whose caches hold that; a GPU needs many
# at once to be busy, and the backward pass has a few arrays of that size.
_CPU_SCORES, _GPU_SCORES = 1 << 19, 1 << 25
_LEAST_QUERIES = 32
# In longer rows what lies above the diagonal is left out, which is most of what a row's square
# and half of it differ by; smaller blocks would keep a GPU less busy.
_MOST_QUERIES = 512


@dataclass(frozen=True)
class Block:
    """Some rows of a grid, some queries of them, and the keys that these may see.

    Keys are counted from the first of the prefix, which stands in front of each row's own.
    """

    rows: slice
    queries: slice
    keys: slice

    @property
    def seen(self) -> int:
        """How many keys there are."""
        return int(self.keys.stop - self.keys.start)


# The mask of a block: float32 (rows, 1, 1, queries, keys), 0 or very negative.
Bias = Callable[[Block], mx.array]


def blocks(
    rows: int, width: int, prefix: int, heads: int, window: int | None = None
) -> Iterator[Block]:
    """The blocks of a grid of `rows` x `width` queries, each row with `prefix` keys in front.

    The first `prefix` queries of the grid are the prefix itself: rows full of them see what
    stands before them in it, and none of their own keys.
    """
    limit = _CPU_SCORES if on_cpu() else _GPU_SCORES
    sight, seen = min(width, _MOST_QUERIES), prefix + width
    if window is not None:
        # No more queries than a window holds: they see twice as many keys at most.
        sight = min(sight, max(window, _LEAST_QUERIES))
        seen = prefix + min(width, window + sight)
    queries = min(sight, max(_LEAST_QUERIES, limit // (heads * seen)))
    queries = -(-width // -(-width // queries))  # all blocks of a row alike
    group = max(1, limit // (heads * queries * seen))
    full = prefix // width  # rows of nothing but the prefix
    for begin, stop in ((0, full), (full, rows)):
        for row in range(begin, stop, group):
            last = min(stop, row + group)
            for start in range(0, width, queries):
                end = min(width, start + queries)
                if row < full:
                    first, seen_to = row * width + start, (last - 1) * width + end
                else:
                    # Where its samples begin is not known here: behind a prefix they see all.
                    first, seen_to = 0 if prefix else start, prefix + end
                seen_from = 0 if window is None else max(0, first - window + 1)
                yield Block(slice(row, last), slice(start, end), slice(seen_from, seen_to))


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    prefix: int,
    bias: Bias,
    window: int | None = None,
    cap: float | None = None,
) -> mx.array:
    """softmax(capped(scale * Q K^T) + bias) V, differentiable in all three.

    Args:
        queries: (rows, heads, width, dim).
        keys, values: (rows, kv heads, prefix + width, dim); heads share them in groups.
        scale: on the scores.
        prefix: keys in front of a row's own.
        bias: who sees whom, block by block; a query sees no key of its row after itself.
        window: how many keys a query sees at most, itself among them.
        cap: no score is larger: s becomes cap * tanh(s / cap) (Gemma 2, arXiv:2408.00118).

    Returns:
        As `queries`.
    """
    rows, heads, width, dim = queries.shape
    kv_heads = keys.shape[1]
    parts = list(blocks(rows, width, prefix, heads, window))

    def scores(block: Block, q: mx.array, k: mx.array) -> tuple[mx.array, mx.array | None]:
        """Scores of a block, and how steep the cap is at each."""
        product = (q @ k.swapaxes(-1, -2)).astype(mx.float32)
        product = product.reshape(*product.shape[:2], heads // kv_heads, -1, block.seen)
        if cap is None:
            return product + bias(block), None
        bent = mx.tanh(product / cap)
        return bent * cap + bias(block), 1 - bent * bent

    def of_block(block: Block, x: mx.array) -> mx.array:
        """Queries, outputs or gradients of a block, the heads of a group one after another."""
        own = x.reshape(rows, kv_heads, heads // kv_heads, width, dim)
        own = own[block.rows, :, :, block.queries]
        return own.reshape(own.shape[0], kv_heads, -1, dim)

    def backward(primals: Any, cotangents: Any, results: Any) -> Any:
        q, k, v = primals
        (out, log), gradient = results, cotangents[0]
        out, gradient = out.reshape(q.shape), gradient.reshape(q.shape)
        log = log.reshape(rows, kv_heads, heads // kv_heads, width, 1)
        # What softmax takes away from every score's gradient.
        drift = (out.astype(mx.float32) * gradient).sum(axis=-1)
        drift = drift.reshape(rows, kv_heads, heads // kv_heads, width, 1)
        for_q: list[mx.array] = []
        for_k: dict[int, mx.array] = {}
        for_v: dict[int, mx.array] = {}
        before: list[mx.array] = []
        # From the end, so that the first block of some rows has all their keys.
        for block in reversed(parts):
            own, above = of_block(block, q) * scale, of_block(block, gradient)
            if before:
                # Not before the last block is done with its scores.
                [own] = mx.depends([own], before)
            k_seen, v_seen = k[block.rows, :, block.keys], v[block.rows, :, block.keys]
            s, slope = scores(block, own, k_seen)
            p = exp(s - log[block.rows, :, :, block.queries])
            flat = p.reshape(*own.shape[:-1], block.seen)
            from_above = (above @ v_seen.swapaxes(-1, -2)).astype(mx.float32)
            ds = p * (from_above.reshape(p.shape) - drift[block.rows, :, :, block.queries])
            if slope is not None:
                ds = ds * slope
            ds = ds.reshape(flat.shape).astype(q.dtype)
            for_q.append(((ds @ k_seen) * scale).reshape(*p.shape[:-1], dim))
            before = [
                for_q[-1],
                _add(for_k, block, ds.swapaxes(-1, -2) @ own, prefix + width),
                _add(for_v, block, flat.astype(v.dtype).swapaxes(-1, -2) @ above, prefix + width),
            ]
        for_q.reverse()
        return (
            _joined(parts, for_q).reshape(q.shape),
            mx.concatenate([for_k[row] for row in sorted(for_k)]),
            mx.concatenate([for_v[row] for row in sorted(for_v)]),
        )

    @custom_gradient(backward)
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        outputs: list[mx.array] = []
        logs: list[mx.array] = []
        for block in parts:
            own = of_block(block, q) * scale
            if outputs:  # not before the last block is done with its scores
                [own] = mx.depends([own], [outputs[-1]])
            s, _ = scores(block, own, k[block.rows, :, block.keys])
            peak = s.max(axis=-1, keepdims=True)
            p = exp(s - peak)
            total = p.sum(axis=-1, keepdims=True)
            flat = p.reshape(*own.shape[:-1], block.seen).astype(v.dtype)
            mixed = flat @ v[block.rows, :, block.keys]
            mixed = mixed.reshape(*total.shape[:-1], dim) / total
            outputs.append(mixed.astype(v.dtype))
            logs.append(peak + mx.log(total))
        return _joined(parts, outputs), _joined(parts, logs)

    result: mx.array = attend(queries, keys, values)[0].reshape(queries.shape)
    return result


def _joined(parts: list[Block], arrays: list[mx.array]) -> mx.array:
    """Blocks (rows, kv heads, group, queries, n) put together again."""
    rows: dict[int, list[mx.array]] = {}
    for block, array in zip(parts, arrays, strict=True):
        rows.setdefault(block.rows.start, []).append(array)
    whole = [mx.concatenate(row, axis=3) if len(row) > 1 else row[0] for row in rows.values()]
    return mx.concatenate(whole, axis=0) if len(whole) > 1 else whole[0]


def _add(total: dict[int, mx.array], block: Block, more: mx.array, length: int) -> mx.array:
    """Add the gradient for the keys that a block sees to that of all `length` of its rows."""
    row, keys = block.rows.start, block.keys
    if row in total:
        before, seen, rest = mx.split(total[row], [keys.start, keys.stop], axis=2)
        parts = [part for part in (before, seen + more, rest) if part.shape[2]]
        more = mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]
    elif keys.start or keys.stop < length:
        more = mx.pad(more, [(0, 0), (0, 0), (keys.start, length - keys.stop), (0, 0)])
    total[row] = more
    return more
