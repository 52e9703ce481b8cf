"""Attention, the rotary embedding and the quantization of keys and values, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

FP16_MAX = 65504.0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """One sequence: q [n, Hq, D], k and v [m, Hkv, D] float32; sinks and alibi_slopes [Hq],
    distance_bias [Hq, 2 reach + 1] -> [n, Hq, D] float32.

    Query i stands at position m - n + i. It sees the keys up to its position if causal, else all;
    with window > 0 only those above position - window. A query that sees none, or whose scores are
    all -inf, gives zeros.
    """
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(group, 1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(k.shape[0], device=q.device)
    position = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device)[:, None]
    distance = key - position  # [n, m]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance.abs()
    if distance_bias is not None:
        reach = distance_bias.shape[1] // 2
        scores = scores + distance_bias[:, distance.clamp(-reach, reach) + reach]
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    if causal:
        seen &= key <= position
    if window > 0:
        seen &= key > position - window
    scores = scores.masked_fill(~seen, -torch.inf)
    nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, q.shape[0], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[0]]
    weights = torch.where(nothing, 0.0, weights)
    return torch.einsum("hnm,mhd->nhd", weights, v.repeat_interleave(group, 1))


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[..., D / 2] uint8 -> [..., D]: each run of 8 bytes holds 16 dims, the first 8 in the low
    nibbles."""
    runs = packed.unflatten(-1, (-1, 8))
    return torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """The inverse: [..., D] uint8 codes below 16 -> [..., D / 2]."""
    low, high = codes.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (low | high << 4).flatten(-2)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] float32 -> codes [..., D] uint8, scale and zero [...] float16, with x ~= scale *
    (code - zero).

    The range of a row is stretched to include 0; scale is range / (2^bits - 1) rounded up to
    float16, and codes are computed with the rounded scale. A row of zeros has scale 0. A row that
    is not finite, or too wide for a float16 scale, gets a NaN scale: it reads back as NaN.
    """
    levels = 2**bits - 1
    low, high = x.amin(-1).clamp(max=0.0), x.amax(-1).clamp(min=0.0)
    exact = (high - low) / levels
    usable = torch.isfinite(x).all(-1) & (exact < FP16_MAX)
    exact = torch.where(usable, exact, 0.0)
    scale = exact.half()
    scale = torch.where(
        scale.float() < exact, (scale.view(torch.int16) + 1).view(torch.float16), scale
    )
    divisor = torch.where(scale == 0, torch.inf, scale.float())
    zero = torch.round(torch.where(usable, -low, 0.0) / divisor)
    clean = torch.where(usable[..., None], x, 0.0)
    codes = (
        (torch.round(clean / divisor[..., None]) + zero[..., None]).clamp(0, levels).to(torch.uint8)
    )
    return codes, torch.where(usable, scale, torch.nan), zero.half()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [T, H, D] float32, table [T, rotary_dim]: pairs (i, i + rotary_dim / 2) turned by the
    angles of each token."""
    cos, sin = table.unsqueeze(1).chunk(2, dim=-1)
    rotary = table.shape[-1]
    a, b = x[..., :rotary].chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., rotary:]), dim=-1)


def read_pages(pages: Tensor, scale: Tensor | None, table: Tensor, length: int, dim: int) -> Tensor:
    """The first `length` rows of a sequence: [length, Hkv, D] float32. table: its pages, in
    order."""
    page = pages.shape[2]
    used = table[: (length + page - 1) // page].long()
    rows = pages[used]
    if scale is not None:
        codes = rows if rows.shape[-1] == dim else unpack_nibbles(rows)
        step, zero = scale[used].float().unbind(2)
        rows = step[..., None] * (codes.float() - zero[..., None])
    return rows.float().transpose(1, 2).flatten(0, 1)[:length]


def attention(
    q: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    page_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D], pages [P, Hkv, page, D] (int4: D / 2), scales [P, Hkv, 2, page] or None -> [T,
    Hq, D]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start, dim = query_start.tolist(), q.shape[2]
    scores = (scale, causal, window, softcap, sinks, alibi_slopes, distance_bias)
    for b, length in enumerate(kv_len.tolist()):
        tokens = slice(start[b], start[b + 1])
        k = read_pages(k_pages, k_scale, page_table[b], length, dim)
        v = read_pages(v_pages, v_scale, page_table[b], length, dim)
        part = attend(q[tokens].float(), k, v, *scores)
        out[tokens] = part.to(q.dtype)
    return out


def attention_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    kv_start: Tensor,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> [Tq, Hq, D]; sequence b owns the ranges b of
    query_start and kv_start."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start, kv = query_start.tolist(), kv_start.tolist()
    scores = (scale, causal, window, softcap, sinks, alibi_slopes, distance_bias)
    for b in range(len(start) - 1):
        tokens, keys = slice(start[b], start[b + 1]), slice(kv[b], kv[b + 1])
        part = attend(q[tokens].float(), k[keys].float(), v[keys].float(), *scores)
        out[tokens] = part.to(q.dtype)
    return out


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
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Rotates q [T, Hq, D] and k [T, Hkv, D], writes k and v into their pages, and returns q."""
    counts = query_start.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(counts), device=q.device), counts)
    token = torch.arange(q.shape[0], device=q.device)
    index = kv_len.long()[sequence] - query_start.long()[sequence + 1] + token
    size = k_pages.shape[2]
    page, slot = page_table[sequence, index // size].long(), index % size
    q32, k32, v32 = q.float(), k.float(), v.float()
    if rope is not None:
        table = rope[index if positions is None else positions.long()]
        q32, k32 = rotate(q32, table), rotate(k32, table)
    for rows, pages, scales in ((k32, k_pages, k_scale), (v32, v_pages, v_scale)):
        if scales is None:
            pages[page, :, slot] = rows.to(pages.dtype)
            continue
        nibbles = pages.shape[3] != q.shape[2]
        codes, step, zero = quantize_rows(rows, 4 if nibbles else 8)
        pages[page, :, slot] = pack_nibbles(codes) if nibbles else codes
        scales[page, :, :, slot] = torch.stack((step, zero), dim=-1)
    return q32.to(q.dtype).contiguous()
