"""Each of our own computations by itself, against a plain formula in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.arrays import scalar
from mlxtune.device import on_cpu
from mlxtune.gguf.arithmetic import MLX
from mlxtune.gguf.quantize import gives_the_same
from mlxtune.layers.packing import Packing
from mlxtune.layers.quantized import QuantizedLinear, packing_named
from mlxtune.losses.cross_entropy import chunked_cross_entropy, weighted_cross_entropy
from mlxtune.models.attention import Block, attention
from mlxtune.models.packed import PackCache
from mlxtune.selfcheck.check import Difference, Found, distance

# Products of float32 are taken in TF32, of ten bits, on some GPUs (an M5 with macOS 26.2).
ALLOWED = {mx.float32: 5e-3, mx.bfloat16: 5e-2}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}

Arrays = Sequence[mx.array]
Function = Callable[..., mx.array]


def results(function: Function, given: Arrays, weights: mx.array) -> list[mx.array]:
    """A function's value, and the gradient of its weighted sum for each of its arguments."""

    def total(*arrays: mx.array) -> mx.array:
        return (function(*arrays).astype(mx.float32) * weights).sum()

    each = list(range(len(given)))
    outputs = [function(*given), *mx.grad(total, argnums=each)(*given)]
    mx.eval(outputs)
    return outputs


def compared(
    name: str, dtype: mx.Dtype, function: Function, formula: Function, given: Arrays, of: str
) -> list[Difference]:
    """A function of this type on the device, and a formula in float32 on the CPU.

    Args:
        name: what is compared.
        dtype: of the arguments on the device.
        function, formula: of the arguments.
        given: float32, made on the CPU.
        of: a letter for each argument, to name its gradient.
    """
    rounded = [array.astype(dtype) for array in given]
    with mx.stream(mx.cpu):
        exact = [array.astype(mx.float32) for array in rounded]
        shape = formula(*exact).shape
        weights = _normal(shape, 99)
        wanted = results(formula, exact, weights)
    got = results(function, rounded, weights)
    parts = ["value", *(f"gradient of {letter}" for letter in of)]
    return [
        Difference(f"{name}: {part}", distance(ours, theirs), ALLOWED[dtype])
        for part, ours, theirs in zip(parts, got, wanted, strict=True)
    ]


