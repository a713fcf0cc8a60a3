"""Attention of some architectures, called in the form that packs need.

mlx-lm's attention is left as it is wherever it takes keys and values from its cache and gives
them to the fused attention. What does otherwise gets a call of its own here: instances change
their class to one derived from mlx-lm's, which does as before unless it is given a pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune.models.packed import PackCache


def _heads(x: mx.array, count: int) -> mx.array:
    """(1, tokens, heads * dim) to (1, heads, tokens, dim)."""
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def _gemma2(self: Any, pack: PackCache, x: mx.array, mask: Any = None) -> mx.array:
    """Gemma 2 caps its scores, and mlx-lm groups its heads by the batch axis of the input."""
    queries, keys = _heads(self.q_proj(x), self.n_heads), _heads(self.k_proj(x), self.n_kv_heads)
    mixed = pack.attend(
        self.rope.place(queries, pack),
        *pack.fetch(self.rope.place(keys, pack), _heads(self.v_proj(x), self.n_kv_heads)),
        scale=self.scale,
        mask=mask,
        window=self.rope.window,
        cap=self.attn_logit_softcapping,
    )
    result: mx.array = self.o_proj(mixed)
    return result


def _cohere2(self: Any, pack: PackCache, x: mx.array, mask: Any = None) -> mx.array:
    """Every fourth block of Cohere 2 has no positions, and float16 is too small for scores."""
    queries, keys = _heads(self.q_proj(x), self.n_heads), _heads(self.k_proj(x), self.n_kv_heads)
    if self.use_sliding_window:
        queries, keys = self.rope.place(queries, pack), self.rope.place(keys, pack)
    else:
        queries, keys = pack.rows(queries), pack.rows(keys)
    keys, values = pack.fetch(keys, _heads(self.v_proj(x), self.n_kv_heads))
    if x.dtype == mx.float16:
        queries, keys, values = (a.astype(mx.float32) for a in (queries, keys, values))
    mixed = pack.attend(queries, keys, values, scale=self.scale, mask=mask, window=self.rope.window)
    result: mx.array = self.o_proj(mixed.astype(x.dtype))
    return result


def _gemma4(
    self: Any,
    pack: PackCache,
    x: mx.array,
    mask: Any = None,
    shared_kv: tuple[mx.array, mx.array] | None = None,
    offset: Any = None,
) -> tuple[mx.array, tuple[mx.array, mx.array], Any]:
    """Later blocks of Gemma 4 take keys and values of earlier ones, placed and fetched."""
    queries = self.q_norm(self.q_proj(x).reshape(*x.shape[:2], self.n_heads, -1))
    if shared_kv is None:
        keys = values = self.k_proj(x).reshape(*x.shape[:2], self.n_kv_heads, -1)
        if not self.use_k_eq_v:
            values = self.v_proj(x).reshape(keys.shape)
        keys = self.rope.place(self.k_norm(keys).transpose(0, 2, 1, 3), pack)
        shared_kv = pack.fetch(keys, self.v_norm(values).transpose(0, 2, 1, 3))
    mixed = pack.attend(
        self.rope.place(queries.transpose(0, 2, 1, 3), pack),
        *shared_kv,
        scale=self.scale,
        mask=mask,
        window=self.rope.window,
    )
    # The pack of each block says where its tokens are: there is no offset to hand on.
    return self.o_proj(mixed), shared_kv, offset


_CALLS: dict[str, Callable[..., Any]] = {
    "mlx_lm.models.gemma2": _gemma2,
    "mlx_lm.models.gemma4_text": _gemma4,
    "mlx_lm.models.cohere2": _cohere2,
}


def take_packs(attention: nn.Module) -> None:
    """Give an attention the call that packs need; most have it already."""
    original = type(attention)
    ours = _CALLS.get(original.__module__)
    if ours is None:
        return

    def call(
        self: Any, x: mx.array, mask: Any = None, cache: Any = None, *args: Any, **named: Any
    ) -> Any:
        if isinstance(cache, PackCache):
            return ours(self, cache, x, mask, *args, **named)
        return original.__call__(self, x, mask, cache, *args, **named)

    attention.__class__ = type(original.__name__, (original,), {"__call__": call})


def leave_packs(attention: nn.Module) -> None:
    """Undo `take_packs`."""
    if (base := type(attention).__base__) and base.__module__ in _CALLS:
        attention.__class__ = base
