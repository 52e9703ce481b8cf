"""What the kernels of every op share."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted

# The interpreter multiplies bfloat16 matrices wrongly and cuts float32 off when it makes bfloat16
# of it (Triton 3.9): matmul and narrow go around that.
INTERPRETED = tl.constexpr(interpreted())
# Float32 steps that the reference has too must not become fused ones where results are compared bit
# for bit; kernels that want one say tl.fma.
EXACT = {"enable_fp_fusion": False}


def device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes a tensor's GPU the current one, on whose stream Triton launches."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; few where kernels are interpreted, so that both sides of every choice are seen."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def round_even(v):
    """Half to even, |v| < 2^22: adding 1.5 * 2^23 leaves no bit below one."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def narrow(v, TYPE: tl.constexpr):
    """float32 -> TYPE, to nearest, half to even; the interpreter would cut bfloat16 off, and lose
    what is subnormal."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = tl.where(v == v, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000)
        return (rounded >> 16).to(tl.uint16).to(TYPE, bitcast=True)
    return v.to(TYPE)


@triton.jit
def matmul(a, b, acc=None):
    """a [M, K] @ b [K, N] (+ acc) -> float32, or int32 of int8; operands are not rounded."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def act_scales(amax):
    """(scale, what values are multiplied by) of groups with these largest magnitudes; a NaN amax
    stands for a value that is not finite. As reference/act.py."""
    tiny = 7.888609052210118e-31  # 2^-100
    used = (amax >= tiny) & (amax < float("inf"))
    usable = tl.where(used, amax, 1.0)
    scale = tl.where(
        used, tl.div_rn(usable, usable * 0 + 127.0), tl.where(amax < tiny, 0.0, float("nan"))
    )
    return scale, tl.where(used, tl.div_rn(usable * 0 + 127.0, usable), 0.0)


@triton.jit
def quantize_groups(
    v, valid, codes, scale, sums, row, column, groups, GROUP: tl.constexpr, P: tl.constexpr
):
    """Quantizes groups [G, P >= GROUP] of one row and stores them, `valid` [G, P] of them.

    column [G]: the first one of each group (a multiple of GROUP); codes, scale, sums: of QuantAct,
    whose rows have `groups` groups. P is a power of two; columns from GROUP on are not there.
    """
    inside = tl.arange(0, P)[None, :] < GROUP
    magnitude = tl.where(valid & inside, tl.abs(v), 0.0)
    # NaN survives no maximum everywhere; it becomes infinity, which is refused as well.
    magnitude = tl.where(magnitude == magnitude, magnitude, float("inf"))
    step, inverse = act_scales(tl.max(magnitude, axis=1))
    usable = inverse[:, None] != 0.0
    q = tl.where(
        valid & inside & usable, round_even(tl.where(usable, v, 0.0) * inverse[:, None]), 0.0
    )
    q = q.to(tl.int32)
    there = column < groups * GROUP
    at = row.to(tl.int64) * groups * GROUP + column
    where = at[:, None] + tl.arange(0, P)[None, :]
    tl.store(codes + where, q.to(tl.int8), mask=there[:, None] & inside)
    tl.store(scale + row.to(tl.int64) * groups + column // GROUP, step, mask=there)
    of_unit = tl.sum(tl.reshape(q, (q.shape[0], P // 16, 16)), axis=2)
    unit = tl.arange(0, P // 16)[None, :]
    tl.store(
        sums + at[:, None] // 16 + unit,
        of_unit.to(tl.int16),
        mask=there[:, None] & (unit < GROUP // 16),
    )