def _normal(shape: Sequence[int], seed: int, scale: float = 1.0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(np.float32(scale) * values)


# --------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Shape:
    rows: int
    heads: int
    kv_heads: int
    width: int
    prefix: int
    dim: int

    @property
    def text(self) -> str:
        """For people."""
        text = f"{self.rows} x {self.width} tokens, heads of {self.dim}"
        return text + (f", prefix of {self.prefix}" if self.prefix else "")

    def arrays(self) -> list[mx.array]:
        """Queries, keys and values."""
        keys = (self.rows, self.kv_heads, self.prefix + self.width, self.dim)
        queries = (self.rows, self.heads, self.width, self.dim)
        return [_normal(shape, seed) for seed, shape in enumerate((queries, keys, keys))]

    def pack(self) -> PackCache:
        """Two samples in each row, behind the prefix, and two tokens of padding at the end."""
        half = self.width // 2
        places = [*range(half), *range(self.width - half)]
        position = np.tile(np.array(places, np.int32) + self.prefix, (self.rows, 1))
        segment = np.tile(np.array([1] * half + [2] * (self.width - half)), (self.rows, 1))
        position.flat[: self.prefix], segment.flat[: self.prefix] = np.arange(self.prefix), 0
        segment[-1, -2:] = -1
        return PackCache(mx.array(position), mx.array(segment.astype(np.int32)), self.prefix)


def _shapes() -> tuple[_Shape, ...]:
    if on_cpu():
        return _Shape(2, 4, 2, 96, 0, 64), _Shape(2, 4, 2, 96, 40, 64)
    return (
        _Shape(4, 8, 2, 256, 0, 64),
        _Shape(4, 8, 2, 256, 40, 64),
        _Shape(1, 8, 8, 1000, 0, 128),
    )


def own_attention() -> Found:
    """Our attention over packs, and MLX's with the same masks and with a causal one."""
    differences: list[Difference] = []
    for shape in _shapes():
        for name, dtype in DTYPES.items():
            given, scale, pack = shape.arrays(), shape.dim**-0.5, shape.pack()
            differences += _of_packs(f"{name}, {shape.text}", dtype, given, scale, pack)
    return Found(tuple(differences))


def _of_packs(
    name: str, dtype: mx.Dtype, given: Arrays, scale: float, pack: PackCache
) -> list[Difference]:
    mask = pack.mask()
    mx.eval(mask)

    def bias(block: Block) -> mx.array:
        return mx.where(pack.mask(None, block), 0.0, -1e30)[:, :, None]

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, scale=scale, prefix=pack.prefix, bias=bias)

    def theirs(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def causal(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    def formula(seen: mx.array) -> Function:
        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            shared = q.shape[1] // k.shape[1]
            k, v = mx.repeat(k, shared, axis=1), mx.repeat(v, shared, axis=1)
            scores = mx.where(seen, scale * (q @ k.swapaxes(-1, -2)), -1e30)
            return mx.softmax(scores, axis=-1) @ v

        return attend

    width, length = mask.shape[-2:]
    before = mx.arange(length) <= mx.arange(width)[:, None] + (length - width)
    mx.eval(before)
    return [
        *compared(f"own attention, {name}", dtype, ours, formula(mask), given, "qkv"),
        *compared(f"MLX's with a mask, {name}", dtype, theirs, formula(mask), given, "qkv"),
        *compared(f"MLX's causal, {name}", dtype, causal, formula(before), given, "qkv"),
    ]


# ------------------------------------------------------------------- quantized products

_PACKINGS: tuple[int | str, ...] = (2, 3, 4, 5, 6, 8, "mxfp4", "mxfp8", "nvfp4", "nf4")
# One token of an answer, and a pass of training: GPUs have a kernel for each.
_ROWS = (1, 64)
_OUTPUTS, _INPUTS = 192, 256
# MLX's packed products on a CPU add up in the type of their result.
_SUMMED_IN_SIXTEEN_BITS = 0.2


def quantized_products() -> Found:
    """Products with packed and with expanded weights, and the gradients of their inputs."""
    differences: list[Difference] = []
    errors: list[str] = []
    for kind in _PACKINGS:
        packing = packing_named(kind)
        for name, dtype in DTYPES.items():
            label = f"{kind} bits" if isinstance(kind, int) else kind
            try:
                differences += _of_packing(f"{label}, {name}", packing, dtype)
            except (RuntimeError, ValueError) as error:
                errors.append(f"{label}, {name}: {error}")
    return Found(tuple(differences), errors=tuple(errors))


def _of_packing(name: str, packing: Packing, dtype: mx.Dtype) -> list[Difference]:
    """The largest difference of both directions and numbers of rows, of either way."""
    plain = nn.Linear(_INPUTS, _OUTPUTS, bias=False)
    plain.weight = _normal((_OUTPUTS, _INPUTS), 7, _INPUTS**-0.5).astype(dtype)
    layer = QuantizedLinear.from_weight(plain, packing)
    mx.eval(layer.arrays)
    with mx.stream(mx.cpu):
        full = packing.expand(layer.arrays, dtype).astype(mx.float32)
        mx.eval(full)
    worst = dict.fromkeys(("expanded", "packed") if packing.has_product else ("expanded",), 0.0)
    for rows in _ROWS:
        for forward in (True, False):
            x = _normal((rows, _INPUTS if forward else _OUTPUTS), rows).astype(dtype)
            with mx.stream(mx.cpu):
                wanted = x.astype(mx.float32) @ (full.T if forward else full)
                mx.eval(wanted)
            for way in worst:
                got = layer.product(x, forward=forward, expand=way == "expanded")
                worst[way] = float(np.maximum(worst[way], distance(got, wanted)))  # keeps a NaN
    allowed = dict.fromkeys(worst, ALLOWED[dtype])
    if on_cpu() and dtype == mx.bfloat16:
        allowed["packed"] = _SUMMED_IN_SIXTEEN_BITS
    return [Difference(f"{name}, {way}", worst[way], allowed[way]) for way in worst]


# ------------------------------------------------------------------------------ the rest


def k_quants() -> Found:
    """Whether K-quants come out of MLX with NumPy's bytes; if not, exports use NumPy."""
    same = gives_the_same(MLX)
    errors = () if same else ("other bytes than NumPy's: exports quantize on the CPU, slower",)
    return Found(figures={"same_bytes": same}, errors=errors)


def chunked_loss() -> Found:
    """The loss that keeps no logits, and the gradients of what goes into it."""
    tokens, width, vocabulary = (96, 64, 1000) if on_cpu() else (512, 256, 8192)
    given = [_normal((tokens, width), 1), _normal((vocabulary, width), 2, width**-0.5)]
    targets = mx.array(np.random.default_rng(3).integers(0, vocabulary, tokens))
    weights = mx.abs(_normal((tokens,), 4))
    mx.eval(targets, weights)

    def ours(hidden: mx.array, table: mx.array) -> mx.array:
        return chunked_cross_entropy(
            lambda rows, weight: rows @ weight.T,
            hidden,
            targets,
            weights,
            rows=tokens // 3,
            trained=[table],
        )

    def formula(hidden: mx.array, table: mx.array) -> mx.array:
        return weighted_cross_entropy(hidden @ table.T, targets, weights)

    differences: list[Difference] = []
    for name, dtype in DTYPES.items():
        differences += compared(f"loss, {name}", dtype, ours, formula, given, "xw")
    return Found(tuple(differences), {"loss": scalar(ours(*given))})
