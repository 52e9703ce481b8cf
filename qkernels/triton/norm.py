"""norm, add_norm, norm_quant and add_norm_quant.

A row of up to 16,384 columns stays in registers between its uses; longer ones are read again, from
L2. The quantizing ops reduce rows as the others do, so that what they quantize is the same to the
bit; where groups do not tile the registers of a row, they are the other op and quantize_act.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, device_of, narrow, next_power_of_2, quantize_groups
from .quantize_act import quantize_into

_REGISTERS = 16384  # columns of a row, on 16 warps
_LOOP_BLOCK = 4096


@triton.jit
def load_sum(x, residual, column, there):
    """x + residual (which may be None) as it is stored, in float32."""
    v = tl.load(x + column, there, 0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + column, there, 0.0).to(tl.float32)
        v = narrow(v, x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def inverse_root(squares, k, eps):
    """1 / sqrt(squares / k + eps), each step rounded to nearest."""
    mean = divide(squares, k)
    return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def divide(values, k):
    """float32 / integer, rounded to nearest; infinity stays."""
    return tl.div_rn(values, tl.full(values.shape, 0.0, tl.float32) + tl.cast(k, tl.float32))


@triton.jit
def norm_rows(
    x, residual, weight, bias, sum, row, m, k, x_stride, residual_stride, eps,
    CENTER: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows row [R] normalized, [R, BLOCK >= k] float32, and which of their columns are there."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < k
    there = (row < m)[:, None] & inside
    x += row.to(tl.int64)[:, None] * x_stride
    if residual is not None:
        residual += row.to(tl.int64)[:, None] * residual_stride
    v = load_sum(x, residual, column, there)
    if sum is not None:
        to = row.to(tl.int64)[:, None] * k + column
        tl.store(sum + to, narrow(v, sum.dtype.element_ty), there)
    if CENTER:
        total = tl.sum(v, axis=1)
        mean = divide(total, k)
        v = tl.where(there, v - mean[:, None], 0.0)
    v = v * inverse_root(tl.sum(v * v, axis=1), k, eps)[:, None]
    v *= tl.load(weight + column, inside, 0.0)
    if bias is not None:
        v += tl.load(bias + column, inside, 0.0)
    return v, there


@triton.jit
def norm_kernel(
    x, residual, weight, bias, y, sum, m, k, x_stride, residual_stride, eps,
    CENTER: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, residual [M, K] (residual and sum may be None) -> y, sum [M, K]; grid [M / R]."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    v, there = norm_rows(
        x, residual, weight, bias, sum, row, m, k, x_stride, residual_stride, eps, CENTER, R, BLOCK
    )
    to = row.to(tl.int64)[:, None] * k + tl.arange(0, BLOCK)[None, :]
    tl.store(y + to, narrow(v, y.dtype.element_ty), there)


@triton.jit
def norm_quant_kernel(
    x, residual, weight, bias, codes, scale, sums, sum, m, k, groups, x_stride, residual_stride,
    eps, CENTER: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, quantized; GROUP is a power of two, and BLOCK a multiple of it."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    v, there = norm_rows(
        x, residual, weight, bias, sum, row, m, k, x_stride, residual_stride, eps, CENTER, R, BLOCK
    )
    tiles: tl.constexpr = BLOCK // GROUP  # of a row
    v = tl.reshape(v, (R * tiles, GROUP))
    there = tl.reshape(there, (R * tiles, GROUP))
    tile = tl.arange(0, R * tiles)
    row = tl.program_id(0) * R + tile // tiles
    column = tl.where(row < m, tile % tiles, groups) * GROUP  # what is beyond is not stored
    quantize_groups(v, there, codes, scale, sums, row, column, groups, GROUP, GROUP)


@triton.jit
def norm_loop_kernel(
    x, residual, weight, bias, y, sum, k, x_stride, residual_stride, eps,
    CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of any length; grid [M]."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * k
    if residual is not None:
        residual += row * residual_stride
        sum += row * k
    lane = tl.arange(0, BLOCK)[None, :]
    mean = tl.zeros((1,), tl.float32)
    if CENTER:
        total = tl.zeros((1, BLOCK), tl.float32)
        for first in range(0, k, BLOCK):
            total += load_sum(x, residual, first + lane, first + lane < k)
        mean = tl.sum(total, axis=1)
        mean = divide(mean, k)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, k, BLOCK):
        there = first + lane < k
        d = tl.where(there, load_sum(x, residual, first + lane, there) - mean[:, None], 0.0)
        squares += d * d
    factor = inverse_root(tl.sum(squares, axis=1), k, eps)[:, None]
    for first in range(0, k, BLOCK):
        column = first + lane
        there = column < k
        v = load_sum(x, residual, column, there)
        if sum is not None:
            tl.store(sum + column, narrow(v, sum.dtype.element_ty), there)
        v = (v - mean[:, None]) * factor * tl.load(weight + column, there, 0.0)
        if bias is not None:
            v += tl.load(bias + column, there, 0.0)
        tl.store(y + column, narrow(v, y.dtype.element_ty), there)


def _shape(k: int) -> tuple[int, int, int]:
    """(rows of a program, K rounded up to a power of two, warps). By K alone: rows of one alignment
    are summed in one order, whatever their number."""
    block = max(16, next_power_of_2(k))
    rows = max(1, 1024 // block)
    return rows, block, max(4, rows * block // 1024)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    center: bool, y: Tensor, total: Tensor | None,
) -> None:  # fmt: skip
    """Fills y [M, K], of any float type, and total [M, K] where there is a residual."""
    m, k = x.shape
    if m == 0:
        return
    residual_stride = 0 if residual is None else residual.stride(0)
    with device_of(x):
        if k > _REGISTERS:
            norm_loop_kernel[(m,)](
                x, residual, weight, bias, y, total, k, x.stride(0), residual_stride, eps,
                center, _LOOP_BLOCK, num_warps=8, **EXACT,
            )  # fmt: skip
            return
        rows, block, warps = _shape(k)
        norm_kernel[(triton.cdiv(m, rows),)](
            x, residual, weight, bias, y, total, m, k, x.stride(0), residual_stride, eps,
            center, rows, block, num_warps=warps, **EXACT,
        )  # fmt: skip


def _norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    center: bool, group: int, act: tuple[Tensor, Tensor, Tensor], total: Tensor | None,
) -> None:  # fmt: skip
    """Fills act, and total where there is a residual."""
    m, k = x.shape
    if m == 0:
        return
    rows, block, warps = _shape(k)
    groups_tile_a_row = group & (group - 1) == 0 and group <= block
    if k > _REGISTERS or not groups_tile_a_row:
        y = torch.empty((m, k), dtype=torch.float32, device=x.device)
        _norm(x, residual, weight, bias, eps, center, y, total)
        quantize_into(y, group, *act)
        return
    residual_stride = 0 if residual is None else residual.stride(0)
    with device_of(x):
        norm_quant_kernel[(triton.cdiv(m, rows),)](
            x, residual, weight, bias, *act, total, m, k, act[1].shape[1], x.stride(0),
            residual_stride, eps, center, group, rows, block, num_warps=warps, **EXACT,
        )  # fmt: skip


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    y: Tensor = registry.fake("norm")(x, weight, bias, eps, center)
    _norm(x, None, weight, bias, eps, center, y, None)
    return y


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    y, total = registry.fake("add_norm")(x, residual, weight, bias, eps, center)
    _norm(x, residual, weight, bias, eps, center, y, total)
    return y, total


def norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, act_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    act: tuple[Tensor, Tensor, Tensor] = registry.fake("norm_quant")(
        x, weight, bias, eps, center, act_group
    )
    _norm_quant(x, None, weight, bias, eps, center, act_group, act, None)
    return act


def add_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    act_group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *act, total = registry.fake("add_norm_quant")(x, residual, weight, bias, eps, center, act_group)
    _norm_quant(x, residual, weight, bias, eps, center, act_group, tuple(act), total)
    return *act, total
