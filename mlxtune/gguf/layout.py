"""How the blocks of GGUF's types lie in memory.

The block structures of ggml-common.h (https://github.com/ggml-org/llama.cpp, MIT).
`codes` are uint8 (blocks, weights) in the order of the weights; scales and minimums of
groups are uint8 (blocks, groups); d, m float16 (blocks,). All results are uint8
(blocks, bytes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Halfs = npt.NDArray[np.float16]


def _bytes(halfs: Halfs) -> Bytes:
    return np.ascontiguousarray(halfs).view(np.uint8).reshape(len(halfs), 2)


def _join(*parts: npt.NDArray[Any]) -> Bytes:
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _gather(parts: npt.NDArray[Any], bits: int) -> Bytes:
    """(blocks, parts, n) to (blocks, n): each part moved up by `bits` more than the last."""
    result: Bytes = parts[:, 0].copy()
    for number in range(1, parts.shape[1]):
        result |= parts[:, number] << np.uint8(bits * number)
    return result


def _nibbles(codes: Bytes, half: int) -> Bytes:
    """Two codes a byte: of each 2 · half, the first ones low and the second ones high."""
    return _gather((codes & 15).reshape(-1, 2, half), 4).reshape(len(codes), -1)


def _high_bits(codes: Bytes) -> Bytes:
    """The fifth bits of 32 codes as 4 bytes."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _six_bits(scales: Bytes, minimums: Bytes) -> Bytes:
    """Eight scales and eight minimums of 6 bits in 12 bytes."""
    high = (scales[:, 4:] & 15) | (minimums[:, 4:] << 4)
    return _join(
        scales[:, :4] | (scales[:, 4:] >> 4 << 6),
        minimums[:, :4] | (minimums[:, 4:] >> 4 << 6),
        high,
    )


def pack_q8_0(d: Halfs, codes: npt.NDArray[np.int8]) -> Bytes:
    """A scale and 32 codes of 8 bits."""
    return _join(_bytes(d), codes.view(np.uint8))


def pack_q4_0(d: Halfs, codes: Bytes) -> Bytes:
    """A scale and 32 codes of 4 bits."""
    return _join(_bytes(d), _nibbles(codes, 16))


def pack_q4_1(d: Halfs, m: Halfs, codes: Bytes) -> Bytes:
    """A scale, a minimum and 32 codes of 4 bits."""
    return _join(_bytes(d), _bytes(m), _nibbles(codes, 16))


def pack_q5_0(d: Halfs, codes: Bytes) -> Bytes:
    """A scale and 32 codes of 5 bits."""
    return _join(_bytes(d), _high_bits(codes), _nibbles(codes, 16))


def pack_q5_1(d: Halfs, m: Halfs, codes: Bytes) -> Bytes:
    """A scale, a minimum and 32 codes of 5 bits."""
    return _join(_bytes(d), _bytes(m), _high_bits(codes), _nibbles(codes, 16))


def pack_q2_k(d: Halfs, m: Halfs, scales: Bytes, minimums: Bytes, codes: Bytes) -> Bytes:
    """16 groups of 16 codes of 2 bits; scales and minimums of 4 bits."""
    low = _gather(codes.reshape(-1, 4, 32), 2).reshape(len(codes), -1)
    return _join(scales | (minimums << 4), low, _bytes(d), _bytes(m))


def pack_q3_k(d: Halfs, scales: Bytes, codes: Bytes) -> Bytes:
    """16 groups of 16 codes of 3 bits; scales of 6 bits. Both are moved up to begin at 0."""
    high = _gather((codes >> 2).reshape(-1, 8, 32), 1)
    low = _gather((codes & 3).reshape(-1, 4, 32), 2).reshape(len(codes), -1)
    packed = _join(
        _gather((scales & 15).reshape(-1, 2, 8), 4), _gather((scales >> 4).reshape(-1, 4, 4), 2)
    )
    return _join(high, low, packed, _bytes(d))


def pack_q4_k(d: Halfs, m: Halfs, scales: Bytes, minimums: Bytes, codes: Bytes) -> Bytes:
    """8 groups of 32 codes of 4 bits; scales and minimums of 6 bits."""
    return _join(_bytes(d), _bytes(m), _six_bits(scales, minimums), _nibbles(codes, 32))


def pack_q5_k(d: Halfs, m: Halfs, scales: Bytes, minimums: Bytes, codes: Bytes) -> Bytes:
    """8 groups of 32 codes of 5 bits; scales and minimums of 6 bits."""
    high = _gather((codes >> 4).reshape(-1, 8, 32), 1)
    return _join(_bytes(d), _bytes(m), _six_bits(scales, minimums), high, _nibbles(codes, 32))


def pack_q6_k(d: Halfs, scales: npt.NDArray[np.int8], codes: Bytes) -> Bytes:
    """16 groups of 16 codes of 6 bits, moved up to begin at 0; scales of 8 bits."""
    low = _nibbles(codes, 64)
    high = _gather((codes >> 4).reshape(-1, 4, 32), 2).reshape(len(codes), -1)
    return _join(low, high, scales.view(np.uint8), _bytes(d))
