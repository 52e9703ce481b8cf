"""pack, unpack and dequantize. Four neighbouring columns are four neighbouring bytes of a plane
(csrc/layout.h), so that tiles of codes in the order of their columns are loads of 32 bits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import checks, registry
from .core import EXACT, device_of, narrow
from .weight import load_codes, load_values, weight_args

_UNITS = 4  # of a program, by 64 rows


@triton.jit
def dequantize_kernel(
    codes, scale, zero, block_scale, block_zero, table, out, n, k, units, group_units, chunks,
    BITS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """codes as bytes -> out [N, K]; grid [N / 64 * chunks of U units]."""
    block = (tl.program_id(0) // chunks).to(tl.int64)
    row = block * 64 + tl.arange(0, 64)[:, None, None]
    unit = tl.program_id(0) % chunks * U + tl.arange(0, U)[None, :, None]
    there = (unit < units) & (row < n)
    v = load_values(
        codes, scale, zero, block_scale, block_zero, table, row, unit, units, group_units, there,
        BITS, SCALE, ZERO, MIDDLE,
    )  # fmt: skip
    column = unit * 16 + tl.arange(0, 16)[None, None, :]
    tl.store(out + row * k + column, narrow(v, out.dtype.element_ty), there & (column < k))


@triton.jit
def unpack_kernel(codes, out, n, k, units, chunks, BITS: tl.constexpr, U: tl.constexpr):
    """The same without decoding: out [N, K] uint8."""
    block = (tl.program_id(0) // chunks).to(tl.int64)
    local = tl.arange(0, 64)[:, None, None]
    unit = tl.program_id(0) % chunks * U + tl.arange(0, U)[None, :, None]
    row = block * 64 + local
    there = (unit < units) & (row < n)
    j = tl.arange(0, 16)[None, None, :]
    q = load_codes(codes, block * units + unit, local, j, there, BITS)
    column = unit * 16 + j
    tl.store(out + row * k + column, q.to(tl.uint8), there & (column < k))


@triton.jit
def pack_plane(
    codes, packed, first_row, unit, there, n, k,
    BITS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Writes the plane that has bits SHIFT .. SHIFT + WIDTH of every code, OFFSET bytes into the
    units unit [U, 1]; returns the largest code that each of its bytes has seen, [U, 128 WIDTH].

    packed: of the first unit of this row of units.
    """
    b = tl.arange(0, 128 * WIDTH)[None, :]
    j = b % 4
    if WIDTH == 8:
        t, row = b // 64 % 4, b // 256 % 2 * 32 + b // 512 * 16 + b // 4 % 16
    elif WIDTH == 4:
        t, row = b // 64 % 4, b // 256 * 32 + b // 4 % 16
    elif WIDTH == 2:
        t, row = b // 32 % 4, b // 128 * 32 + b // 8 % 4 * 4 + b // 4 % 2 * 2
    else:
        t, row = b // 16 % 4, b // 64 * 32 + b // 4 % 4 * 4
    column = unit * 16 + t * 4 + j
    byte = tl.zeros(column.shape, tl.int32)
    most = byte
    for slot in tl.static_range(8 // WIDTH):  # e, then h: from the high end of its number
        of = first_row + row + slot // 2 + slot % 2 * 16
        q = tl.load(codes + of * k + column, there & (of < n) & (column < k), 0).to(tl.int32)
        most = tl.maximum(most, q)
        byte |= (q >> SHIFT & ((1 << WIDTH) - 1)) << (WIDTH * slot)
    tl.store(packed + unit * (128 * BITS) + (OFFSET + b), byte.to(tl.uint8), there)
    return most


@triton.jit
def pack_kernel(codes, packed, seen, n, k, units, chunks, BITS: tl.constexpr, U: tl.constexpr):
    """codes [N, K] uint8 -> packed, as bytes, and the largest code that each program has seen, seen
    [grid] int32; grid [N / 64 * chunks of U units]."""
    block = (tl.program_id(0) // chunks).to(tl.int64)
    unit = tl.program_id(0) % chunks * U + tl.arange(0, U)[:, None]
    there = unit < units
    packed += block * units * (128 * BITS)
    row = block * 64
    if BITS == 8:
        most = pack_plane(codes, packed, row, unit, there, n, k, BITS, 8, 0, 0)
    elif BITS >= 4:
        most = pack_plane(codes, packed, row, unit, there, n, k, BITS, 4, 0, 0)
    else:
        most = pack_plane(codes, packed, row, unit, there, n, k, BITS, 2, 0, 0)
    if BITS == 6:
        pack_plane(codes, packed, row, unit, there, n, k, BITS, 2, 4, 512)
    elif BITS == 5:
        pack_plane(codes, packed, row, unit, there, n, k, BITS, 1, 4, 512)
    elif BITS == 3:
        pack_plane(codes, packed, row, unit, there, n, k, BITS, 1, 2, 256)
    tl.store(seen + tl.program_id(0), tl.max(tl.max(most, axis=1), axis=0))


def pack(codes: Tensor, bits: int, group_size: int, two_level: bool) -> Tensor:
    """Waits for the kernel: the codes have to be looked at before anyone uses what is packed."""
    packed: Tensor = registry.fake("pack")(codes, bits, group_size, two_level)
    n, k = codes.shape
    blocks = packed.shape[0] // 64
    units = packed.shape[1] // (2 * bits)
    chunks = triton.cdiv(units, _UNITS)
    seen = torch.empty(blocks * chunks, dtype=torch.int32, device=codes.device)
    with device_of(codes):
        pack_kernel[(blocks * chunks,)](
            codes, packed.view(torch.uint8), seen, n, k, units, chunks, bits, _UNITS, **EXACT
        )
    if int(seen.max()) >> bits:
        checks.fail(
            "pack", f"codes must be below 2^bits = {1 << bits}, but some have higher bits set"
        )
    return packed


def unpack(*weight: Any) -> Tensor:
    out: Tensor = registry.fake("unpack")(*weight)
    w = weight_args(*weight, op="unpack")
    units = w.kp // 16
    chunks = triton.cdiv(w.k, 16 * _UNITS)
    with device_of(out):
        unpack_kernel[(triton.cdiv(w.n, 64) * chunks,)](
            w.bytes, out, w.n, w.k, units, chunks, w.bits, _UNITS, **EXACT
        )
    return out


def dequantize(*args: Any) -> Tensor:
    out: Tensor = registry.fake("dequantize")(*args)
    w = weight_args(*args[:-1], op="dequantize")
    units = w.kp // 16
    chunks = triton.cdiv(w.k, 16 * _UNITS)
    with device_of(out):
        dequantize_kernel[(triton.cdiv(w.n, 64) * chunks,)](
            w.bytes, *w.groups_and_table(), out, w.n, w.k, units, w.group // 16, chunks,
            w.bits, w.scale_kind, w.zero_kind, w.middle, _UNITS, **EXACT,
        )  # fmt: skip
    return out
