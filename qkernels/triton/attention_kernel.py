"""Device side of attention: one kernel for prefill and decode, and one that merges splits.

A program takes BM query rows of one sequence and KV head (a row is a token and one of the GROUP
heads of q that share the KV head; the heads of a token lie side by side), and goes through the
keys that they see, BN at a time:

    scores [BM, BN] = q [BM, D] k^T [D, BN]        acc [BM, D] += weights [BM, BN] v [BN, D]

Weights are 2^(score - reference), where the reference of a row is 14 below its greatest score so
far: up to 2^14, they fit float16 (2^16), in which those of 2^-28 of the greatest are still normal.

Codes of int8 and int4 pages enter products of 16 bits as they are, less 128 or 8, exactly; for
k' = code - offset and zero' = zero - offset

    score = k_scale (q . k' - zero' sum(q))        out = sum(p v_scale v') - sum(p v_scale zero')

p v_scale is divided by `top`, a power of two above the v_scales so far, to stay in float16; the
second sum takes the rounded products, so that the error of a weight is relative to |v|. Products
of float32 take k_scale (code - zero), and code - zero with weights p v_scale.

Lengths and starts come from device memory, unchecked. Whatever they hold, nothing is read out of
bounds: tokens are taken within [0, T], keys within the width of the page table (or the dense
keys), and a key whose page is out of range counts as not there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .core import matmul, narrow

LOG2E = tl.constexpr(1.4426950408889634)  # scores are kept times this, for exp2
LOWEST = tl.constexpr(-3.402823466e38)
HEADROOM = tl.constexpr(14.0)  # of the greatest weight, in powers of two
SEARCHED = tl.constexpr(256)  # sequences looked at in one step

# Lengths that change from call to call: a kernel for each of their divisors would be no faster.
RUNTIME = [
    "tokens", "batch", "pages", "table_width", "most_keys", "window", "reach", "least_new",
    "most_new",
]  # fmt: skip


@triton.jit
def first_tile(start, i, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The first tile of sequence i, which starts at token `start`: there are at least as many up to
    the next one's as it needs, found without a sum over the sequences before it."""
    return start.to(tl.int64) * GROUP // ROWS + i


