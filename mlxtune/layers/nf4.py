"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

Blocks of 64 weights share the largest absolute value among them; each weight is the
nearest of 16 levels, quantiles of a normal distribution, times it. With double
quantization these largest values lose their mean and are packed once more, to 8 bits in
blocks of 256: 4 + 8/64 + 32/(64 * 256) = 4.127 bits to a weight instead of 4.5.

Codes, blocks and rounding are those of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar

import mlx.core as mx

from mlxtune.layers.packing import Arrays, Packing, Rows, by_codebook

# The paper's appendix E: quantiles of N(0, 1) at even steps of probability, seven from
# (1/32 + 1/30) / 2 and eight from its complement to a half, which is zero, so that zero
# is exact; scaled to [-1, 1].
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
SCALES_TO_BLOCK = 256


@cache
def dynamic_levels() -> tuple[float, ...]:
    """The 256 levels of signed dynamic 8-bit numbers (Dettmers 2022, arXiv:2110.02861).

    Seven powers of ten down from 1, the lower half as many steps as the one above it; the
    levels of each are the middles of even steps from a tenth of it to itself. Then 0 and 1.
    """
    positive = []
    for exponent in range(7):
        steps = 2**exponent
        middles = [0.1 + 0.9 * (step + 0.5) / steps for step in range(steps)]
        positive += [10.0 ** (exponent - 6) * middle for middle in middles]
    return tuple(sorted([-level for level in positive] + [0.0] + positive + [1.0]))


@dataclass(frozen=True)
class NormalFloat4(Packing):
    """NF4 in blocks of 64.

    Arrays: `weight` uint32 (…, out, in / 8), two codes to a byte, the first in its high
    half. `scales` (…, out, in / 64): float32, or with double quantization uint8 and, over
    all of them in a row, `block_scales` float32 (ceil(scales / 256),) and `mean` float32 ().

    Args:
        double_quantization: pack the scales too.
    """

    mode: str = "nf4"
    bits: int = 4
    group_size: int = BLOCK
    double_quantization: bool = True

    has_product: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("weight", "scales", "block_scales", "mean")

    def pack(self, weight: mx.array) -> Arrays:
        groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, BLOCK)
        largest = mx.abs(groups).max(axis=-1)
        codes = _nearest(groups / _above_zero(largest)[..., None], LEVELS)
        codes = codes.reshape(*weight.shape[:-1], -1, 2)
        packed = ((codes[..., 0] << 4) | codes[..., 1]).view(mx.uint32)
        if not self.double_quantization:
            return {"weight": packed, "scales": largest}
        return {"weight": packed} | _pack_scales(largest)

    def expand(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        weight = by_codebook(arrays["weight"], _scales(arrays), LEVELS, high_first=True)
        return weight.astype(dtype)

    def rows(self, arrays: Arrays, rows: Rows) -> Arrays:
        # Blocks of scales run over the ends of rows, so the scales are expanded first.
        return {"weight": arrays["weight"][rows], "scales": _scales(arrays)[rows]}

    def product(self, x: mx.array, arrays: Arrays, *, transpose: bool) -> mx.array:
        raise NotImplementedError("MLX does not multiply by NF4")

    def gathered_product(
        self, x: mx.array, arrays: Arrays, indices: mx.array, *, transpose: bool, ordered: bool
    ) -> mx.array:
        raise NotImplementedError("MLX does not multiply by NF4")


def _pack_scales(scales: mx.array) -> Arrays:
    mean = scales.mean()
    blocks = _in_blocks(scales - mean)
    largest = mx.abs(blocks).max(axis=-1)
    relative = blocks / _above_zero(largest)[:, None]
    levels = dynamic_levels()
    middles = mx.array([(a + b) / 2 for a, b in pairwise(levels)])
    codes = (relative[..., None] > middles).sum(axis=-1).astype(mx.uint8)
    codes = codes.reshape(-1)[: scales.size].reshape(scales.shape)
    return {"scales": codes, "block_scales": largest, "mean": mean}


def _scales(arrays: Arrays) -> mx.array:
    """Each block's largest absolute value: float32 (…, out, in / 64)."""
    scales = arrays["scales"]
    if scales.dtype != mx.uint8:
        return scales
    levels = mx.array(dynamic_levels())[scales.reshape(-1)]
    full = _in_blocks(levels) * arrays["block_scales"][:, None]
    full = full.reshape(-1)[: scales.size] + arrays["mean"]
    return full.reshape(scales.shape)


def _in_blocks(values: mx.array) -> mx.array:
    """All values in rows of 256, the last filled up with zeros."""
    missing = -values.size % SCALES_TO_BLOCK
    return mx.pad(values.reshape(-1), (0, missing)).reshape(-1, SCALES_TO_BLOCK)


def _nearest(values: mx.array, levels: tuple[float, ...]) -> mx.array:
    """Index of the nearest level: uint8 in the shape of `values`."""
    codes = mx.zeros(values.shape, mx.uint8)
    for below, above in pairwise(levels):
        codes = codes + (values > (below + above) / 2)
    return codes


def _above_zero(values: mx.array) -> mx.array:
    """What can be divided by: a block of zeros stays one."""
    return mx.where(values > 0, values, 1.0)
