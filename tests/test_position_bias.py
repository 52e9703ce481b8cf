"""The slopes of ALiBi and the biases of T5, against their rules written in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkernels.ops import alibi_slopes, attention_dense, t5_distance_bias


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 32, 40, 71, 112])
def test_alibi_slopes(heads: int) -> None:
    """The rule that MPT has: the slopes of the next power of two, those of odd places first."""
    above = 1
    while above < heads:
        above *= 2
    slopes = [1 / 2 ** ((i + 1) * 8 / above) for i in range(above)]
    if above != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    ours = alibi_slopes(heads)
    assert ours.dtype == torch.float32 and ours.shape == (heads,)
    torch.testing.assert_close(ours, torch.tensor(slopes), rtol=2**-23, atol=0)


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def bucket(distance: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    """T5's rule in integers: j buckets beyond the exact ones begin where
    exact * (max_distance / exact) ** (j / spaced) is reached."""
    if bidirectional:
        half = buckets // 2
        return bucket(-abs(distance), half, False, max_distance) + (half if distance > 0 else 0)
    far, exact = max(-distance, 0), buckets // 2
    spaced = buckets - exact
    if far < exact:
        return far
    j = 0
    while j < spaced - 1 and far**spaced * exact ** (j + 1) >= (
        exact**spaced * max_distance ** (j + 1)
    ):
        j += 1
    return exact + j


T5 = [
    (buckets, bidirectional, max_distance)
    for buckets, max_distance in [(32, 128), (16, 128), (64, 256), (10, 20), (33, 100), (4, 2)]
    for bidirectional in (True, False)
    if max_distance > buckets // (4 if bidirectional else 2)
]


@pytest.mark.parametrize("buckets, bidirectional, max_distance", T5)
def test_t5_buckets(buckets: int, bidirectional: bool, max_distance: int) -> None:
    table = torch.arange(buckets * 3, dtype=torch.float32).view(buckets, 3)
    bias = t5_distance_bias(table, bidirectional=bidirectional, max_distance=max_distance)
    assert bias.shape == (3, 2 * max_distance + 1) and bias.is_contiguous()
    for distance in range(-4 * max_distance, 4 * max_distance + 1):
        entry = min(max(distance, -max_distance), max_distance) + max_distance
        row = bucket(distance, buckets, bidirectional, max_distance)
        assert bias[:, entry].tolist() == table[row].tolist(), distance


@pytest.mark.parametrize("bidirectional", [True, False])
def test_attention_of_t5(bidirectional: bool) -> None:
    """transformers' layer: scores are not scaled and gain the bias of their bucket."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config: Any = t5.T5Config(d_model=48, d_kv=16, num_heads=3, is_decoder=not bidirectional)
    torch.manual_seed(0)
    layer = t5.T5Attention(config, has_relative_attention_bias=True).eval()
    x, n = torch.randn(300, 48), 300
    with torch.no_grad():
        layer.relative_attention_bias.weight.normal_()
        position_bias = layer.compute_bias(n, n)
        q, k, v = (f(x).view(n, 3, 16) for f in (layer.q, layer.k, layer.v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) + position_bias[0]
        if not bidirectional:
            scores += torch.full((n, n), -torch.inf).triu(1)
        truth = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)
        bias = t5_distance_bias(
            layer.relative_attention_bias.weight, bidirectional=bidirectional, max_distance=128
        )
        start = torch.tensor([0, n], dtype=torch.int32)
        out = attention_dense(
            q, k, v, start, start, scale=1.0, causal=not bidirectional, distance_bias=bias
        )
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


def test_any_float_table() -> None:
    table = torch.randn(32, 4)
    half = t5_distance_bias(table.half(), bidirectional=True)
    assert half.dtype == torch.float32 and half.shape == (4, 257)
    assert torch.equal(half, t5_distance_bias(table.half().float(), bidirectional=True))


@pytest.mark.parametrize(
    "table, bidirectional, max_distance, message",
    [
        (torch.zeros(32), True, 128, r"table must be \[buckets, heads\] of floats, got \[32\] fl"),
        (torch.zeros(32, 2).long(), True, 128, r"of floats, got \[32, 2\] int64"),
        (torch.zeros(3, 2), True, 128, "table must have at least 4 buckets, got 3"),
        (torch.zeros(1, 2), False, 128, "table must have at least 2 buckets, got 1"),
        (torch.zeros(32, 2), True, 8, "max_distance must be above 8, .* got 8"),
        (torch.zeros(32, 2), False, 16, "max_distance must be above 16, .* got 16"),
    ],
)
def test_errors(table: torch.Tensor, bidirectional: bool, max_distance: int, message: str) -> None:
    with pytest.raises(ValueError, match="t5_distance_bias: .*" + message):
        t5_distance_bias(table, bidirectional=bidirectional, max_distance=max_distance)


def test_alibi_without_heads() -> None:
    with pytest.raises(ValueError, match="alibi_slopes: heads must be positive, got 0"):
        alibi_slopes(0)