@triton.jit
def sequence_of_tile(query_start, batch, tile, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The last sequence whose first tile is `tile` or one before it."""
    found = 0
    for i0 in range(0, batch, SEARCHED):
        i = i0 + tl.arange(0, SEARCHED)
        there = i < batch
        start = tl.load(query_start + i, there, 0)
        before = there & (first_tile(start, i, GROUP, ROWS) <= tile)
        found += tl.sum(before.to(tl.int32), axis=0)
    return tl.maximum(found - 1, 0)


@triton.jit
def tokens_of(query_start, b, tokens):
    """(first token, tokens) of sequence b, within [0, tokens]."""
    first = tl.minimum(tl.maximum(tl.load(query_start + b), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(query_start + b + 1), first), tokens)
    return first.to(tl.int64), end - first


@triton.jit
def seen_keys(position, present, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The keys [first, last) that queries at these positions (int64) see, of `present`."""
    first = position * 0
    last = first + present
    if CAUSAL:
        last = tl.maximum(tl.minimum(position + 1, last), 0)
    if WINDOW:
        first = tl.maximum(tl.minimum(position - window + 1, present), 0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def load_query(at, valid, scale, D: tl.constexpr, DP: tl.constexpr, PRODUCT: tl.constexpr):
    """Rows `at` [BM] of q, as operands [BM, DP], and the factor [BM] of their scores.

    bfloat16 goes into float16 times the power of two that brings the greatest of a row to 2^13:
    what is below 2^-38 of it is lost.
    """
    d = tl.arange(0, DP)
    x = tl.load(at[:, None] + d[None, :], valid[:, None] & (d < D)[None, :], 0.0)
    factor = tl.full((at.shape[0],), 1.0, tl.float32) * scale
    if x.dtype == tl.bfloat16 and tl.float16 == PRODUCT:
        wide = x.to(tl.float32)
        exponent = tl.max(tl.abs(wide), axis=1).to(tl.int32, bitcast=True) >> 23
        shift = tl.minimum(140 - exponent, 126)  # 13 - (exponent - 127)
        shift = tl.where((exponent > 0) & (exponent < 255), shift, 0)
        x = wide * ((127 + shift) << 23).to(tl.float32, bitcast=True)[:, None]
        factor *= ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return x.to(PRODUCT), factor


@triton.jit
def bend(s, slope, bias_row, distance, softcap, reach, SOFTCAP: tl.constexpr):
    """What softcap, ALiBi and the bias by distance make of scores [BM, BN].

    slope [BM] or None, times log2(e); bias_row [BM], where the distances of the row's head start,
    or None; distance [BM, BN]: key - position.
    """
    if SOFTCAP:
        # tanh |x| = (1 - t) / (1 + t) with t = e^(-2 |x|); the sign is put back.
        cap = softcap * LOG2E
        x = s / cap
        t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        y = (1.0 - t) / (1.0 + t)
        s = cap * tl.where(x < 0, -y, y)
    if slope is not None:
        s -= slope[:, None] * tl.abs(distance).to(tl.float32)
    if bias_row is not None:
        at = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        s += tl.load(bias_row[:, None] + at) * LOG2E
    return s


@triton.jit
def load_rows(
    at, there, NIBBLES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRODUCT: tl.constexpr
):
    """Rows `at` [BN] of keys or values as [BN, DP], zero where they are not there.

    Codes become code - 128 or code - 8 in float16, code in float32. In float16, 0x6400 is 1024:
    OR-ing a code into its mantissa gives 1024 + code.
    """
    BN: tl.constexpr = at.shape[0]
    BYTES: tl.constexpr = DP // 2 if NIBBLES else DP
    USED: tl.constexpr = D // 2 if NIBBLES else D
    d = tl.arange(0, BYTES)
    x = tl.load(at[:, None] + d[None, :], there[:, None] & (d < USED)[None, :], 0)
    if NIBBLES:  # each run of 8 bytes holds 16 dims, the first 8 in the low nibbles
        x = tl.reshape(x, (BN, DP // 16, 8))
        x = tl.permute(tl.join(x & 15, x >> 4), (0, 1, 3, 2))
        x = tl.reshape(x, (BN, DP))
    if x.dtype == tl.uint8 and tl.float16 == PRODUCT:
        x = (x.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1032 if NIBBLES else 1152)
    return x.to(PRODUCT)


@triton.jit
def load_scales(at, there, PAGE: tl.constexpr):
    """(scale, zero point) [BN] float32; the scale is zero where the key is not there."""
    return (
        tl.load(at, there, 0.0).to(tl.float32),
        tl.load(at + PAGE, there, 0.0).to(tl.float32),
    )


@triton.jit
def attend_keys(
    begin, end, x, factor, x_sum, first, last, position, slope, bias_row,
    reference, total, zeros, top, acc,
    k, v, k_scale, v_scale, table, pages, page_stride, scale_stride, k_stride, v_stride,
    softcap, reach,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, NIBBLES: tl.constexpr,
    SOFTCAP: tl.constexpr, PRODUCT: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Goes through the keys [begin, end), begin a multiple of BN.

    x [BM, DP]: q; k, v, k_scale, v_scale: those of the KV head. reference, total [BM] and acc
    [BM, DP]: the online softmax; zeros [BM], top: of codes. Without MASKED, every row sees all the
    keys. Returns the five after these keys.
    """
    SCALED: tl.constexpr = k_scale is not None
    OF_CODES: tl.constexpr = SCALED and tl.float32 != PRODUCT  # the scales stay outside
    OFFSET: tl.constexpr = 8 if NIBBLES else 128
    for key0 in range(begin, end, BN):
        key = key0 + tl.arange(0, BN)
        there = key < end
        if PAGE == 0:  # dense keys
            k_at = k + key.to(tl.int64) * k_stride
            v_at = v + key.to(tl.int64) * v_stride
        else:
            if PAGE % BN == 0:  # all in one page
                page = tl.load(table + key0 // PAGE).to(tl.int64)
                slot = key0 % PAGE + tl.arange(0, BN)
                there = key < tl.where((page >= 0) & (page < pages), end, key0)
            else:
                page = tl.load(table + key // PAGE, there, -1).to(tl.int64)
                slot = key % PAGE
                there = there & (page >= 0) & (page < pages)
            STORED: tl.constexpr = D // 2 if NIBBLES else D
            k_at = k + page * page_stride + slot * STORED
            v_at = v + page * page_stride + slot * STORED
        y = load_rows(k_at, there, NIBBLES, D, DP, PRODUCT)
        if SCALED:
            ks, kz = load_scales(k_scale + page * scale_stride + slot, there, PAGE)
            vs, vz = load_scales(v_scale + page * scale_stride + slot, there, PAGE)
            if not OF_CODES:
                y = ks[:, None] * (y - kz[:, None])
        s = matmul(x, tl.trans(y))
        if OF_CODES:
            s = (s - x_sum[:, None] * (kz - OFFSET)[None, :]) * ks[None, :]
        s *= factor[:, None]
        distance = key[None, :] - position[:, None]
        s = bend(s, slope, bias_row, distance, softcap, reach, SOFTCAP)
        if MASKED:
            seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
            seen = seen & there[None, :]
            s = tl.where(seen, s, float("-inf"))
        elif PAGE != 0:
            s = tl.where(there[None, :], s, float("-inf"))

        raised = tl.maximum(reference, tl.max(s, axis=1) - HEADROOM)
        drop = tl.exp2(reference - raised)
        reference = raised
        p = tl.exp2(s - reference[:, None])
        total = total * drop + tl.sum(p, axis=1)
        y = load_rows(v_at, there, NIBBLES, D, DP, PRODUCT)
        if OF_CODES:
            most = tl.max(tl.where(vs == vs, vs, 0.0), axis=0)
            bits = (most.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000  # 2^n >= most
            above = tl.maximum(top, bits.to(tl.float32, bitcast=True))
            inverse = ((254 << 23) - above.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
            inverse = tl.where(above > 0, inverse, 0.0)
            drop *= top * inverse
            top = above
            vs *= inverse
        if SCALED:
            p *= vs[None, :]
            if MASKED:  # a scale that is NaN is that of who sees it
                p = tl.where(seen, p, 0.0)
            if not OF_CODES:
                y -= vz[:, None]
        weights = narrow(p, PRODUCT)
        if OF_CODES:
            rounded = weights.to(tl.float32)
            zeros = zeros * drop + tl.sum(rounded * (vz - OFFSET)[None, :], axis=1)
        acc = matmul(weights, y, acc * drop[:, None])
    return reference, total, zeros, top, acc


@triton.jit(do_not_specialize=RUNTIME)
def attention_kernel(
    q, out, k, v, k_scale, v_scale, sinks, alibi_slopes, distance_bias,
    query_start, kv_len, kv_start, page_table, part_reference, part_total, part_sum,
    tokens, batch, pages, table_width, most_keys, q_stride, page_stride, scale_stride,
    k_stride, v_stride, scale, softcap, window, reach, least_new, most_new,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    NIBBLES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRODUCT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of rows, KV heads, splits of the keys].

    q, out [T, Hq, D], tokens of q q_stride elements apart; k, v and the scales as in pages
    [P, Hkv, PAGE, D] and [P, Hkv, 2, PAGE], pages page_stride and scale_stride elements apart; or,
    with PAGE = 0, k, v [most_keys, Hkv, D], tokens k_stride and v_stride apart. query_start,
    kv_start [B + 1], kv_len [B], page_table [B, table_width]; kv_len and page_table, or kv_start.
    scale: times log2(e).

    It takes the sequences of least_new to most_new tokens. EACH > 0: every sequence has EACH tiles;
    else sequence b has those from query_start[b] * GROUP / BM + b on. With part_sum, sums go to
    part_reference, part_total [splits, R], part_sum [splits, R, D], where a row is (token, head) of
    the EACH * BM / GROUP first tokens of every sequence, or of all tokens if EACH is 0.
    """
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    split, splits = tl.program_id(2), tl.num_programs(2)
    # The last tiles see most keys under a causal mask: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if EACH > 0:
        b = tile // EACH
        row0 = (tile % EACH).to(tl.int64) * BM
    else:
        b = sequence_of_tile(query_start, batch, tile, GROUP, BM)
        row0 = (tile - first_tile(tl.load(query_start + b), b, GROUP, BM)) * BM
    token0, count = tokens_of(query_start, b, tokens)
    if (count < least_new) | (count > most_new) | (row0 < 0) | (row0 >= count.to(tl.int64) * GROUP):
        return

    if PAGE == 0:
        key0 = tl.minimum(tl.maximum(tl.load(kv_start + b), 0), most_keys).to(tl.int64)
        present = tl.minimum(tl.load(kv_start + b + 1), most_keys) - key0
        length = tl.maximum(present, 0)
        present = length
        k += key0 * k_stride + kv_head * D
        v += key0 * v_stride + kv_head * D
        table = page_table
    else:
        length = tl.load(kv_len + b).to(tl.int64)
        present = tl.maximum(tl.minimum(length, most_keys), 0)
        STORED: tl.constexpr = D // 2 if NIBBLES else D
        k += kv_head.to(tl.int64) * PAGE * STORED
        v += kv_head.to(tl.int64) * PAGE * STORED
        if k_scale is not None:
            k_scale += kv_head * 2 * PAGE
            v_scale += kv_head * 2 * PAGE
        table = page_table + b.to(tl.int64) * table_width

    row = row0.to(tl.int32) + tl.arange(0, BM)
    valid = row < count * GROUP
    # Rows beyond the last see what it sees, and are not stored.
    token = tl.minimum(row // GROUP, count - 1)
    head = kv_head * GROUP + row % GROUP
    position = length - count + token
    first, last = seen_keys(position, present, window, CAUSAL, WINDOW)
    lowest = length - count + row0 // GROUP
    highest = length - count + tl.minimum((row0 + BM - 1) // GROUP, count - 1)
    begin, all_see_to = seen_keys(lowest, present, window, CAUSAL, WINDOW)
    _, end = seen_keys(highest, present, window, CAUSAL, WINDOW)
    # This split's: an equal part of what there is, whole tiles.
    begin = begin // BN * BN
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BN), splits) * BN
    begin += split * part
    end = tl.minimum(end, begin + part)
    masked = begin if WINDOW else tl.maximum(begin, tl.minimum(all_see_to, end) // BN * BN)

    q_rows = q + (token0 + token) * q_stride + head * D
    x, factor = load_query(q_rows, valid, scale, D, DP, PRODUCT)
    x_sum = tl.sum(x.to(tl.float32), axis=1)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head) * LOG2E
    bias_row = None
    if distance_bias is not None:
        bias_row = distance_bias + head.to(tl.int64) * (2 * reach + 1)
    near = tl.maximum(position, -(1 << 30)).to(tl.int32)  # distances fit int32, whatever kv_len is

    reference = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    zeros = tl.zeros((BM,), tl.float32)
    top = tl.max(zeros, axis=0)
    acc = tl.zeros((BM, DP), tl.float32)
    if not WINDOW:
        reference, total, zeros, top, acc = attend_keys(
            begin, masked, x, factor, x_sum, first, last, near, slope, bias_row,
            reference, total, zeros, top, acc,
            k, v, k_scale, v_scale, table, pages, page_stride, scale_stride, k_stride, v_stride,
            softcap, reach, D, DP, PAGE, NIBBLES, SOFTCAP, PRODUCT, BN, False,
        )  # fmt: skip
    reference, total, zeros, top, acc = attend_keys(
        masked, end, x, factor, x_sum, first, last, near, slope, bias_row,
        reference, total, zeros, top, acc,
        k, v, k_scale, v_scale, table, pages, page_stride, scale_stride, k_stride, v_stride,
        softcap, reach, D, DP, PAGE, NIBBLES, SOFTCAP, PRODUCT, BN, True,
    )  # fmt: skip
    if k_scale is not None and tl.float32 != PRODUCT:
        acc = (acc - zeros[:, None]) * top

    d = tl.arange(0, DP)
    inside = valid[:, None] & (d < D)[None, :]
    if part_sum is not None:
        TOKENS: tl.constexpr = EACH * BM // GROUP  # of a sequence
        if EACH > 0:
            rows = (tl.num_programs(0) // EACH).to(tl.int64) * TOKENS * kv_heads * GROUP
            at = (b * TOKENS + token).to(tl.int64)
        else:
            rows = tokens.to(tl.int64) * kv_heads * GROUP
            at = token0 + token
        at = split * rows + at * kv_heads * GROUP + head
        tl.store(part_reference + at, reference, valid)
        tl.store(part_total + at, total, valid)
        tl.store(part_sum + at[:, None] * D + d[None, :], acc, inside)
        return
    acc = finish(acc, reference, total, sinks, head)
    at = ((token0 + token) * kv_heads * GROUP + head) * D
    tl.store(out + at[:, None] + d[None, :], narrow(acc, out.dtype.element_ty), inside)


@triton.jit
def finish(acc, reference, total, sinks, head):
    """acc [R, DP] over all weights [R] and the sink of heads [R], a key that has no value."""
    l = total
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        most = tl.maximum(sink, reference)
        l = total * tl.exp2(reference - most) + tl.exp2(sink - most)
        acc = acc * tl.exp2(reference - most)[:, None]
    return tl.where((total == 0.0)[:, None], 0.0, acc / l[:, None])


@triton.jit(do_not_specialize=["tokens", "splits", "least_new", "most_new"])
def attention_merge_kernel(
    out, sinks, query_start, part_reference, part_total, part_sum, tokens, splits, least_new,
    most_new, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Adds splits up, BS at a time, in their order; grid [rows' tokens, heads of q].

    part_reference, part_total [splits, R], part_sum [splits, R, D], where R is (token, head) of the
    TOKENS first tokens of every sequence, or of all tokens if TOKENS is 0.
    """
    place, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    token = place
    if TOKENS > 0:
        first, count = tokens_of(query_start, place // TOKENS, tokens)
        token = first + place % TOKENS
        taken = (count >= least_new) & (count <= most_new) & (place % TOKENS < count)
        if not taken:
            return
    rows = tl.num_programs(0).to(tl.int64) * heads
    d = tl.arange(0, DP)
    reference = tl.full((1,), LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, DP), tl.float32)
    for i0 in range(0, splits, BS):
        i = i0 + tl.arange(0, BS)
        at = i * rows + place * heads + head
        of_split = tl.load(part_reference + at, i < splits, LOWEST)
        raised = tl.maximum(reference, tl.max(of_split, axis=0))
        drop, share = tl.exp2(reference - raised), tl.exp2(of_split - raised)
        reference = raised
        total = total * drop + tl.sum(tl.load(part_total + at, i < splits, 0.0) * share, axis=0)
        inside = (i < splits)[:, None] & (d < D)[None, :]
        sums = tl.load(part_sum + at[:, None] * D + d[None, :], inside, 0.0)
        acc = acc * drop[:, None] + tl.sum(sums * share[:, None], axis=0)[None, :]
    acc = finish(acc, reference, total, sinks, head + tl.zeros((1,), tl.int32))
    at = (token * heads + head) * D + d[None, :]
    tl.store(out + at, narrow(acc, out.dtype.element_ty), (d < D)[None, :])
