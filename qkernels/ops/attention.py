"""Attention over a paged KV cache and over dense keys, and the append that fills the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import select
from ..reference.attention import attention as _attention
from ..reference.attention import attention_dense as _attention_dense
from ..reference.attention import kv_append as _kv_append
from . import checks
from .attention_checks import (
    APPEND,
    check_append_attention,
    check_attention,
    check_attention_dense,
    check_kv_append,
    ragged_contents,
    rope_contents,
    start_contents,
)
from .registry import RAGGED, SCORE_BIAS, define

# ---- fakes and reference ----


def _empty(q: Tensor) -> Tensor:
    return q.new_empty(tuple(q.shape))


def _fake_attention(*args: Any) -> Tensor:
    check_attention(*args)
    return _empty(args[0])


def _fake_attention_dense(*args: Any) -> Tensor:
    check_attention_dense(*args)
    return _empty(args[0])


def _fake_kv_append(*args: Any) -> Tensor:
    check_kv_append(*args)
    return _empty(args[0])


def _fake_append_attention(*args: Any) -> Tensor:
    check_append_attention(*args)
    return _empty(args[0])


def _reference_attention(*args: Any) -> Tensor:
    check_attention(*args)
    q, query_start, kv_len, page_table, k_pages = args[:5]
    ragged_contents("attention", q.shape[0], k_pages, query_start, kv_len, page_table)
    return _attention(*args)


def _reference_attention_dense(*args: Any) -> Tensor:
    check_attention_dense(*args)
    q, k, _, query_start, kv_start = args[:5]
    start_contents("attention_dense", "query_start", query_start, q.shape[0])
    start_contents("attention_dense", "kv_start", kv_start, k.shape[0])
    return _attention_dense(*args)


def _append_contents(op: str, *args: Any) -> None:
    q, _, _, rope, positions, query_start, kv_len, page_table, k_pages = args[:9]
    ragged_contents(op, q.shape[0], k_pages, query_start, kv_len, page_table)
    rope_contents(op, rope, positions, query_start, kv_len)


def _reference_kv_append(*args: Any) -> Tensor:
    check_kv_append(*args)
    _append_contents("kv_append", *args)
    return _kv_append(*args)


def _reference_append_attention(*args: Any) -> Tensor:
    check_append_attention(*args)
    _append_contents("append_attention", *args)
    return _attention(_kv_append(*args[:APPEND]), *args[5:])


define(
    "attention",
    f"(Tensor q, {RAGGED}, Tensor k_pages, Tensor v_pages, Tensor? k_scale, Tensor? v_scale, "
    f"float scale, bool causal, int window, float softcap, {SCORE_BIAS}) -> Tensor",
    fake=_fake_attention,
    reference=_reference_attention,
)
define(
    "attention_dense",
    "(Tensor q, Tensor k, Tensor v, Tensor query_start, Tensor kv_start, "
    f"float scale, bool causal, int window, float softcap, {SCORE_BIAS}) -> Tensor",
    fake=_fake_attention_dense,
    reference=_reference_attention_dense,
)
define(
    "kv_append",
    f"(Tensor q, Tensor k, Tensor v, Tensor? rope, Tensor? positions, {RAGGED}, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> Tensor",
    fake=_fake_kv_append,
    reference=_reference_kv_append,
)
define(
    "append_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? rope, Tensor? positions, {RAGGED}, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    f"float scale, bool causal, int window, float softcap, {SCORE_BIAS}) -> Tensor",
    fake=_fake_append_attention,
    reference=_reference_append_attention,
)


# ---- the typed functions ----


def _default_scale(q: Tensor) -> float:
    # Of a q without columns, which the op refuses, any.
    return float(q.shape[-1]) ** -0.5 if q.dim() and q.shape[-1] else 1.0


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def attention(
    q: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    page_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a ragged batch over a paged KV cache: prefill, chunked prefill and
    decode alike.

    q [T, Hq, D] float32, float16 or bfloat16, tokens any stride apart, D a multiple of 16 up to
    512; query_start [B + 1], kv_len [B] and page_table [B, pages per sequence] int32: sequence b
    owns the tokens query_start[b] to query_start[b + 1], which are the last ones of its kv_len[b]
    keys; key t lies in slot t % page of page page_table[b, t // page]. k_pages, v_pages [P, Hkv,
    page, D] float32, float16, bfloat16 or uint8 (int8 codes; with D / 2 in the last dimension,
    int4), page a multiple of 16, Hq a multiple of Hkv; k_scale, v_scale [P, Hkv, 2, page] float16,
    scales and zero points, for uint8 pages only.

    scale multiplies q . k (default D ** -0.5). causal: a query sees no later keys. window > 0: it
    sees only the last `window` positions up to its own (and, when not causal, all later ones).
    softcap > 0: scores become softcap * tanh(score / softcap). A query that sees no key gives
    zeros.

    What scores take after that, all float32 and by query head: alibi_slopes [Hq], a score loses
    slope * |query - key| (their positions); distance_bias [Hq, 2 reach + 1], it gains the entry at
    clamp(key - query, -reach, reach) + reach. sinks [Hq] are the scores of one key more, which has
    no value: it takes its share of the softmax. `ops/position_bias.py` makes the slopes of ALiBi
    and the biases of T5.

    Returns [T, Hq, D] in q's dtype. Raises RuntimeError for wrong shapes, dtypes, devices and
    strides, for a gradient, and on the CPU for indices out of range; on a GPU, which would have to
    be waited for, keys whose page is out of range count as not there.
    """
    scale = _default_scale(q) if scale is None else scale
    checks.no_gradient("attention", *_given(q, sinks, alibi_slopes, distance_bias))
    op = select("attention", q.device)
    out: Tensor = op(
        q,
        query_start,
        kv_len,
        page_table,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
        scale,
        causal,
        window,
        softcap,
        sinks,
        alibi_slopes,
        distance_bias,
    )
    return out


