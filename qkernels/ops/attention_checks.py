"""Checks of attention, attention_dense, kv_append and append_attention: csrc/kv_cache.h,
attention_ops.h, kv_append_ops.h and append_attention_ops.h in Python, with the same conditions and
sentences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks

MAX_HEAD_DIM = 512
# How many arguments of append_attention are those of kv_append; q and those from index 5 on are
# attention's.
APPEND = 12
PAGE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


# ---- metadata ----


def _dense_from(op: str, name: str, tensor: Tensor, first: int) -> None:
    stride = 1
    for i in reversed(range(first, tensor.dim())):
        if tensor.shape[i] > 1 and tensor.stride(i) != stride:
            last = tensor.dim() - first
            checks.fail(
                op, f"{name} must be dense in its last {last} dimensions; call .contiguous() on it"
            )
        stride *= tensor.shape[i]


def _tokens(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 3:
        checks.fail(op, f"{name} must be [tokens, heads, head dim], got {list(tensor.shape)}")
    _dense_from(op, name, tensor, 1)


def _query(op: str, q: Tensor) -> int:
    if q.dim() != 3:
        checks.fail(op, f"q must be [tokens, heads, head dim], got {list(q.shape)}")
    dim = q.shape[2]
    if dim < 1 or dim % 16 or dim > MAX_HEAD_DIM:
        checks.fail(op, f"the head dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got {dim}")
    checks.float_type(op, "q", q.dtype)
    _tokens(op, "q", q)
    return dim


def _heads(op: str, q_heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        checks.fail(
            op, f"the heads of q ({q_heads}) must be a multiple of the KV heads ({kv_heads})"
        )


def _pages(
    op: str, dim: int, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    if k.dim() != 4:
        checks.fail(
            op, f"k_pages must be [pages, KV heads, page size, head dim], got {list(k.shape)}"
        )
    pages, kv_heads, page, stored = k.shape
    if page < 1 or page % 16:
        checks.fail(op, f"the page size must be a multiple of 16, got {page}")
    if k.dtype not in PAGE_TYPES:
        checks.fail(
            op,
            f"k_pages must be float32, float16, bfloat16 or uint8, got {checks.type_name(k.dtype)}",
        )
    integer = k.dtype == torch.uint8
    if stored != dim and not (integer and 2 * stored == dim):
        half = " (int8) or half of it (int4)" if integer else ""
        checks.fail(op, f"k_pages must have {dim} in the last dimension{half}, got {list(k.shape)}")
    if v.dtype != k.dtype:
        checks.fail(
            op, f"v_pages must be {checks.type_name(k.dtype)}, got {checks.type_name(v.dtype)}"
        )
    if v.shape != k.shape:
        checks.fail(op, f"v_pages must be {list(k.shape)}, got {list(v.shape)}")
    _dense_from(op, "k_pages", k, 1)
    _dense_from(op, "v_pages", v, 1)
    if pages > 1 and k.stride(0) != v.stride(0):
        checks.fail(op, "k_pages and v_pages must have the same stride between pages")
    if not integer:
        if k_scale is not None or v_scale is not None:
            got = checks.type_name(k.dtype)
            checks.fail(op, f"k_scale and v_scale belong to uint8 pages, and these are {got}")
        return
    if k_scale is None or v_scale is None:
        checks.fail(op, "uint8 pages need k_scale and v_scale")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.dtype != torch.float16:
            checks.fail(op, f"{name} must be float16, got {checks.type_name(scale.dtype)}")
        if tuple(scale.shape) != (pages, kv_heads, 2, page):
            checks.fail(
                op, f"{name} must be [{pages}, {kv_heads}, 2, {page}], got {list(scale.shape)}"
            )
        _dense_from(op, name, scale, 1)
    if pages > 1 and k_scale.stride(0) != v_scale.stride(0):
        checks.fail(op, "k_scale and v_scale must have the same stride between pages")


def _starts(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 1 or tensor.shape[0] < 1:
        checks.fail(op, f"{name} must be [sequences + 1], got {list(tensor.shape)}")
    checks.expect(op, name, tensor, torch.int32, [-1])


def _ragged(op: str, query_start: Tensor, kv_len: Tensor, page_table: Tensor) -> None:
    _starts(op, "query_start", query_start)
    batch = query_start.shape[0] - 1
    checks.expect(op, "kv_len", kv_len, torch.int32, [batch])
    checks.expect(op, "page_table", page_table, torch.int32, [batch, -1])


def _options(op: str, scale: float, window: int, softcap: float) -> None:
    if math.isnan(scale):
        checks.fail(op, f"scale must be a number, got {scale}")
    if window < 0:
        checks.fail(op, f"window must be 0 (off) or positive, got {window}")
    if not softcap >= 0:
        checks.fail(op, f"softcap must be 0 (off) or positive, got {softcap}")


def _score_bias(
    op: str,
    q: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    distance_bias: Tensor | None,
) -> None:
    heads = q.shape[1]
    for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if tensor is not None:
            checks.expect(op, name, tensor, torch.float32, [heads])
    if distance_bias is not None:
        checks.expect(op, "distance_bias", distance_bias, torch.float32, [heads, -1])
        if distance_bias.shape[1] % 2 == 0:
            got = list(distance_bias.shape)
            checks.fail(
                op, f"distance_bias must have an odd number of columns, 2 reach + 1, got {got}"
            )


def _keys(op: str, q: Tensor, k: Tensor, v: Tensor, shape: tuple[Any, ...]) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            got = checks.type_name(tensor.dtype)
            checks.fail(op, f"{name} must be {checks.type_name(q.dtype)} like q, got {got}")
        if tuple(tensor.shape) != shape:
            checks.fail(op, f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def check_attention(
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
    *,
    op: str = "attention",
) -> None:
    _pages(op, _query(op, q), k_pages, v_pages, k_scale, v_scale)
    _heads(op, q.shape[1], k_pages.shape[1])
    _options(op, scale, window, softcap)
    _score_bias(op, q, sinks, alibi_slopes, distance_bias)
    _ragged(op, query_start, kv_len, page_table)
    checks.same_device(
        op,
        "q",
        q.device,
        query_start=query_start,
        kv_len=kv_len,
        page_table=page_table,
        k_pages=k_pages,
        v_pages=v_pages,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        distance_bias=distance_bias,
    )


def check_attention_dense(
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
) -> None:
    op = "attention_dense"
    dim = _query(op, q)
    _tokens(op, "k", k)
    _tokens(op, "v", v)
    _keys(op, q, k, v, (k.shape[0], k.shape[1], dim))
    _heads(op, q.shape[1], k.shape[1])
    _options(op, scale, window, softcap)
    _score_bias(op, q, sinks, alibi_slopes, distance_bias)
    _starts(op, "query_start", query_start)
    _starts(op, "kv_start", kv_start)
    if kv_start.shape != query_start.shape:
        want = list(query_start.shape)
        checks.fail(op, f"kv_start must be {want} like query_start, got {list(kv_start.shape)}")
    checks.same_device(
        op,
        "q",
        q.device,
        k=k,
        v=v,
        query_start=query_start,
        kv_start=kv_start,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        distance_bias=distance_bias,
    )


def check_kv_append(
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
    *,
    op: str = "kv_append",
) -> None:
    dim = _query(op, q)
    _tokens(op, "k", k)
    _tokens(op, "v", v)
    _pages(op, dim, k_pages, v_pages, k_scale, v_scale)
    _heads(op, q.shape[1], k_pages.shape[1])
    _keys(op, q, k, v, (q.shape[0], k_pages.shape[1], dim))
    _ragged(op, query_start, kv_len, page_table)
    if rope is None and positions is not None:
        checks.fail(op, "positions need rope")
    if rope is not None:
        checks.expect(op, "rope", rope, torch.float32, [-1, -1])
        rotary = rope.shape[1]
        if rotary < 1 or rotary % 2 or rotary > dim:
            got = list(rope.shape)
            checks.fail(op, f"rope must have an even number of columns up to {dim}, got {got}")
    if positions is not None:
        checks.expect(op, "positions", positions, torch.int32, [q.shape[0]])
    checks.same_device(
        op,
        "q",
        q.device,
        k=k,
        v=v,
        rope=rope,
        positions=positions,
        query_start=query_start,
        kv_len=kv_len,
        page_table=page_table,
        k_pages=k_pages,
        v_pages=v_pages,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def check_append_attention(*args: Any) -> None:
    op = "append_attention"
    check_kv_append(*args[:APPEND], op=op)
    check_attention(args[0], *args[5:], op=op)


# ---- contents of the index tensors: only where there are any, so not in the fakes ----


def start_contents(op: str, name: str, tensor: Tensor, total: int) -> list[int]:
    start: list[int] = tensor.tolist()
    if start[0] != 0 or start[-1] != total:
        checks.fail(op, f"{name} must run from 0 to {total}, got {start[0]} to {start[-1]}")
    for b in range(len(start) - 1):
        if start[b] > start[b + 1]:
            told = f"{name}[{b}] = {start[b]}, {name}[{b + 1}] = {start[b + 1]}"
            checks.fail(op, f"{name} must not fall: {told}")
    return start


def ragged_contents(
    op: str, tokens: int, pages: Tensor, query_start: Tensor, kv_len: Tensor, page_table: Tensor
) -> None:
    start = start_contents(op, "query_start", query_start, tokens)
    count, _, size, _ = pages.shape
    for b, (length, table) in enumerate(zip(kv_len.tolist(), page_table.tolist(), strict=True)):
        new = start[b + 1] - start[b]
        if length < new:
            checks.fail(op, f"kv_len[{b}] must count the {new} new tokens too, got {length}")
        used = (length + size - 1) // size
        if used > len(table):
            had = f"page_table has {len(table)} pages per sequence"
            checks.fail(op, f"{had}, but kv_len[{b}] = {length} needs {used} pages of {size}")
        for i, page in enumerate(table[:used]):
            if not 0 <= page < count:
                checks.fail(op, f"page_table[{b}, {i}] must be a page in [0, {count}), got {page}")


def rope_contents(
    op: str, rope: Tensor | None, positions: Tensor | None, query_start: Tensor, kv_len: Tensor
) -> None:
    if rope is None:
        return
    rows = rope.shape[0]
    if positions is not None:
        for t, position in enumerate(positions.tolist()):
            if not 0 <= position < rows:
                checks.fail(
                    op, f"positions[{t}] must be in [0, {rows}), the rows of rope, got {position}"
                )
        return
    for b, (new, length) in enumerate(
        zip(query_start.diff().tolist(), kv_len.tolist(), strict=True)
    ):
        if new and length > rows:
            checks.fail(op, f"kv_len[{b}] = {length} passes the {rows} rows of rope")
