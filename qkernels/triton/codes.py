"""The packed layout (csrc/layout.h) as tiles of codes.

Of a unit of 64 rows x 16 columns, a tile has the 32 rows 32 q + 16 h + p of one h (r = 16 q + p)
and the four t of columns 4 t + j. The four j are the bytes of one 32-bit word, which is what a
kernel loads; where both h share a byte, one load serves both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_row(r, h):
    """The row within 64 of row r < 32 of half h."""
    return r // 16 * 32 + 16 * h + r % 16


@triton.jit
def word_of(r, t, h, WIDTH: tl.constexpr):
    """Index of the word within a plane of WIDTH bits that has columns 4 t to 4 t + 3 of row r of
    half h, which matters for 8 bits alone: else one word has both."""
    q, p = r // 16, r % 16
    if WIDTH == 8:
        return 128 * h + q * 64 + t * 16 + p
    elif WIDTH == 4:
        return q * 64 + t * 16 + p
    elif WIDTH == 2:
        return q * 32 + t * 8 + p // 2
    else:
        return q * 16 + t * 4 + p // 4


@triton.jit
def shift_of(r, h, WIDTH: tl.constexpr):
    """Where in its byte a plane of WIDTH bits has row r of half h."""
    p = r % 16
    if WIDTH == 8:
        return 0 * h
    elif WIDTH == 4:
        return 4 * h
    elif WIDTH == 2:
        return 4 * (p % 2) + 2 * h
    else:
        return 2 * (p % 4) + h


@triton.jit
def load_words(codes, unit, r, t, h: tl.constexpr, mask, BITS: tl.constexpr):
    """(words of the first plane, words of the second): of units `unit` (flat indices), int32. h
    matters for 8 bits alone, whose halves are words of their own."""
    base = codes + unit * (32 * BITS)
    if BITS == 8:
        low = tl.load(base + word_of(r, t, h, 8), mask, 0)
    elif BITS >= 4:
        low = tl.load(base + word_of(r, t, h, 4), mask, 0)
    else:
        low = tl.load(base + word_of(r, t, h, 2), mask, 0)
    high = low
    if BITS == 6:
        high = tl.load(base + 128 + word_of(r, t, h, 2), mask, 0)
    elif BITS == 5:
        high = tl.load(base + 128 + word_of(r, t, h, 1), mask, 0)
    elif BITS == 3:
        high = tl.load(base + 64 + word_of(r, t, h, 1), mask, 0)
    return low, high


@triton.jit
def field(words, r, j: tl.constexpr, h: tl.constexpr, WIDTH: tl.constexpr):
    """What a plane has of column j of its words."""
    return (words >> (shift_of(r, h, WIDTH) + 8 * j)) & ((1 << WIDTH) - 1)


@triton.jit
def code(low, high, r, j: tl.constexpr, h: tl.constexpr, BITS: tl.constexpr):
    """Codes of column j, int32."""
    if BITS == 8:
        return field(low, r, j, h, 8)
    elif BITS == 6:
        return field(low, r, j, h, 4) | field(high, r, j, h, 2) << 4
    elif BITS == 5:
        return field(low, r, j, h, 4) | field(high, r, j, h, 1) << 4
    elif BITS == 4:
        return field(low, r, j, h, 4)
    elif BITS == 3:
        return field(low, r, j, h, 2) | field(high, r, j, h, 1) << 2
    else:
        return field(low, r, j, h, 2)


@triton.jit
def interleave_columns(c0, c1, c2, c3):
    """Tiles [R, T] of columns 4 t + j, one per j -> [R, 4 T] in the order of the columns."""
    pairs = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [R, T, j / 2, j % 2]
    return tl.reshape(pairs, (c0.shape[0], 4 * c0.shape[1]))
