"""attention and attention_dense: launches; the kernels are in attention_kernel.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from ..ops.attention_checks import APPEND, check_append_attention
from . import tuning
from .attention_kernel import attention_kernel, attention_merge_kernel
from .core import device_of, multiprocessors, next_power_of_2
from .kv_append import kv_append

# Sequences of more new tokens are not split over their keys, unless there are few tokens in all.
_DECODE_TOKENS = 8
_MAX_SPLITS = 64
_MERGED = 8  # splits at once
_INT_MAX = 2**31 - 1
# Nothing here is compared bit for bit with other kernels; Triton asks for a choice to be made.
FUSED = {"enable_fp_fusion": True}
_LOG2E = 1.4426950408889634
PRODUCTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Keys:
    """Keys and values in pages [P, Hkv, page, D], or densely as one page [Tk, Hkv, D]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    kv_len: Tensor | None  # [B], of pages
    page_table: Tensor | None  # [B, pages per sequence]
    kv_start: Tensor | None  # [B + 1], of dense keys
    heads: int
    page: int  # 0: dense
    most: int  # keys of a sequence


@dataclass(frozen=True)
class Options:
    scale: float
    causal: bool
    window: int
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    distance_bias: Tensor | None


@dataclass(frozen=True)
class Tile:
    """Rows of queries and keys of a program, and what it is compiled with."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def product_type(query: torch.dtype, keys: torch.dtype) -> torch.dtype:
    """What the products are made in: codes are exact in float16; float16 has three bits more than
    bfloat16, which rounding a query would lose."""
    either_wide = torch.float32 in (query, keys)
    if either_wide or (keys == torch.bfloat16 and query == torch.float16):
        return torch.float32
    return torch.bfloat16 if keys == torch.bfloat16 else torch.float16


def choose_tile(
    dim: int, rows: int, product: torch.dtype, kind: str, *, decode: bool, codes: bool
) -> Tile:
    """rows: of a sequence, so far as the host knows; kind: class of GPU.

    Tiles of keys are 16 KB, as 16-bit numbers; one stage of k and v, and the next being loaded, fit
    the shared memory of every GPU since sm_80 and of AMD's (64 KB). On RDNA they are smaller.
    """
    dp = next_power_of_2(dim)
    rdna = kind == "gfx11"  # its matrix instructions take operands twice: registers are the limit
    if product == torch.float32:  # as they are without matrix instructions
        return Tile(16, max(16, min(64, 2048 // dp)), 8 if rdna else 4, 1)
    if rdna:
        most = 32 if dp > 64 else 64
        many = max(16, min(most, next_power_of_2(rows))) if decode else most
        return Tile(many, 16 if codes or dp > 64 else 32, 8, 1 if codes else 2)
    if decode:
        keys = max(16, min(64 if codes else 128, 8192 // dp))
        most = 32 if kind == "sm80" else 64  # more spill there
        few = max(16, min(most, next_power_of_2(rows), 16384 // dp))
        amd = kind == "gfx9"
        deep = codes and not amd  # bytes of codes are few: more on their way
        return Tile(few, keys, 8 if few == 64 and not amd else 4, 3 if deep else 2)
    # Registers limit these: codes are decoded in them, and sm_80 has its operands there.
    half = codes or kind == "sm80"
    keys = max(16, min(32 if half and dp > 64 else 64, 8192 // dp))
    many = max(32, min(64 if codes and kind == "gfx9" else 128, 16384 // dp))
    # Eight waves of 64 have half the registers each, and spill.
    return Tile(many, keys, 4 if kind == "gfx9" else 8, 2)


def choose_splits(programs: int, most_keys: int, at_once: int) -> int:
    """As many as run at once, of no less than 256 keys."""
    most = max(1, min(most_keys // 256, _MAX_SPLITS))
    return max(1, min(at_once // max(1, programs), most))


def _launch(
    q: Tensor, out: Tensor, query_start: Tensor, keys: Keys, options: Options,
    *, decode: bool, mixed: bool,
) -> None:  # fmt: skip
    """One kernel, over the sequences of up to _DECODE_TOKENS tokens (decode), of more, or, unless
    mixed, over all."""
    tokens, heads, dim = q.shape
    batch, group = query_start.shape[0] - 1, heads // keys.heads
    product = product_type(q.dtype, keys.k.dtype)
    # Bounds are all the host knows: tokens are taken to be spread evenly.
    each = 1 if mixed else triton.cdiv(tokens, batch)
    codes = keys.k_scale is not None
    kind = tuning.class_of(q.device)
    tile = choose_tile(dim, each * group, product, kind, decode=decode, codes=codes)
    short = decode and mixed
    of_each = triton.cdiv(_DECODE_TOKENS * group, tile.rows) if short else 0
    tiles = batch * of_each if short else tokens * group // tile.rows + batch
    splits = 1
    if decode or not mixed:
        # The small tiles of decode leave room for four programs on a multiprocessor, at least.
        busy = (batch * triton.cdiv(each * group, tile.rows) if decode else tiles) * keys.heads
        at_once = multiprocessors(q.device) * (4 if decode else 1)
        splits = choose_splits(busy, keys.most, at_once)
    # Sums of splits are kept of the tokens that tiles of short sequences have room for, or of all.
    places = batch * (of_each * tile.rows // group) if short else tokens
    reference = total = sums = None
    if splits > 1:
        reference, total = q.new_empty((2, splits, places * heads), dtype=torch.float32)
        sums = q.new_empty((splits, places * heads, dim), dtype=torch.float32)
    least_new = _DECODE_TOKENS + 1 if mixed and not decode else 0
    most_new = _DECODE_TOKENS if short else _INT_MAX
    paged = keys.page > 0
    nibbles = codes and keys.k.shape[-1] != dim
    dp = next_power_of_2(dim)
    bias = options.distance_bias
    with device_of(q):
        attention_kernel[(tiles, keys.heads, splits)](
            q, out, keys.k, keys.v, keys.k_scale, keys.v_scale,
            options.sinks, options.alibi_slopes, bias,
            query_start, keys.kv_len, keys.kv_start, keys.page_table, reference, total, sums,
            tokens, batch, keys.k.shape[0], 0 if keys.page_table is None else
            keys.page_table.shape[1], keys.most, q.stride(0), keys.k.stride(0) if paged else 0,
            keys.k_scale.stride(0) if keys.k_scale is not None else 0,
            keys.k.stride(0), keys.v.stride(0), options.scale * _LOG2E, options.softcap,
            min(options.window, _INT_MAX), 0 if bias is None else bias.shape[1] // 2,
            least_new, most_new,
            GROUP=group, D=dim, DP=dp, PAGE=keys.page, NIBBLES=nibbles, CAUSAL=options.causal,
            WINDOW=options.window > 0, SOFTCAP=options.softcap > 0, PRODUCT=PRODUCTS[product],
            BM=tile.rows, BN=tile.keys, EACH=of_each,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
        )  # fmt: skip
        if splits > 1:
            attention_merge_kernel[(places, heads)](
                out, options.sinks, query_start, reference, total, sums, tokens, splits,
                least_new, most_new, D=dim, DP=dp, TOKENS=places // batch if short else 0,
                BS=_MERGED, num_warps=1 if dp <= 128 else 4, **FUSED,
            )  # fmt: skip


def _attend(q: Tensor, out: Tensor, query_start: Tensor, keys: Keys, options: Options) -> Tensor:
    tokens, batch = q.shape[0], query_start.shape[0] - 1
    if not tokens or not batch:
        return out
    # A sequence's tokens are known on the device alone. Few in all, or on average: every sequence
    # is split over its keys, whatever it has; else each launch takes its own.
    decode_only = tokens <= _DECODE_TOKENS * batch
    mixed = not decode_only and batch > 1
    if decode_only or mixed:
        _launch(q, out, query_start, keys, options, decode=True, mixed=mixed)
    if not decode_only:
        _launch(q, out, query_start, keys, options, decode=False, mixed=mixed)
    return out


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
    options: tuple[Any, ...] = (scale, causal, window, softcap, sinks, alibi_slopes, distance_bias)
    out = registry.fake("attention")(
        q, query_start, kv_len, page_table, k_pages, v_pages, k_scale, v_scale, *options
    )
    _, heads, page, _ = k_pages.shape
    most = min(page_table.shape[1] * page, _INT_MAX)
    keys = Keys(k_pages, v_pages, k_scale, v_scale, kv_len, page_table, None, heads, page, most)
    return _attend(q, out, query_start, keys, Options(*options))


def append_attention(*args: Any) -> Tensor:
    check_append_attention(*args)
    return attention(kv_append(*args[:APPEND]), *args[5:])


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
    options: tuple[Any, ...] = (scale, causal, window, softcap, sinks, alibi_slopes, distance_bias)
    out = registry.fake("attention_dense")(q, k, v, query_start, kv_start, *options)
    keys = Keys(k, v, None, None, None, None, kv_start, k.shape[1], 0, k.shape[0])
    return _attend(q, out, query_start, keys, Options(*options))
