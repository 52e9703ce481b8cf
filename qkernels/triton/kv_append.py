"""kv_append: RoPE on q and k, quantization of k and v, and their way into the pages, in one launch.

The numbers are those of the reference, operation for operation in float32, so codes and scales are
the same bits. A token whose page or slot is out of range is not written; a position beyond the rows
of rope turns by NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, device_of, narrow, next_power_of_2, round_even

_BLOCK = 1024  # elements of a program
SEARCHED = tl.constexpr(256)  # sequences looked at in one step


@triton.jit
def turned(
    x, angles, dims, head, heads,
    DP: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Heads [H] of x [heads, D] as float32 [H, DP], their pairs (i, i + ROTARY / 2) turned by
    angles [ROTARY], cosines then sines; dims from `dims` on by NaN. ROTARY = 0: as they are."""
    d = tl.arange(0, DP)
    at = head[:, None] * D + d[None, :]
    there = (head < heads)[:, None] & (d < D)[None, :]
    v = tl.load(x + at, there, 0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        first = d < HALF
        turns = d < ROTARY
        has_angle = d < dims
        other = tl.load(x + at + tl.where(first, HALF, -HALF)[None, :], there & turns[None, :], 0.0)
        of_pair = tl.where(first, d, d - HALF)
        cos = tl.load(angles + of_pair, has_angle, float("nan"))
        sin = tl.load(angles + HALF + of_pair, has_angle, float("nan"))
        across = other.to(tl.float32) * sin[None, :]
        # a cos - b sin and b cos + a sin of the pair (a, b)
        rotated = v * cos[None, :] + tl.where(first[None, :], -across, across)
        v = tl.where(turns[None, :], rotated, v)
    return v


@triton.jit
def quantize_rows(v, LEVELS: tl.constexpr):
    """v [H, DP] float32, zero beyond the row -> codes [H, DP] int32, scale and zero point [H]
    float16: scale = range / LEVELS rounded up to float16, where the range includes 0; code =
    round(x / scale) + round(-low / scale). As reference/attention.py."""
    finite = tl.min((v - v == 0.0).to(tl.int32), axis=1) != 0
    clean = tl.where(finite[:, None], v, 0.0)
    low = tl.minimum(tl.min(clean, axis=1), 0.0)
    high = tl.maximum(tl.max(clean, axis=1), 0.0)
    width = high - low
    exact = tl.div_rn(width, width * 0.0 + LEVELS)
    usable = finite & (exact < 65504.0)
    exact = tl.where(usable, exact, 0.0)
    scale = exact.to(tl.float16)
    up = (scale.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    scale = tl.where(scale.to(tl.float32) < exact, up, scale)
    wide = scale.to(tl.float32)
    divisor = tl.where(wide == 0.0, float("inf"), wide)
    zero = round_even(tl.div_rn(tl.where(usable, -low, 0.0), divisor))
    steps = tl.div_rn(
        tl.where(usable[:, None], clean, 0.0), tl.broadcast_to(divisor[:, None], v.shape)
    )
    codes = tl.minimum(tl.maximum(round_even(steps) + zero[:, None], 0.0), LEVELS + 0.0)
    scale = tl.where(usable, wide, float("nan")).to(tl.float16)
    return codes.to(tl.int32), scale, zero.to(tl.float16)


@triton.jit
def put_rows(
    v, pages, scales, page, slot, head, heads, page_stride, scale_stride,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """v [H, DP] float32 into slot `slot` of heads `head` [H] of page `page`; BITS: 0, 8 or 4 of
    codes."""
    there = head < heads
    row = page * page_stride + (head * PAGE + slot) * (D // 2 if BITS == 4 else D)
    d = tl.arange(0, DP)
    if BITS == 0:
        inside = there[:, None] & (d < D)[None, :]
        tl.store(pages + row[:, None] + d[None, :], narrow(v, pages.dtype.element_ty), inside)
    else:
        codes, scale, zero = quantize_rows(v, (1 << BITS) - 1)
        if BITS == 4:  # byte i of 8: dims i and 8 + i of 16, the first in the low nibble
            pairs = tl.reshape(codes, (v.shape[0], DP // 16, 2, 8))
            place = (1 + 15 * tl.arange(0, 2))[None, None, :, None]
            byte = tl.reshape(tl.sum(pairs * place, axis=2), (v.shape[0], DP // 2))
            i = tl.arange(0, DP // 2)
            inside = there[:, None] & (i < D // 2)[None, :]
            tl.store(pages + row[:, None] + i[None, :], byte.to(tl.uint8), inside)
        else:
            inside = there[:, None] & (d < D)[None, :]
            tl.store(pages + row[:, None] + d[None, :], codes.to(tl.uint8), inside)
        at = scales + page * scale_stride + head * 2 * PAGE + slot
        tl.store(at, scale, there)
        tl.store(at + PAGE, zero, there)


@triton.jit(do_not_specialize=["batch", "table_width", "pages", "rope_rows"])
def kv_append_kernel(
    q, k, v, rope, positions, query_start, kv_len, page_table, k_pages, v_pages, k_scale, v_scale,
    q_out, batch, table_width, pages, rope_rows, q_stride, k_stride, v_stride, page_stride,
    scale_stride, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, ROTARY: tl.constexpr, BITS: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Grid [T, blocks of H heads: q's, k's, v's].

    q, q_out [T, Hq, D], k, v [T, Hkv, D], tokens q_stride, k_stride, v_stride elements apart; rope
    [rope_rows, ROTARY]; positions [T] or None; query_start [B + 1], kv_len [B], page_table
    [B, table_width]; pages [P, Hkv, PAGE, D], page_stride apart; scales [P, Hkv, 2, PAGE].
    """
    token, block = tl.program_id(0), tl.program_id(1)
    found = 0
    for i0 in range(0, batch, SEARCHED):
        i = i0 + tl.arange(0, SEARCHED)
        before = tl.load(query_start + i, i < batch, 0x7FFFFFFF) <= token
        found += tl.sum(before.to(tl.int32), axis=0)
    b = tl.maximum(found - 1, 0).to(tl.int64)
    index = tl.load(kv_len + b).to(tl.int64) - tl.load(query_start + b + 1) + token

    Q_BLOCKS: tl.constexpr = (Q_HEADS + H - 1) // H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + H - 1) // H
    row = token.to(tl.int64)
    angles = rope
    dims = 0
    if ROTARY > 0:
        position = index
        if positions is not None:
            position = tl.load(positions + token).to(tl.int64)
        dims = tl.where((position >= 0) & (position < rope_rows), ROTARY, 0)
        angles = rope + position * ROTARY
    if block < Q_BLOCKS:
        head = block * H + tl.arange(0, H)
        x = turned(q + row * q_stride, angles, dims, head, Q_HEADS, DP, D, ROTARY)
        d = tl.arange(0, DP)
        at = row * (Q_HEADS * D) + head[:, None] * D + d[None, :]
        inside = (head < Q_HEADS)[:, None] & (d < D)[None, :]
        tl.store(q_out + at, narrow(x, q_out.dtype.element_ty), inside)
        return

    place = index // PAGE
    if (index < 0) | (place >= table_width):
        return
    page = tl.load(page_table + b * table_width + place).to(tl.int64)
    if (page < 0) | (page >= pages):
        return
    block -= Q_BLOCKS
    if block < KV_BLOCKS:
        head = block * H + tl.arange(0, H)
        x = turned(k + row * k_stride, angles, dims, head, KV_HEADS, DP, D, ROTARY)
        put_rows(
            x, k_pages, k_scale, page, index % PAGE, head, KV_HEADS, page_stride, scale_stride,
            D, DP, PAGE, BITS,
        )  # fmt: skip
    else:
        head = (block - KV_BLOCKS) * H + tl.arange(0, H)
        x = turned(v + row * v_stride, angles, dims, head, KV_HEADS, DP, D, 0)
        put_rows(
            x, v_pages, v_scale, page, index % PAGE, head, KV_HEADS, page_stride, scale_stride,
            D, DP, PAGE, BITS,
        )  # fmt: skip


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor | None,
    positions: Tensor | None,
    query_start: Tensor,
    kv_len: Tensor,
    page_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    q_out: Tensor = registry.fake("kv_append")(
        q, k, v, rope, positions, query_start, kv_len, page_table, k_pages, v_pages, k_scale,
        v_scale,
    )  # fmt: skip
    (tokens, heads, dim), batch = q.shape, kv_len.shape[0]
    pages, kv_heads, page, stored = k_pages.shape
    bits = 0 if k_scale is None else 8 if stored == dim else 4
    dp = next_power_of_2(dim)
    h = max(1, min(_BLOCK // dp, next_power_of_2(heads)))
    blocks = triton.cdiv(heads, h) + 2 * triton.cdiv(kv_heads, h)
    if tokens and batch:
        with device_of(q):
            kv_append_kernel[(tokens, blocks)](
                q, k, v, rope, positions, query_start, kv_len, page_table, k_pages, v_pages,
                k_scale, v_scale, q_out, batch, page_table.shape[1], pages,
                0 if rope is None else rope.shape[0], q.stride(0), k.stride(0), v.stride(0),
                k_pages.stride(0), 0 if k_scale is None else k_scale.stride(0),
                Q_HEADS=heads, KV_HEADS=kv_heads, D=dim, DP=dp, PAGE=page,
                ROTARY=0 if rope is None else rope.shape[1], BITS=bits, H=h, num_warps=4, **EXACT,
            )  # fmt: skip
    return q_out
