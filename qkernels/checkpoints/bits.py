"""Codes in int32 words, as GPTQ, AWQ and compressed-tensors pack them.

A row of codes is one stream of bits, lowest first: code i has the bits [b i, b (i + 1)), word j the
bits [32 j, 32 (j + 1)). Where b divides 32, no code straddles two words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """int32 words of `count` codes."""
    return -(-count * bits // 32)


def unpack_bits(packed: Tensor, bits: int, count: int, order: Sequence[int] = ()) -> Tensor:
    """[R, words(count, bits)] int32 -> [R, count] uint8.

    order: the column of each code of a word, where they are not stored one after the other; only
    for bits that divide 32.
    """
    period, step = 32 // math.gcd(32, bits), bits // math.gcd(32, bits)  # of the pattern of shifts
    rows, groups = packed.shape[0], -(-count // period)
    if packed.shape[1] != groups * step:  # the last period has words without codes: not stored
        packed = torch.nn.functional.pad(packed, (0, groups * step - packed.shape[1]))
    packed, mask = packed.reshape(-1, step), (1 << bits) - 1
    out = torch.empty(rows * groups, period, dtype=torch.uint8)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        # An arithmetic shift repeats the sign in the upper bits; the mask takes the lower ones.
        code = packed[:, word] >> shift
        low = 32 - shift
        if low < bits:
            code = (code & ((1 << low) - 1)) | (packed[:, word + 1] << low)
        out[:, order[i] if order else i] = code & mask
    return out.view(rows, groups * period)[:, :count]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[R, count] uint8 below 2^bits -> [R, words(count, bits)] int32, zero bits at the end."""
    period, step = 32 // math.gcd(32, bits), bits // math.gcd(32, bits)
    rows, count = codes.shape
    groups = -(-count // period)
    if groups * period != count:
        codes = torch.nn.functional.pad(codes, (0, groups * period - count))
    codes = codes.reshape(-1, period)
    packed = torch.zeros(rows * groups, step, dtype=torch.int32)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        code = codes[:, i].int()
        packed[:, word] |= code << shift
        if 32 - shift < bits:
            packed[:, word + 1] |= code >> (32 - shift)
    return packed.view(rows, groups * step)[:, : words(count, bits)]
