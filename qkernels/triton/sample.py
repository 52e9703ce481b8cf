"""sample: bit for bit the token of the reference, whose rules stand in reference/sample.py.

A program per row reads it from L2 in tiles: for the largest logit (all that greedy needs), for the
weights, and for the sum of what the filters leave. All masses are integers, so that no sum depends
on its order.

A filter keeps a logit while the mass above it stays below a limit. The smallest key that is kept
lies in a bracket (lo, hi]; passes over the row narrow it by a few pivots at a time until its logits
fit a list, and bisection ends in the list. top-k counts, top-p adds weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, device_of, next_power_of_2, round_even

_BLOCK = 4096  # logits of a tile
_LIST = 4096  # logits of a bracket that are listed
_PIVOTS = 4
_WARPS = 16


@triton.jit
def key_of(v):
    """Integers in the order of the floats, -0 equal to 0."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    return (key ^ (key >> 31 & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_exp(l, top, temperature):
    """exp((l - top) / temperature), by the float32 operations of the rules, none of them fused."""
    d = tl.where(l == top, 0.0, tl.div_rn(l - top, temperature))
    x = tl.where(d > -29.0, d, -29.0)
    n = round_even(x * 1.44269504)
    r = x - n * 0.693145751953125  # ln 2 to 16 bits: the product is exact
    r = r - n * 1.42860677e-6
    p = r * 1.3888889e-3 + 8.3333333e-3
    p = p * r + 4.1666667e-2
    p = p * r + 1.6666667e-1
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(d < -29.0, 0.0, p * power)


@triton.jit
def weight_of(e):
    """round half to even (e * 2^40), int64. From 2^23 on all floats are integers."""
    v = e * 1099511627776.0
    return tl.where(v < 8388608.0, (v + 8388608.0) - 8388608.0, v).to(tl.int64)


@triton.jit
def masses(e, at, there, COUNTS: tl.constexpr):
    """What a filter adds up of some logits, int64: ones, or their weights; zero if not there."""
    if COUNTS:
        return there.to(tl.int64)
    else:
        return weight_of(tl.load(e + at, there, 0.0))