def attention_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    kv_start: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention without a cache, for encoders and cross attention.

    q [Tq, Hq, D], k and v [Tk, Hkv, D], all float32, float16 or bfloat16, tokens any stride apart;
    query_start and kv_start [B + 1] int32: sequence b owns these ranges of q and of k and v.
    Positions are aligned at the end: query i of n stands at key m - n + i of m. The options, biases
    and errors are those of `attention`. Returns [Tq, Hq, D] in q's dtype.
    """
    scale = _default_scale(q) if scale is None else scale
    checks.no_gradient("attention_dense", *_given(q, k, v, sinks, alibi_slopes, distance_bias))
    op = select("attention_dense", q.device)
    out: Tensor = op(
        q,
        k,
        v,
        query_start,
        kv_start,
        scale,
        causal,
        window,
        softcap,
        sinks,
        alibi_slopes,
        distance_bias,
    )
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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Rotates q and k, quantizes k and v where the pages are integers, and writes them into their
    pages.

    q [T, Hq, D], k and v [T, Hkv, D] of one float dtype, tokens any stride apart; rope [positions,
    rotary_dim] float32, cosines then sines (`rope_table`), or None; positions [T] int32, rows of
    rope, or None: the token's place in its sequence. query_start, kv_len (which counts the new
    tokens too), page_table and pages as in `attention`. The pairs (i, i + rotary_dim / 2) are
    turned in float32; dims from rotary_dim on are left. Integer pages hold x ~= scale * (code -
    zero), one scale (float16, rounded up) and zero point per token and head, the range including 0.

    Writes the pages (and scales) in place; returns the rotated q [T, Hq, D] in its dtype,
    contiguous. Raises RuntimeError for wrong shapes, dtypes, devices and strides, for a gradient,
    and on the CPU for indices out of range; nothing is written then. A GPU does not look ahead:
    tokens whose page is out of range are left out, positions beyond rope turn by NaN.
    """
    checks.no_gradient("kv_append", q, k, v)
    op = select("kv_append", q.device)
    out: Tensor = op(
        q,
        k,
        v,
        rope,
        positions,
        query_start,
        kv_len,
        page_table,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
    )
    return out


def append_attention(
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
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """`kv_append`, and `attention` of the rotated q over the cache that now has k and v: the same
    bits in one call, for hosts to whom a call costs as much as a kernel.

    Arguments are those of `kv_append`, then the options of `attention`. Writes the pages (and
    scales) in place; returns the attention's result, [T, Hq, D] in q's dtype. Raises RuntimeError
    as the two do; nothing is written where an argument is refused.
    """
    scale = _default_scale(q) if scale is None else scale
    checks.no_gradient("append_attention", *_given(q, k, v, sinks, alibi_slopes, distance_bias))
    op = select("append_attention", q.device)
    out: Tensor = op(
        q,
        k,
        v,
        rope,
        positions,
        query_start,
        kv_len,
        page_table,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
        scale,
        causal,
        window,
        softcap,
        sinks,
        alibi_slopes,
        distance_bias,
    )
    return out
