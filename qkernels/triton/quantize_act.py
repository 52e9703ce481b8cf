"""quantize_act."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, act_scales, device_of, next_power_of_2, quantize_groups, round_even

_BLOCK = 1024  # columns of a program, unless one group has more
_LOOP_BLOCK = 4096
LARGEST_TILE = 16384  # columns of a group that stay in registers


class GroupTile(NamedTuple):
    """What one program quantizes at once: groups side by side in a row."""

    groups: int
    columns: int  # of a group, rounded up to a power of two
    warps: int


def group_tile(group: int, groups: int) -> GroupTile:
    """For rows of `groups` groups of `group` <= LARGEST_TILE columns."""
    columns = next_power_of_2(group)
    count = max(1, min(_BLOCK // columns, next_power_of_2(groups)))
    # 32 columns a thread at most.
    return GroupTile(count, columns, max(4, count * columns // 1024))


@triton.jit
def quantize_act_kernel(
    x, codes, scale, sums, x_stride, k, groups, blocks,
    GROUP: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """x [M, K] -> codes, scale, sums of QuantAct; grid [M * blocks of G groups]. P is GROUP rounded
    up to a power of two."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks * G + tl.arange(0, G)) * GROUP
    column = first[:, None] + tl.arange(0, P)[None, :]
    valid = (column < k) & (tl.arange(0, P)[None, :] < GROUP)
    v = tl.load(x + row * x_stride + column, valid, 0.0).to(tl.float32)
    quantize_groups(v, valid, codes, scale, sums, row, first, groups, GROUP, P)


@triton.jit
def quantize_act_loop_kernel(
    x, codes, scale, sums, x_stride, k, groups, group, BLOCK: tl.constexpr
):
    """The same for groups of any length, which are read twice; grid [M * groups]."""
    row = (tl.program_id(0) // groups).to(tl.int64)
    begin = tl.program_id(0) % groups * group
    x += row * x_stride + begin
    codes += row * groups * group + begin
    sums += (row * groups * group + begin) // 16
    count = tl.minimum(group, k - begin)  # columns that are there
    most = tl.zeros((1, BLOCK), tl.float32)
    for at in range(0, count, BLOCK):
        column = at + tl.arange(0, BLOCK)[None, :]
        v = tl.abs(tl.load(x + column, column < count, 0.0).to(tl.float32))
        most = tl.maximum(most, tl.where(v == v, v, float("inf")))
    step, inverse = act_scales(tl.max(most, axis=1))  # [1]
    for at in range(0, group, BLOCK):
        column = at + tl.arange(0, BLOCK)
        v = tl.load(x + column, (column < count) & (inverse != 0.0), 0.0).to(tl.float32)
        q = round_even(v * inverse).to(tl.int32)
        tl.store(codes + column, q.to(tl.int8), column < group)
        unit = at // 16 + tl.arange(0, BLOCK // 16)
        of_unit = tl.sum(tl.reshape(q, (BLOCK // 16, 16)), axis=1)
        tl.store(sums + unit, of_unit.to(tl.int16), unit < group // 16)
    tl.store(scale + tl.program_id(0).to(tl.int64) + tl.arange(0, 1), step)


def quantize_into(x: Tensor, group: int, codes: Tensor, scale: Tensor, sums: Tensor) -> None:
    """Fills the three of a QuantAct from x [M, K]."""
    (m, k), groups = x.shape, scale.shape[1]
    if m == 0:
        return
    with device_of(x):
        if group > LARGEST_TILE:
            quantize_act_loop_kernel[(m * groups,)](
                x, codes, scale, sums, x.stride(0), k, groups, group, _LOOP_BLOCK,
                num_warps=8, **EXACT,
            )  # fmt: skip
            return
        tile = group_tile(group, groups)
        blocks = triton.cdiv(groups, tile.groups)
        quantize_act_kernel[(m * blocks,)](
            x, codes, scale, sums, x.stride(0), k, groups, blocks,
            group, tile.columns, tile.groups, num_warps=tile.warps, **EXACT,
        )  # fmt: skip


def quantize_act(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, sums = registry.fake("quantize_act")(x, group)
    quantize_into(x, group, codes, scale, sums)
    return codes, scale, sums