@triton.jit
def threshold(
    row, e, listed, listed_e, vocab, count, floor, top, least, limit,
    COUNTS: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The smallest key of those from `floor` on above which there is less than `limit` (float64, at
    least 0.5: what has nothing above it is always kept). Above all that is less, all are too many.

    row, e [V]: logits and their exponentials; listed, listed_e [LIST]: scratch; count: how many
    there are from `floor` on, or more; top, least: the largest logit, and a value from which on
    most that counts is found.
    """
    lane, i = tl.arange(0, BLOCK), tl.arange(0, P)
    lo, hi = floor.to(tl.int64) - 1, key_of(top).to(tl.int64)  # not kept, kept
    low, high = least, top  # their values, from which pivots are found
    over_lo, over_hi = 0 * hi + count, 0 * hi  # how many are above lo and hi
    mass_hi = 0 * hi  # the mass above hi
    while (over_lo - over_hi > LIST) & (hi - lo > 1):
        # Equal steps of the values, and the middle of the keys, which alone halves the bracket.
        pivot = key_of(high - (high - low) * (i.to(tl.float32) / P)).to(tl.int64)
        pivot = tl.where(i == 0, lo + hi >> 1, pivot)
        pivot = tl.minimum(tl.maximum(pivot, lo + 1), hi - 1)
        mass = tl.zeros((P,), tl.int64)
        over = tl.zeros((P,), tl.int64)
        for at in range(0, vocab, BLOCK):
            key = key_of(tl.load(row + at + lane, at + lane < vocab, 0.0))
            there = (at + lane < vocab) & (key >= floor)
            above = there[None, :] & (key.to(tl.int64)[None, :] > pivot[:, None])
            of = masses(e, at + lane, there, COUNTS)
            mass += tl.sum(tl.where(above, of[None, :], 0), axis=1)
            over += tl.sum(above.to(tl.int32), axis=1).to(tl.int64)
        kept = mass.to(tl.float64) < limit
        hi = tl.min(tl.where(kept, pivot, hi), axis=0)
        mass_hi = tl.max(tl.where(kept, mass, mass_hi), axis=0)
        over_hi = tl.max(tl.where(kept, over, over_hi), axis=0)
        high = key_value(hi.to(tl.int32))
        above_lo = tl.max(tl.where(kept, lo, pivot), axis=0)
        low = tl.where(above_lo > lo, key_value(above_lo.to(tl.int32)), low)
        lo = above_lo
        over_lo = tl.min(tl.where(kept, over_lo, over), axis=0)
    if hi - lo > 1:
        count = 0
        for at in range(0, vocab, BLOCK):
            there = at + lane < vocab
            l = tl.load(row + at + lane, there, 0.0)
            key = key_of(l).to(tl.int64)
            there = there & (key > lo) & (key <= hi)
            place = count + tl.cumsum(there.to(tl.int32), axis=0) - 1
            tl.store(listed + place, l, there)
            if not COUNTS:
                tl.store(listed_e + place, tl.load(e + at + lane, there, 0.0), there)
            count += tl.sum(there.to(tl.int32), axis=0)
        tl.debug_barrier()
        at = tl.arange(0, LIST)
        key = key_of(tl.load(listed + at, at < count, 0.0)).to(tl.int64)
        of = masses(listed_e, at, at < count, COUNTS)
        while hi - lo > 1:
            middle = lo + hi >> 1
            mass = mass_hi + tl.sum(tl.where(key > middle, of, 0), axis=0)
            kept = mass.to(tl.float64) < limit
            hi = tl.where(kept, middle, hi)
            lo = tl.where(kept, lo, middle)
        tl.debug_barrier()  # the list is free again
    return hi.to(tl.int32)


@triton.jit
def draw(
    row, e, listed, listed_e, vocab, count, top, least, first, temperature, top_k, top_p, min_p,
    seed, offset, BLOCK: tl.constexpr, LIST: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token of a row whose temperature is not 0; `first` where nothing has a weight.

    count: logits that are not -inf, which has no weight: the least of them is the floor of every
    search.
    """
    lane, tile = tl.arange(0, BLOCK), tl.arange(0, TILES)
    floor = key_of(least)
    if (top_k > 0) & (top_k < count):
        limit = top_k.to(tl.float64)
        floor = threshold(
            row, e, listed, listed_e, vocab, count, floor, top, least, limit, True, BLOCK, LIST, P
        )
    weight = tl.zeros((BLOCK,), tl.int64)
    for at in range(0, vocab, BLOCK):
        there = at + lane < vocab
        l = tl.load(row + at + lane, there, 0.0)
        v = tl.where(there & (key_of(l) >= floor), weight_exp(l, top, temperature), 0.0)
        tl.store(e + at + lane, v, there)
        weight += weight_of(v)
    tl.debug_barrier()
    if top_p < 1.0:
        limit = top_p.to(tl.float64) * tl.sum(weight, axis=0).to(tl.float64)
        limit = tl.where(limit >= 0.5, limit, 0.5)
        weighs = top - 29.0 * temperature  # what is below has no weight
        least = tl.where(weighs > least, weighs, least)
        floor = threshold(
            row, e, listed, listed_e, vocab, count, floor, top, least, limit, False, BLOCK, LIST, P
        )
    of_tile = tl.zeros((TILES,), tl.int64)
    for at in range(0, vocab, BLOCK):
        there = at + lane < vocab
        v = tl.load(e + at + lane, there, 0.0)
        l = tl.load(row + at + lane, there, 0.0)
        weight = tl.where((key_of(l) >= floor) & (v >= min_p), weight_of(v), 0)
        of_tile = tl.where(tile == at // BLOCK, tl.sum(weight, axis=0), of_tile)
    total = tl.sum(of_tile, axis=0)
    zero = (offset * 0).to(tl.uint32)
    u0, u1, _, _ = tl.philox(
        seed, offset.to(tl.uint32), (offset.to(tl.uint64) >> 32).to(tl.uint32), zero, zero
    )
    u = u1.to(tl.uint64) << 32 | u0.to(tl.uint64)
    left = tl.umulhi(u, total.to(tl.uint64)).to(tl.int64)  # floor(u * total / 2^64)
    # The first tile up to which there is more than `left`, then the first of its logits.
    chosen = tl.sum((tl.cumsum(of_tile, axis=0) <= left).to(tl.int32), axis=0)
    left -= tl.sum(tl.where(tile < chosen, of_tile, 0), axis=0)
    at = tl.minimum(chosen, (vocab - 1) // BLOCK) * BLOCK
    there = at + lane < vocab
    v = tl.load(e + at + lane, there, 0.0)
    l = tl.load(row + at + lane, there, 0.0)
    weight = tl.where((key_of(l) >= floor) & (v >= min_p), weight_of(v), 0)
    token = at + tl.sum((tl.cumsum(weight, axis=0) <= left).to(tl.int32), axis=0)
    return tl.where((total > 0) & (token < vocab), token, first)


@triton.jit
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seed, offset, e, listed, listed_e, out, vocab, stride,
    BLOCK: tl.constexpr, LIST: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """logits [B, V], settings [B] -> out [B] int64; grid [B]. Scratch, float32: e [B, V]; listed,
    listed_e [B, LIST]."""
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * stride
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)  # but for -inf
    first = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)  # column of `most`
    nan, count = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for at in range(0, vocab, BLOCK):
        l = tl.load(row + at + lane, at + lane < vocab, float("-inf"))
        nan = tl.where(l != l, 1, nan)
        count += (l > float("-inf")).to(tl.int32)
        least = tl.where((l < least) & (l > float("-inf")), l, least)
        first = tl.where(l > most, at + lane, first)
        most = tl.where(l > most, l, most)
    top = tl.max(most, axis=0)
    token = tl.min(tl.where(most == top, first, 0x7FFFFFFF), axis=0)
    is_nan, empty = tl.max(nan, axis=0) > 0, top == float("-inf")
    t = tl.load(temperature + b)
    if (t != 0.0) & (is_nan == 0) & (empty == 0):
        token = draw(
            row, e + b * vocab, listed + b * LIST, listed_e + b * LIST, vocab,
            tl.sum(count, axis=0), top, tl.min(least, axis=0), token, t, tl.load(top_k + b),
            tl.load(top_p + b), tl.load(min_p + b), tl.load(seed + b), tl.load(offset + b),
            BLOCK, LIST, P, TILES,
        )  # fmt: skip
    tl.store(out + b, tl.where(is_nan, -1, tl.where(empty, -2, token)).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    out: Tensor = registry.fake("sample")(logits, temperature, top_k, top_p, min_p, seed, offset)
    batch, vocab = logits.shape
    if batch == 0:
        return out
    e = torch.empty((batch, vocab), dtype=torch.float32, device=logits.device)
    listed = torch.empty((2, batch, _LIST), dtype=torch.float32, device=logits.device)
    tiles = next_power_of_2(triton.cdiv(vocab, _BLOCK))
    with device_of(logits):
        sample_kernel[(batch,)](
            logits, temperature, top_k, top_p, min_p, seed, offset, e, listed[0], listed[1], out,
            vocab, logits.stride(0), _BLOCK, _LIST, _PIVOTS, tiles, num_warps=_WARPS, **EXACT,
        )  # fmt: skip
    return out
