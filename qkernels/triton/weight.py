"""Packed weights as kernels take them: views of their tensors, the kinds of their groups, and how
codes, scales and zeros are read. The float32 operations are those of the reference, in its order,
so that decoding is bitwise the same where a kernel is launched with EXACT."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import checks
from ..quant import layout
from ..quant.spec import BLOCK, FLAT_SCALES
from .codes import shift_of, word_of

_SCALES = {dtype: kind for kind, dtype in FLAT_SCALES.items()}
_SCALES |= {torch.int8: "int8", torch.uint8: "uint4"}


class Weight(NamedTuple):
    """A packed weight, whose Kp columns are whole groups (two-level: whole blocks of 256).

    Rows of scales are in blocks of 64: of row n and group g, number `group_index`.
    """

    codes: Tensor  # [Np * Kp * bits / 32] int32: units of 64 rows x 16 columns, 32 * bits words
    bytes: Tensor  # the same as uint8
    scale: Tensor  # [Np / 64, groups, 64]; float8 as uint8, bfloat16 as int16
    zero: Tensor | None  # [Np / 64, groups, 64]: uint8 zero points, or minima of the scale's type
    block_scale: Tensor | None  # [Np / 64, blocks, 64] float16
    block_zero: Tensor | None  # the same
    table: Tensor | None  # [16] int8
    bits: int
    group: int  # columns per scale, a multiple of 16
    n: int
    k: int
    kp: int
    groups: int  # Kp / group
    blocks: int  # Kp / 256, or 0 where scales have one level
    scale_kind: str  # "float32", "float16", "bfloat16", "e8m0", "e4m3", "int8" or "uint4"
    zero_kind: str  # "symmetric", "integer" or "minimum"
    middle: float  # what a symmetric code has subtracted: 2^(bits - 1), or 0 where there is a table

    def pointers(self) -> tuple[Tensor | None, ...]:
        """What every kernel takes of it first, in this order."""
        return self.codes, *self.groups_and_table()

    def groups_and_table(self) -> tuple[Tensor | None, ...]:
        return self.scale, self.zero, self.block_scale, self.block_zero, self.table


def weight_args(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    block_scale: Tensor | None,
    block_zero: Tensor | None,
    table: Tensor | None,
    bits: int,
    group: int,
    n: int,
    k: int,
    *,
    op: str = "linear",
) -> Weight:
    """The ten arguments of a weight, which the op's fake has checked. Raises RuntimeError for codes
    that wide loads cannot read."""
    if codes.data_ptr() % 16:
        checks.fail(op, "codes must start at a multiple of 16 bytes in memory; call .clone() on it")
    two_level = block_scale is not None
    kind = _SCALES[scale.dtype]
    kp = layout.padded_k(k, group, two_level)
    if kind == "uint4" or (zero is not None and (two_level or zero.dtype != torch.uint8)):
        zero_kind = "minimum"
    else:
        zero_kind = "symmetric" if zero is None else "integer"
    flat = codes.view(-1)
    return Weight(
        flat.view(torch.int32), flat.view(torch.uint8), _plain(scale),
        None if zero is None else _plain(zero), block_scale, block_zero, table,
        bits, group, n, k, kp, kp // group, kp // BLOCK if two_level else 0, kind, zero_kind,
        0.0 if table is not None else float(1 << (bits - 1)),
    )  # fmt: skip


def _plain(values: Tensor) -> Tensor:
    """float8 as uint8, and bfloat16 as int16: Triton knows neither everywhere, the interpreter no
    subnormal bfloat16."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16)
    eight_bit_float = values.is_floating_point() and values.dtype.itemsize == 1
    return values.view(torch.uint8) if eight_bit_float else values


