"""Biases of scores by position, as `attention` and `attention_dense` take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi (arXiv 2108.12409): [heads] float32.

    Of n heads, a power of two, head i has 2^(-8 (i + 1) / n). Other counts take the slopes of the
    power of two below them, then every second one of those of the power above, from the first on,
    as the authors' code does. Raises ValueError if heads is not positive.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads must be positive, got {heads}")

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    below = 1 << (heads.bit_length() - 1)
    slopes = geometric(below) + geometric(2 * below)[::2][: heads - below]
    return torch.tensor(slopes, dtype=torch.float32)


def _t5_bucket(distance: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The bucket of each distance key - query, with the roundings of T5's own float32 logarithm."""
    after = 0
    if bidirectional:  # the upper half of the buckets is for later keys
        buckets //= 2
        after = buckets
    exact = buckets // 2  # below this each distance has a bucket of its own
    far = distance.abs() if bidirectional else (-distance).clamp(min=0)
    octaves = torch.log(far.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    spaced = exact + (octaves * (buckets - exact)).long()
    bucket = torch.where(far < exact, far, spaced.clamp(max=buckets - 1))
    return bucket + after * (distance > 0)


def t5_distance_bias(table: Tensor, *, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """T5's relative attention bias, expanded to one entry per distance: the `distance_bias` of
    attention.

    table [buckets, heads]: the weight of `relative_attention_bias`, any float dtype. bidirectional:
    as in the encoder; a decoder has all buckets for earlier keys. From max_distance on all
    distances share a bucket. Returns [heads, 2 max_distance + 1] float32, on the table's device;
    entry max_distance + d is for key - query = d. T5 does not scale its scores: it needs
    `scale=1.0`.

    Raises ValueError for a table that is not a matrix of floats or has fewer than 2 buckets (4 if
    bidirectional), and for a max_distance that is not beyond the buckets of one distance each.
    """
    if table.dim() != 2 or not table.is_floating_point():
        got = f"{list(table.shape)} {str(table.dtype).removeprefix('torch.')}"
        raise ValueError(f"t5_distance_bias: table must be [buckets, heads] of floats, got {got}")
    buckets = table.shape[0]
    least = 4 if bidirectional else 2
    if buckets < least:
        raise ValueError(
            f"t5_distance_bias: table must have at least {least} buckets, got {buckets}"
        )
    exact = buckets // least
    if max_distance <= exact:
        raise ValueError(
            f"t5_distance_bias: max_distance must be above {exact}, the distances that have a "
            f"bucket of their own, got {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)
    bucket = _t5_bucket(distance, buckets, bidirectional, max_distance)
    return table.float()[bucket].t().contiguous()
