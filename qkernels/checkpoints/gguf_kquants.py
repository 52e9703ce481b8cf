"""Decoders of GGUF's blocks of 256: the K-quants and IQ4_XS.

Scales have two levels there: a small integer per group of 16 or 32 columns, times a float16 of the
block. Layouts: ggml/src/ggml-common.h of llama.cpp; for runs of bits see `gguf_fields.spread`.
"""

from __future__ import annotations

import numpy as np

from .gguf_fields import Plain, add_bits, copied, spread, take_half


def decode_q2_k(raw: np.ndarray, out: Plain) -> None:
    """16 bytes of scale (low nibble) and minimum; 64 bytes of codes; d, dmin float16;
    w = d * scale * q - dmin * minimum."""
    out.scale.view("V16")[..., 0] = copied(raw, 0, "V16")
    spread(raw, 16, 32, 2, out.codes)
    take_half(raw, 80, out.block_scale)
    take_half(raw, 82, out.block_zero)


def decode_q3_k(raw: np.ndarray, out: Plain) -> None:
    """32 bytes of the codes' high bits, 64 of their low ones; 12 bytes of 6-bit scales; d float16;
    w = d * (scale - 32) * (q - 4). (ggml subtracts 4 where the high bit is missing: the same.)"""
    spread(raw, 32, 32, 2, out.codes)
    add_bits(spread(raw, 0, 32, 1, np.empty_like(out.codes)), 2, out.codes)
    # Bytes 0 to 7 hold the low nibbles of scales 0 to 7 and, above them, of scales 8 to 15; bytes 8
    # to 11 the high bits of scales i, 4 + i, 8 + i and 12 + i, from the lowest bits on.
    low, high = copied(raw, 96, "<u4", 2), copied(raw, 104, "<u4")
    words = out.scale.view("<u4")
    for i in range(4):
        nibbles = (low[..., i % 2] >> np.uint32(4 * (i // 2))) & np.uint32(0x0F0F0F0F)
        words[..., i] = nibbles | ((high >> np.uint32(2 * i)) & np.uint32(0x03030303)) << 4
    np.subtract(out.scale, np.int8(32), out=out.scale)
    take_half(raw, 108, out.block_scale)


def _scales_and_minima(raw: np.ndarray, out: Plain) -> None:
    """d, dmin float16, then 12 bytes with 8 scales and 8 minima of 6 bits, of Q4_K and Q5_K:
    scales 0 to 3 and minima 0 to 3 are the low six bits of the first two words, those two words'
    high bits belong to numbers 4 to 7, whose low nibbles are the third word's."""
    assert out.zero is not None
    take_half(raw, 0, out.block_scale)
    take_half(raw, 2, out.block_zero)
    packed = copied(raw, 4, "<u4", 3)
    third = packed[..., 2]
    for i, values in enumerate((out.scale, out.zero)):
        word, words = packed[..., i], values.view("<u4")
        words[..., 0] = word & np.uint32(0x3F3F3F3F)
        nibbles = (third >> np.uint32(4 * i)) & np.uint32(0x0F0F0F0F)
        words[..., 1] = nibbles | ((word >> np.uint32(2)) & np.uint32(0x30303030))


def decode_q4_k(raw: np.ndarray, out: Plain) -> None:
    """Scales and minima, then 128 bytes of codes; w = d * scale * q - dmin * minimum."""
    _scales_and_minima(raw, out)
    spread(raw, 16, 32, 4, out.codes)


def decode_q5_k(raw: np.ndarray, out: Plain) -> None:
    """Scales and minima, 32 bytes of the codes' high bits, 128 of their low ones; w as Q4_K's."""
    _scales_and_minima(raw, out)
    spread(raw, 48, 32, 4, out.codes)
    add_bits(spread(raw, 16, 32, 1, np.empty_like(out.codes)), 4, out.codes)


def decode_q6_k(raw: np.ndarray, out: Plain) -> None:
    """128 bytes of the codes' low nibbles, 64 of their high bits, 16 int8 scales, d float16;
    w = d * scale * (q - 32)."""
    spread(raw, 0, 64, 4, out.codes)
    add_bits(spread(raw, 128, 32, 2, np.empty_like(out.codes)), 4, out.codes)
    out.scale.view("V16")[..., 0] = copied(raw, 192, "V16")
    take_half(raw, 208, out.block_scale)


def decode_iq4_xs(raw: np.ndarray, out: Plain) -> None:
    """d float16; 16 bits with the high two, 4 bytes with the low four of 8 scales; 128 bytes of
    codes; w = d * (scale - 32) * table[q]."""
    take_half(raw, 0, out.block_scale)
    high, low = copied(raw, 2, "<u2"), copied(raw, 4, "u1", 4)
    scale = out.scale.view(np.uint8)
    scale[..., 0::2] = low & np.uint8(15)
    scale[..., 1::2] = low >> np.uint8(4)
    for i in range(8):
        scale[..., i] |= (((high >> np.uint16(2 * i)) & np.uint16(3)) << np.uint16(4)).astype("u1")
    np.subtract(out.scale, np.int8(32), out=out.scale)
    spread(raw, 8, 16, 4, out.codes)