@triton.jit
def group_index(n, g, groups):
    """Where rows of `groups` groups have that of row n and group g; int64 if n is."""
    return (n // 64 * groups + g) * 64 + n % 64


@triton.jit
def e8m0_to_float(e):
    """uint8 -> 2^(e - 127) float32; 255 is NaN, 0 is the subnormal 2^-127."""
    bits = e.to(tl.int32) << 23
    bits = tl.where(e == 0, 0x00400000, tl.where(e == 255, 0x7FC00000, bits))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_to_float(b):
    """uint8 -> float32: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, all ones
    is NaN."""
    b = b.to(tl.int32)
    sign, exponent, mantissa = (b & 0x80) << 24, (b >> 3) & 15, b & 7
    # Without exponent: units of 2^-9.
    small = (mantissa.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(exponent == 0, small, (exponent + 120) << 23 | mantissa << 20)
    bits = tl.where((b & 0x7F) == 0x7F, 0x7FC00000, bits)
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def flat_scale(stored, SCALE: tl.constexpr):
    """Scales or minima as they are stored, or the integers of two levels -> float32."""
    if SCALE == "e8m0":
        return e8m0_to_float(stored)
    elif SCALE == "e4m3":
        return e4m3_to_float(stored)
    elif SCALE == "bfloat16":
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def group_scale(
    scale, zero, block_scale, block_zero, index, block_index, mask,
    SCALE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr = 0.0,
):  # fmt: skip
    """float32 (scale, what is subtracted) of groups. `decode` tells from what it is subtracted.

    index: of each, see group_index; block_index: the same of its block of 256 columns, not used
    where scales have one level. Where mask (which may be None) is false, both are zero.
    """
    if mask is None:
        stored = tl.load(scale + index)
    else:
        stored = tl.load(scale + index, mask, 0)
    if ZERO == "minimum" and SCALE == "uint4":
        step, minimum = (stored & 15).to(tl.float32), (stored >> 4).to(tl.float32)
    else:
        step = flat_scale(stored, SCALE)
        if ZERO == "symmetric":
            minimum = tl.full(step.shape, MIDDLE, tl.float32)
        else:
            if mask is None:
                subtracted = tl.load(zero + index)
            else:
                subtracted = tl.load(zero + index, mask, 0)
            if ZERO == "integer":
                minimum = subtracted.to(tl.float32)
            else:
                minimum = flat_scale(subtracted, SCALE)
    if SCALE == "int8" or SCALE == "uint4":
        if mask is None:
            step = tl.load(block_scale + block_index).to(tl.float32) * step
        else:
            step = tl.load(block_scale + block_index, mask, 0.0).to(tl.float32) * step
        if ZERO == "minimum":
            if mask is None:
                minimum = tl.load(block_zero + block_index).to(tl.float32) * minimum
            else:
                minimum = tl.load(block_zero + block_index, mask, 0.0).to(tl.float32) * minimum
    return step, minimum


@triton.jit
def decode(q, step, subtracted, ZERO: tl.constexpr):
    """q: codes, or values of the table, as float32 -> what they stand for."""
    if ZERO == "minimum":
        return step * q - subtracted
    return step * (q - subtracted)


@triton.jit
def plane_value(plane, row, column, mask, WIDTH: tl.constexpr):
    """What a plane of WIDTH bits of a unit has of (row < 64, column < 16), int32. plane: its first
    byte. Four neighbouring columns are neighbouring bytes, which one load of 32 bits takes."""
    r, h = row // 32 * 16 + row % 16, row // 16 % 2
    at = 4 * word_of(r, column // 4, h, WIDTH) + column % 4
    bytes = tl.load(plane + at, mask, 0).to(tl.int32)
    return bytes >> shift_of(r, h, WIDTH) & ((1 << WIDTH) - 1)


@triton.jit
def load_codes(bytes, unit, row, column, mask, BITS: tl.constexpr):
    """Codes of (row < 64, column < 16) of unit number `unit` of a weight, int32. bytes: of all
    codes; int64 numbers where there may be 2^31 bytes. Where mask is false, 0."""
    start = bytes + unit * (128 * BITS)
    if BITS == 8:
        return plane_value(start, row, column, mask, 8)
    elif BITS == 6:
        high = plane_value(start + 512, row, column, mask, 2)
        return plane_value(start, row, column, mask, 4) | high << 4
    elif BITS == 5:
        high = plane_value(start + 512, row, column, mask, 1)
        return plane_value(start, row, column, mask, 4) | high << 4
    elif BITS == 4:
        return plane_value(start, row, column, mask, 4)
    elif BITS == 3:
        high = plane_value(start + 256, row, column, mask, 1)
        return plane_value(start, row, column, mask, 2) | high << 2
    else:
        return plane_value(start, row, column, mask, 2)


@triton.jit
def load_values(
    codes, scale, zero, block_scale, block_zero, table, n, unit, units, group_units, there,
    BITS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """Decoded columns of rows n [R, 1, 1] int64 and units unit [1, U, 1] -> [R, U, 16] float32.

    codes: as bytes; units: of a row; group_units: of a group; there [R, U, 1] is false for units
    that are not to be read.
    """
    column = tl.arange(0, 16)[None, None, :]
    q = load_codes(codes, n // 64 * units + unit, n % 64, column, there, BITS)
    if table is not None:
        q = tl.load(table + q)
    index = group_index(n, unit // group_units, units // group_units)
    block_index = group_index(n, unit // 16, units // 16)
    step, subtracted = group_scale(
        scale, zero, block_scale, block_zero, index, block_index, there, SCALE, ZERO, MIDDLE
    )
    return decode(q.to(tl.float32), step, subtracted, ZERO)
