"""The kernels of linear: gemv for one token, tile for several, and the sum of the parts of K.

Weights come as the tensors of `Weight`; units are its 16 columns. x_scale is None for activations
of 16 bits, [m, act_groups] for int8 ones, whose groups have act_units units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import code, interleave_columns, load_words, unit_row
from .core import matmul, narrow
from .weight import group_scale


@triton.jit
def _value(low, high, r, j: tl.constexpr, h: tl.constexpr, zero, table,
           BITS: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """What a group's scale multiplies, float32: an integer, less the zero point if there is one.

    An integer q below 2^23 becomes 2^23 + q by its bits, which is cheaper than a conversion.
    """
    q = code(low, high, r, j, h, BITS)
    if table is not None:
        return tl.load(table + q).to(tl.float32)
    raised = (q | 0x4B000000).to(tl.float32, bitcast=True)
    if ZERO == "minimum":
        return raised - 8388608.0
    return raised - (8388608.0 + zero)


@triton.jit
def _gemv_half(
    x0, x1, x2, x3, a, codes, scale, zero, block_scale, block_zero, table,
    block, unit, units, r, t, mask, group_units, h: tl.constexpr,
    BITS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """[32, 4 U]: products of the rows of half h with activations x0 .. x3 [1, 4 U] of the four
    columns of each word, scaled."""
    low, high = load_words(codes, block * units + unit, r, t, h, mask, BITS)
    row = unit_row(r, h)
    index = (block * (units // group_units) + unit // group_units) * 64 + row
    block_index = (block * (units // 16) + unit // 16) * 64 + row
    s, z = group_scale(
        scale, zero, block_scale, block_zero, index, block_index, mask, SCALE, ZERO, MIDDLE
    )
    sum = _value(low, high, r, 0, h, z, table, BITS, ZERO) * x0
    sum = _add_product(_value(low, high, r, 1, h, z, table, BITS, ZERO), x1, sum)
    sum = _add_product(_value(low, high, r, 2, h, z, table, BITS, ZERO), x2, sum)
    sum = _add_product(_value(low, high, r, 3, h, z, table, BITS, ZERO), x3, sum)
    sum *= s
    if ZERO == "minimum":
        sum -= z * (x0 + x1 + x2 + x3)
    return tl.where(mask, sum * a, 0.0)


@triton.jit
def _add_product(v, x, sum):
    return tl.fma(v, tl.broadcast_to(x, v.shape), sum)


@triton.jit
def _store_rows(
    y, sum, bias, residual, row, token, n, y_stride, residual_stride, mask, FINAL: tl.constexpr
):
    """sum [M, R] to columns `row` of y's rows `token`; the last one to touch it adds bias and
    residual."""
    if FINAL:
        if bias is not None:
            sum += tl.load(bias + row, mask & (row < n), 0.0)
        if residual is not None:
            sum += tl.load(residual + token * residual_stride + row, mask, 0.0).to(tl.float32)
    tl.store(y + token * y_stride + row, narrow(sum, y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["m", "part_units"])
def linear_gemv_kernel(
    x, x_scale, codes, scale, zero, block_scale, block_zero, table, y, bias, residual,
    m, n, k, units, group_units, act_units, act_groups, x_stride, y_stride, residual_stride,
    part_units, BITS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr,
    U: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x [1, k], 64 rows of W -> y [1, n], or with SPLIT [parts, 1, n] float32; grid [N / 64,
    parts], of part_units units each. U units at a time."""
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r = tl.arange(0, 32)[:, None]
    u, t = tl.arange(0, 4 * U)[None, :] // 4, tl.arange(0, 4 * U)[None, :] % 4
    sum0 = tl.zeros((32, 4 * U), tl.float32)
    sum1 = tl.zeros((32, 4 * U), tl.float32)
    end = tl.minimum(units, (part + 1) * part_units)
    for first in tl.range(part * part_units, end, U, num_stages=STAGES):
        unit = first + u
        mask = unit < end
        column = unit * 16 + 4 * t
        x0 = tl.load(x + column, mask & (column < k), 0.0).to(tl.float32)
        x1 = tl.load(x + column + 1, mask & (column + 1 < k), 0.0).to(tl.float32)
        x2 = tl.load(x + column + 2, mask & (column + 2 < k), 0.0).to(tl.float32)
        x3 = tl.load(x + column + 3, mask & (column + 3 < k), 0.0).to(tl.float32)
        a = 1.0
        if x_scale is not None:
            a = tl.load(x_scale + unit // act_units, mask & (column < k), 0.0)
        rows = tl.broadcast_to(mask, (32, 4 * U))
        sum0 += _gemv_half(
            x0, x1, x2, x3, a, codes, scale, zero, block_scale, block_zero, table,
            block, unit, units, r, t, rows, group_units, 0, BITS, SCALE, ZERO, MIDDLE,
        )  # fmt: skip
        sum1 += _gemv_half(
            x0, x1, x2, x3, a, codes, scale, zero, block_scale, block_zero, table,
            block, unit, units, r, t, rows, group_units, 1, BITS, SCALE, ZERO, MIDDLE,
        )  # fmt: skip
    if SPLIT:
        y += part.to(tl.int64) * n
    lane = tl.arange(0, 32)
    row0, row1 = block * 64 + unit_row(lane, 0), block * 64 + unit_row(lane, 1)
    _store_rows(
        y,
        tl.sum(sum0, 1),
        bias,
        residual,
        row0,
        0,
        n,
        y_stride,
        residual_stride,
        row0 < n,
        not SPLIT,
    )
    _store_rows(
        y,
        tl.sum(sum1, 1),
        bias,
        residual,
        row1,
        0,
        n,
        y_stride,
        residual_stride,
        row1 < n,
        not SPLIT,
    )


@triton.jit
def _tile_half(
    sum, x, x_sum, a, low, high, s, z, table, r,
    h: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """sum [R, M] plus the product of half h's rows r [R], of scales s and what is subtracted z, in
    the columns of one group, with x [16 U, M]."""
    v0 = _value(low, high, r[:, None], 0, h, z[:, None], table, BITS, ZERO).to(TYPE)
    v1 = _value(low, high, r[:, None], 1, h, z[:, None], table, BITS, ZERO).to(TYPE)
    v2 = _value(low, high, r[:, None], 2, h, z[:, None], table, BITS, ZERO).to(TYPE)
    v3 = _value(low, high, r[:, None], 3, h, z[:, None], table, BITS, ZERO).to(TYPE)
    product = matmul(interleave_columns(v0, v1, v2, v3), x).to(tl.float32) * s[:, None]
    if ZERO == "minimum":
        product -= z[:, None] * x_sum[None, :]
    return sum + product * a


@triton.jit(do_not_specialize=["m", "part_units"])
def linear_tile_kernel(
    x, x_scale, codes, scale, zero, block_scale, block_zero, table, y, bias, residual,
    m, n, k, units, group_units, act_units, act_groups, x_stride, y_stride, residual_stride,
    part_units, BITS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr,
    TYPE: tl.constexpr, B: tl.constexpr, M: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The same for tiles of 64 B rows and M tokens: grid [tiles of rows x tiles of tokens, parts].
    The U units of a step lie in one group of W and of x. TYPE: of the products' operands."""
    token_tiles = tl.cdiv(m, M)
    tile, part = tl.program_id(0), tl.program_id(1)
    block = (tile // token_tiles * B + tl.arange(0, 32 * B) // 32).to(tl.int64)
    r, there = tl.arange(0, 32 * B) % 32, block * 64 < n
    token = tile % token_tiles * M + tl.arange(0, M)
    u, t = tl.arange(0, 4 * U)[None, :] // 4, tl.arange(0, 4 * U)[None, :] % 4
    x_row = x + token.to(tl.int64)[None, :] * x_stride
    sum0 = tl.zeros((32 * B, M), tl.float32)
    sum1 = tl.zeros((32 * B, M), tl.float32)
    end = tl.minimum(units, (part + 1) * part_units)
    for first in range(part * part_units, end, U):
        column = first * 16 + tl.arange(0, 16 * U)[:, None]
        xt = tl.load(x_row + column, (token < m)[None, :] & (column < k), 0.0)
        a = 1.0
        if x_scale is not None:
            a = tl.load(
                x_scale + token.to(tl.int64) * act_groups + first // act_units,
                (token < m) & (token * 0 + first * 16 < k),
                0.0,
            )[None, :]
        x_sum = tl.sum(xt.to(tl.float32), 0) if ZERO == "minimum" else 0.0
        xt = xt.to(TYPE)
        # Both halves' before the first product, which nothing then waits for but the codes.
        at = (block * (units // group_units) + first // group_units) * 64
        block_at = (block * (units // 16) + first // 16) * 64
        s0, z0 = group_scale(
            scale, zero, block_scale, block_zero, at + unit_row(r, 0), block_at + unit_row(r, 0),
            there, SCALE, ZERO, MIDDLE,
        )  # fmt: skip
        s1, z1 = group_scale(
            scale, zero, block_scale, block_zero, at + unit_row(r, 1), block_at + unit_row(r, 1),
            there, SCALE, ZERO, MIDDLE,
        )  # fmt: skip
        unit = block[:, None] * units + first + u
        low, high = load_words(codes, unit, r[:, None], t, 0, there[:, None], BITS)
        sum0 = _tile_half(sum0, xt, x_sum, a, low, high, s0, z0, table, r, 0, BITS, ZERO, TYPE)
        if BITS == 8:
            low, high = load_words(codes, unit, r[:, None], t, 1, there[:, None], BITS)
        sum1 = _tile_half(sum1, xt, x_sum, a, low, high, s1, z1, table, r, 1, BITS, ZERO, TYPE)
    if SPLIT:
        y += part.to(tl.int64) * m * n
    row0, row1 = (block * 64 + unit_row(r, 0))[:, None], (block * 64 + unit_row(r, 1))[:, None]
    at = token.to(tl.int64)[None, :]
    mask0, mask1 = (at < m) & (row0 < n), (at < m) & (row1 < n)
    _store_rows(y, sum0, bias, residual, row0, at, n, y_stride, residual_stride, mask0, not SPLIT)
    _store_rows(y, sum1, bias, residual, row1, at, n, y_stride, residual_stride, mask1, not SPLIT)


@triton.jit(do_not_specialize=["m", "parts"])
def linear_sum_kernel(
    partial, y, bias, residual, m, n, parts, y_stride, residual_stride, BLOCK: tl.constexpr
):
    """partial [parts, m, n] -> y [m, n]: their sum in order, bias, residual; grid [m, n / BLOCK]"""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        sum += tl.load(partial + (part * m + token) * n + row, row < n, 0.0)
    _store_rows(y, sum, bias, residual, row, token, n, y_stride, residual_stride, row < n, True)
