"""Our attention against MLX's own: values, gradients, and what is kept."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlxtune.data.pack import pack
from mlxtune.device import as_on_gpu
from mlxtune.models import attention as module
from mlxtune.models import enable
from mlxtune.models.attention import attention, blocks
from mlxtune.models.enable import enable_packs, enable_packs_by, pack_kind
from mlxtune.models.packed import OwnAttention, PackCache, PackedRope
from mlxtune.models.skeleton import built, tiny_twin
from mlxtune.train.step import LossFunction, batch_arrays
from support.compare import distance, random_samples
from support.models import GEMMA4, tiny, with_adapters

SHAPES = [(1, 40, 0), (3, 17, 9), (2, 64, 30), (5, 8, 0), (5, 8, 20), (6, 8, 32)]
WINDOWS = [None, 3, 20]
DIM = 16


def cache_of(rows: int, width: int, prefix: int) -> PackCache:
    """A prefix at the front, two samples in each row, and padding at the end of the last."""
    half = width // 2
    position = np.concatenate([np.arange(half), np.arange(width - half)]) + prefix
    segment = np.concatenate([np.full(half, 1), np.full(width - half, 2)])
    positions, segments = np.tile(position, (rows, 1)), np.tile(segment, (rows, 1))
    positions.flat[:prefix], segments.flat[:prefix] = np.arange(prefix), 0
    segments[-1, -2:] = -1
    return PackCache(mx.array(positions), mx.array(segments), prefix)


def arrays(rows: int, width: int, prefix: int, heads: int, kv_heads: int) -> list[mx.array]:
    shapes = [(rows, heads, width, DIM)] + 2 * [(rows, kv_heads, prefix + width, DIM)]
    return [mx.random.normal(s, key=mx.random.key(i)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("scores", [1 << 10, 1 << 14, 1 << 30])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_values_and_gradients_are_those_of_mlx(monkeypatch, window, shape, heads, kv_heads, scores):
    monkeypatch.setattr(module, "_CPU_SCORES", scores)
    monkeypatch.setattr(module, "_LEAST_QUERIES", 4)
    bias, mask = partial(cache_of(*shape)._bias, window), cache_of(*shape).mask(window)
    given = arrays(*shape, heads, kv_heads)
    weights = mx.random.normal(given[0].shape, key=mx.random.key(9))

    def ours(q, k, v):
        return attention(q, k, v, scale=0.3, prefix=shape[2], bias=bias, window=window)

    def theirs(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)

    results = []
    for function in (ours, theirs):
        gradient = mx.grad(lambda *a, f=function: (f(*a) * weights).sum(), argnums=(0, 1, 2))
        results.append([function(*given), *gradient(*given)])
    for got, want in zip(*results, strict=True):
        assert distance(got, want) < 2e-6


@pytest.mark.parametrize("scores", [1 << 10, 1 << 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_capped_scores_have_the_values_and_gradients_of_the_formula(monkeypatch, shape, scores):
    monkeypatch.setattr(module, "_CPU_SCORES", scores)
    pack, cap = cache_of(*shape), 0.7
    given = arrays(*shape, 6, 2)
    weights = mx.random.normal(given[0].shape, key=mx.random.key(9))

    def ours(q, k, v):
        bias = partial(pack._bias, None)
        return attention(q, k, v, scale=0.3, prefix=shape[2], bias=bias, cap=cap)

    def formula(q, k, v):
        k, v = mx.repeat(k, 3, axis=1), mx.repeat(v, 3, axis=1)
        s = cap * mx.tanh(0.3 * (q @ k.swapaxes(-1, -2)) / cap)
        return mx.softmax(mx.where(pack.mask(), s, -1e30), axis=-1) @ v

    results = []
    for function in (ours, formula):
        gradient = mx.grad(lambda *a, f=function: (f(*a) * weights).sum(), argnums=(0, 1, 2))
        results.append([function(*given), *gradient(*given)])
    for got, want in zip(*results, strict=True):
        assert distance(got, want) < 2e-6


@pytest.mark.parametrize("rows", [1, 8])
def test_on_a_gpu_too_little_is_computed_above_the_diagonal(rows):
    width = 2048
    with as_on_gpu():
        parts = list(blocks(rows, width, 0, 8))
    pairs = [(b.rows.stop - b.rows.start) * (b.queries.stop - b.queries.start) for b in parts]
    pairs = [queries * block.seen for queries, block in zip(pairs, parts, strict=True)]
    assert sum(pairs) < 1.3 * rows * width * width / 2
    assert max(pairs) * 8 <= module._GPU_SCORES


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bits_stay_sixteen_bits(dtype):
    bias = partial(cache_of(2, 64, 30)._bias, None)
    given = [x.astype(dtype) for x in arrays(2, 64, 30, 6, 2)]

    def loss(*a):
        return attention(*a, scale=0.3, prefix=30, bias=bias).astype(mx.float32).sum()

    got = attention(*given, scale=0.3, prefix=30, bias=bias)
    full = attention(*[x.astype(mx.float32) for x in given], scale=0.3, prefix=30, bias=bias)
    assert got.dtype == dtype
    assert distance(got, full) < 1e-2
    assert all(g.dtype == dtype for g in mx.grad(loss, argnums=(0, 1, 2))(*given))


def test_blocks_cover_each_query_once_and_leave_out_what_none_of_them_sees():
    parts = list(blocks(3, 1000, 50, 8))
    assert len(parts) > 3
    seen = np.zeros((3, 1000), int)
    for part in parts:
        seen[part.rows, part.queries] += 1
        assert part.keys == slice(0, 50 + part.queries.stop)
    assert (seen == 1).all()
    # Rows full of a prefix see what of it is before them.
    for part in blocks(10, 1000, 3100, 8, window=None):
        row, end = part.rows.start, part.queries.stop
        assert part.keys == slice(0, 1000 * row + end if row < 3 else 3100 + end)
    for part in blocks(10, 1000, 3100, 8, window=100):
        row, start = part.rows.start, part.queries.start
        assert part.keys.start == (max(0, 1000 * row + start - 99) if row < 3 else 0)
    for part in blocks(2, 4000, 0, 8, window=100):
        assert part.keys == slice(max(0, part.queries.start - 99), part.queries.stop)
        assert part.seen < 200


def test_scores_are_not_kept():
    """Twice the length takes twice the memory, where all scores would take four times."""

    def peak(width: int, ours: bool) -> int:
        cache = PackCache(mx.arange(width)[None], mx.ones((1, width), mx.int32), 0)
        given, mask, bias = arrays(1, width, 0, 8, 8), cache.mask(), partial(cache._bias, None)
        mx.eval(given, mask)

        def loss(q, k, v):
            if ours:
                return attention(q, k, v, scale=0.3, prefix=0, bias=bias).sum()
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask).sum()

        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss, argnums=(0, 1, 2))(*given))
        return mx.get_peak_memory() - before

    assert peak(2048, True) < 0.25 * peak(2048, False)
    # The mask, a float for each pair, is shared by all layers; all else is linear.
    masks = 4 * (2048**2 - 1024**2) // 2
    assert peak(2048, True) - masks < 2.6 * peak(1024, True)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("llama", True),
        ("qwen3", True),
        ("gemma3_text", True),  # some blocks look through a window
        ("olmo3", True),
        ("gpt_oss", False),  # something else takes part in the softmax
        ("gemma2", True),  # scores are capped before the softmax
        ("cohere2", True),  # a block has no positions
        ("qwen3_moe", True),
    ],
)
def test_models_take_it_where_it_computes_the_same(kind, own):
    sizes = {
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }

    def model_of():
        model = tiny(kind, **sizes)
        enable_packs(model)
        return with_adapters(model)

    model = model_of()
    assert (pack_kind(model) is OwnAttention) == own
    batch = pack(random_samples([40, 33, 58, 21], prefix=12, untrained=12))
    other = model_of()
    for rope in other.modules():
        if isinstance(rope, PackedRope):
            rope.own = False
    losses = [LossFunction(m)(batch_arrays(batch), batch.prefix, True)[0] for m in (model, other)]
    assert distance(*losses) < 1e-6


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("gemma2", {}), ("cohere2", {})])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_deep_models_of_sixteen_bits_take_it_too(kind, more, dtype):
    """After so many blocks two orders of rounding are as far apart as two masks."""
    model = tiny(kind, num_hidden_layers=30, **more)
    model.set_dtype(dtype)
    enable_packs_by(model, config_of(model))
    assert pack_kind(model) is OwnAttention


def test_models_that_also_see_are_proven_by_their_language_model():
    text = config_of(tiny("gemma3_text", sliding_window=16, sliding_window_pattern=2))
    config = {"model_type": "gemma3", "text_config": text, "vocab_size": 128}
    model = built(config)
    model.set_dtype(mx.bfloat16)
    enable_packs_by(model, config)
    assert pack_kind(model) is OwnAttention


def test_small_models_show_every_kind_of_block():
    kinds = (["sliding_attention"] * 4 + ["full_attention"]) * 2
    config = config_of(tiny("gemma4_text", **GEMMA4))
    config |= {"num_hidden_layers": 10, "num_kv_shared_layers": 4, "layer_types": kinds}
    twin = tiny_twin(config)
    assert twin.args.layer_types == kinds
    assert twin.args.num_kv_shared_layers == 5


def config_of(model):
    return {name: value for name, value in vars(model.args).items() if value is not None}


def test_a_cap_on_scores_that_is_not_kept_is_seen(monkeypatch):
    """A cap of 50 changes the small scores of a probe by nothing that could be told."""
    model = tiny("gemma2")
    enable_packs(model)
    assert pack_kind(model) is OwnAttention
    attend = OwnAttention.attend
    monkeypatch.setattr(OwnAttention, "attend", lambda *a, cap, **k: attend(*a, **k))
    assert not enable._takes_own_attention(model)


def test_each_block_has_its_window_and_a_wrong_one_is_seen_in_a_few_tokens():
    model = tiny("gemma3_text", sliding_window=100, sliding_window_pattern=2)
    enable_packs(model)
    ropes = [m for m in model.modules() if isinstance(m, PackedRope)]
    assert sorted((rope.window for rope in ropes), key=str) == [100, None]
    assert enable._takes_own_attention(model)
    for rope in ropes:
        rope.window = None
    assert not enable._takes_own_attention(model)
