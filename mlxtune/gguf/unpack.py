"""GGUF blocks to MLX's affine packing, exactly.

A group of 32 weights `d * q` or `d * q + m` is one of MLX's affine form
`scale * code + bias` with the same code, so these types keep their bits: nothing is
rounded and nothing is expanded. Q4_K and Q5_K multiply two numbers for a group's scale;
float32 holds the product exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

Bytes = npt.NDArray[np.uint8]

GROUP_SIZE = 32


@dataclass(frozen=True)
class Affine:
    """A packed weight: `scales * codes + biases` for each group of 32.

    `codes` uint8 (rows, in); `scales`, `biases` float16 or float32 (rows, in / 32).
    """

    codes: Bytes
    scales: npt.NDArray[np.floating[Any]]
    biases: npt.NDArray[np.floating[Any]]
    bits: int

    def packed(self) -> npt.NDArray[np.uint32]:
        """Codes as MLX packs them: (rows, in * bits / 32), low bits first."""
        rows, width = self.codes.shape
        if self.bits == 8:
            return np.ascontiguousarray(self.codes).view(np.uint32)
        if self.bits == 4:
            pairs = self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)
            return np.ascontiguousarray(pairs).view(np.uint32)
        bits = np.unpackbits(self.codes[..., None], axis=-1, count=self.bits, bitorder="little")
        packed = np.packbits(bits.reshape(rows, width * self.bits), axis=-1, bitorder="little")
        return np.ascontiguousarray(packed).view(np.uint32)


def affine(type_: Type, data: Bytes) -> Affine | None:
    """Unpack the blocks of one tensor; None when this type has no exact affine form.

    Args:
        type_: the tensor's GGML type.
        data: (rows, bytes of a row).
    """
    if type_ not in _LAYOUTS:
        return None
    size, unpack = _LAYOUTS[type_]
    rows = data.shape[0]
    codes, scale, bias, bits = unpack(data.reshape(-1, size))
    return Affine(codes.reshape(rows, -1), scale.reshape(rows, -1), bias.reshape(rows, -1), bits)


def affine_form(type_: Type) -> tuple[int, Any] | None:
    """Bits of a code and NumPy type of the scales of a type's affine form; None if it has none."""
    if type_ not in _LAYOUTS:
        return None
    _codes, scales, _biases, bits = _LAYOUTS[type_][1](np.zeros((1, _LAYOUTS[type_][0]), np.uint8))
    return bits, scales.dtype


_Unpacked = tuple[Bytes, Any, Any, int]


def _half(blocks: Bytes, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(quants: Bytes) -> Bytes:
    """16 bytes to 32 codes: low nibbles are the first half of the block."""
    return np.concatenate([quants & 15, quants >> 4], axis=1)


def _fifth_bits(blocks: Bytes) -> Bytes:
    """Bit i of a little-endian word of 32 is the fifth bit of code i."""
    return np.unpackbits(blocks, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: Bytes) -> _Unpacked:
    d = _half(b, 0)
    return _nibbles(b[:, 2:18]), d, -8 * d, 4


def _q4_1(b: Bytes) -> _Unpacked:
    return _nibbles(b[:, 4:20]), _half(b, 0), _half(b, 2), 4


def _q5_0(b: Bytes) -> _Unpacked:
    d = _half(b, 0)
    return _nibbles(b[:, 6:22]) | _fifth_bits(b[:, 2:6]), d, -16 * d, 5


def _q5_1(b: Bytes) -> _Unpacked:
    return _nibbles(b[:, 8:24]) | _fifth_bits(b[:, 4:8]), _half(b, 0), _half(b, 2), 5


def _q8_0(b: Bytes) -> _Unpacked:
    d = _half(b, 0)
    # A signed byte plus 128 is the same byte with its top bit flipped.
    return b[:, 2:34] ^ np.uint8(128), d, -128 * d, 8


def _scales_and_minima(blocks: Bytes) -> tuple[Any, Any]:
    """Scales and offsets of the eight groups of a K block, float32 (blocks, 8) each.

    The block begins with d and dmin; 12 bytes hold eight times six bits twice.
    """
    d, dmin = (_half(blocks, at).astype(np.float32) for at in (0, 2))
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return d * scales, -dmin * minima


def _grouped_nibbles(quants: Bytes) -> Bytes:
    """128 bytes to 256 codes: of each 32 bytes the low nibbles are one group, the high the next."""
    chunks = quants.reshape(-1, 4, 1, 32)
    codes: Bytes = np.concatenate([chunks & 15, chunks >> 4], axis=2)
    return codes.reshape(-1, 256)


def _q4_k(b: Bytes) -> _Unpacked:
    return _grouped_nibbles(b[:, 16:144]), *_scales_and_minima(b), 4


def _q5_k(b: Bytes) -> _Unpacked:
    # Bit j of byte i is the fifth bit of code i of group j.
    high = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    codes = _grouped_nibbles(b[:, 48:176]) | high.reshape(-1, 256) << np.uint8(4)
    return codes, *_scales_and_minima(b), 5


_LAYOUTS: dict[Type, tuple[int, Callable[[Bytes], _Unpacked]]] = {
    Type.Q4_0: (18, _q4_0),
    Type.Q4_1: (20, _q4_1),
    Type.Q5_0: (22, _q5_0),
    Type.Q5_1: (24, _q5_1),
    Type.Q8_0: (34, _q8_0),
    Type.Q4_K: (144, _q4_k),
    Type.Q5_K: (176, _q5_k),
}
