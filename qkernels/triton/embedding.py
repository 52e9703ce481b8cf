"""embedding."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, device_of, narrow, next_power_of_2
from .weight import load_values, weight_args

_UNITS = 64  # of a program: 1,024 columns of a row


@triton.jit
def embedding_kernel(
    ids, codes, scale, zero, block_scale, block_zero, table, y, multiplier, n, k, units,
    group_units, chunks, BITS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    MIDDLE: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """ids [T], codes as bytes -> y [T, K]; grid [T * chunks of U units]. An id that is not a row of
    the table gives NaN."""
    token = (tl.program_id(0) // chunks).to(tl.int64)
    unit = tl.program_id(0) % chunks * U + tl.arange(0, U)[None, :, None]
    row = tl.load(ids + token + tl.arange(0, 1))[:, None, None]
    is_row = (row >= 0) & (row < n)
    row = tl.where(is_row, row, 0)
    v = load_values(
        codes, scale, zero, block_scale, block_zero, table, row, unit, units, group_units,
        (unit < units) & is_row, BITS, SCALE, ZERO, MIDDLE,
    )  # fmt: skip
    v = tl.where(is_row, v * multiplier, float("nan"))
    column = unit * 16 + tl.arange(0, 16)[None, None, :]
    tl.store(y + token * k + column, narrow(v, y.dtype.element_ty), column < k)


def embedding(ids: Tensor, *args: Any) -> Tensor:
    y: Tensor = registry.fake("embedding")(ids, *args)
    *weight, _, multiplier = args
    w = weight_args(*weight, op="embedding")
    units = w.kp // 16
    u = min(_UNITS, next_power_of_2(units))
    chunks = triton.cdiv(triton.cdiv(w.k, 16), u)
    if y.numel():
        with device_of(y):
            embedding_kernel[(ids.shape[0] * chunks,)](
                ids, w.bytes, *w.groups_and_table(), y, multiplier, w.n, w.k, units,
                w.group // 16, chunks, w.bits, w.scale_kind, w.zero_kind, w.middle, u, **EXACT,
            )  # fmt: skip
    return y
