"""sample on CUDA: the token of the CPU's kernels and of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu
from test_sample import REFERENCE, settings
from torch import Tensor

from qkernels.reference.sample import kept, philox

NAN, EMPTY = -1, -2
# Seed and offset whose 64 bits are 2^64 (1 - 2^-34.7). Of 2^40 of weight and little more the draw
# takes the 40th unit from the end: the last token that is kept and weighs 40 or more.
SEED, OFFSET, FROM_END = 0, 2589576016, 40
UNIT = -27.7259  # the logit that weighs 1 beside a largest of 0


def assert_same_tokens(gpu: Gpu, logits: Tensor, args: tuple[Tensor, ...]) -> None:
    got = gpu.ops.sample(gpu.to(logits), *gpu.to(args)).cpu()
    assert got.dtype == torch.int64
    assert torch.equal(got, torch.ops.qkernels.sample(logits, *args))


# More columns than threads, and many more; 50,257 is a vocabulary.
@pytest.mark.parametrize("vocab", [1, 2, 5, 31, 100, 1000, 1031, 8192, 50257])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_the_token_of_the_cpu(
    gpu: Gpu, vocab: int, spread: float, generator: torch.Generator
) -> None:
    batch = 3 if vocab > 10000 else 9
    logits = torch.randn(batch, vocab, generator=generator) * spread
    logits[1::3] = (logits[1::3] * 2).round() / 2  # ties
    logits[2::3, ::3] = -torch.inf
    logits[2::3, -1] = 0.0
    args = settings(batch, generator)
    assert_same_tokens(gpu, logits, args)
    if vocab < 2000:
        got = gpu.ops.sample(gpu.to(logits), *gpu.to(args)).cpu()
        assert torch.equal(got, REFERENCE.sample(logits, *args))


@pytest.mark.parametrize("filters", ["none", "k", "p", "both"])
@pytest.mark.parametrize("kind", ["equal", "two values", "outlier", "steep"])
def test_more_logits_in_a_bin_than_are_listed(
    gpu: Gpu, kind: str, filters: str, generator: torch.Generator
) -> None:
    """Rows whose logits do not spread over the bins."""
    vocab, batch = 9000, 3
    logits = torch.zeros(batch, vocab)
    if kind == "two values":
        logits[:, ::2] = 1.0
    elif kind == "outlier":  # all but one lie in two of the bins
        logits = torch.randn(batch, vocab, generator=generator) * 0.01
        logits[:, 1234] = -20.0
    elif kind == "steep":
        logits = torch.randn(batch, vocab, generator=generator) * 1e4
    top_k = 0 if filters in ("none", "p") else 5000
    top_p = 1.0 if filters in ("none", "k") else 0.6
    args = settings(batch, generator, temperature=1.0, top_k=top_k, top_p=top_p, min_p=0.0)
    args[4][0], args[5][0] = SEED, OFFSET
    assert_same_tokens(gpu, logits, args)


def last_kept(
    gpu: Gpu, logits: Tensor, temperature: float, filters: list[tuple[int, float, float]]
) -> list[int]:
    """What the draw from the end gives of a row [V] with each (top_k, top_p, min_p)."""
    top_k, top_p, min_p = zip(*filters, strict=True)
    count = len(filters)
    args = (
        torch.full((count,), temperature),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p),
        torch.tensor(min_p),
        torch.full((count,), SEED),
        torch.full((count,), OFFSET),
    )
    rows = logits.expand(count, -1).contiguous()
    got = gpu.ops.sample(gpu.to(rows), *gpu.to(args)).cpu()
    assert torch.equal(got, REFERENCE.sample(rows, *args))
    return got.tolist()


def test_filters_at_the_edges_of_bins(gpu: Gpu) -> None:
    """Logits at and beside the edges of steps of 29 / 2047, and beyond the last."""
    edges = torch.tensor([1.0, 2.0, 3.0, 700.0, 1500.0]) * (-29 / 2047)
    beside = [torch.nextafter(edges, torch.tensor(far)) for far in (-torch.inf, torch.inf)]
    beyond = torch.tensor([0.0, -28.99, -29.0, -29.01, -29.02, -29.03, -40.0, -torch.inf])
    logits = torch.cat([edges, *beside, beyond]).sort(descending=True).values
    few, count = 1 + 3 * len(edges), len(logits)
    got = last_kept(gpu, logits, 1.0, [(k, 1.0, 0.0) for k in range(1, count + 1)])
    assert got == [min(k, few) - 1 for k in range(1, count + 1)]
    _, weights = kept(logits, 1.0, 0, 1.0, 0.0)
    shares = (weights.cumsum(0)[:few] / weights.sum()).float().tolist()
    last_kept(gpu, logits, 1.0, [(0, p, 0.0) for p in shares])
    last_kept(gpu, logits, 1.0, [(k, 0.7, 0.0) for k in (2, 5, 9)])


def test_filters_among_equal_weights(gpu: Gpu) -> None:
    """Shares that the mass reaches exactly; the last two logits are both in the last bin."""
    ends = [-1.981326937675476, -1.9813270568847656]
    logits = torch.tensor([0.0, -0.25, -0.5, -1.0, -1.25, -1.5, *ends])
    counts = range(1, 9)
    got = last_kept(gpu, logits, 3e38, [(k, 1.0, 0.0) for k in counts])
    assert got == [k - 1 for k in counts]
    got = last_kept(gpu, logits, 3e38, [(0, count / 8, 0.0) for count in counts])
    assert got == [count - 1 for count in counts]
    ties = torch.tensor([0.0, 0.0, -1.0, -1.0, -1.0, -2.0])
    got = last_kept(gpu, ties, 3e38, [(k, 1.0, 0.0) for k in range(1, 7)])
    assert got == [1, 1, 4, 4, 4, 5]


def test_dropped_tokens_weigh_nothing(gpu: Gpu) -> None:
    logits = torch.full((1 + 2 * FROM_END,), -5.0)
    logits[0] = 0.0
    filters = [(1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1.0, 0.5)]
    assert last_kept(gpu, logits, 1.0, filters) == [0, 0, 0]


def test_a_share_of_one_drops_nothing(gpu: Gpu) -> None:
    """A filter of p = 1 would drop the last logit, as a weight of 1 beside 2^53 is lost in float64.
    What follows the zeros weighs 328,097, and from so much of the end this total is drawn."""
    logits = torch.zeros(8211)
    logits[-3:] = torch.tensor([-15.024826049804688, UNIT, -torch.inf])
    _, weights = kept(logits, 1.0, 0, 1.0, 0.0)
    assert weights[-3:].tolist() == [328096, 1, 0]
    assert last_kept(gpu, logits, 1.0, [(0, 1.0, 0.0), (8210, 1.0, 0.0)]) == [8208, 8208]


# Of 97 a warp's part has 4 columns, one each of a thread, and the last part one; of 32,800 it has
# 1,025, two each of a thread.
@pytest.mark.parametrize(
    ("vocab", "columns"),
    [(97, [1, 2, 3, 4, 5, 7, 8, 9, 16, 57]), (32800, [1023, 1024, 1025, 1026])],
)
def test_draws_at_the_borders_of_parts(gpu: Gpu, vocab: int, columns: list[int]) -> None:
    """The weight before the token is what the draw takes, to the last unit."""
    logits = torch.full((len(columns), vocab), -torch.inf)
    logits[:, 0] = 0.0
    for row, column in zip(logits, columns, strict=True):
        row[column : column + FROM_END] = UNIT
        row[1 : column - 1] = UNIT  # the one before weighs nothing
    count = len(columns)
    one, none = torch.ones(count), torch.zeros(count)
    args = (one, none.int(), one, none, none.long() + SEED, none.long() + OFFSET)
    got = gpu.ops.sample(gpu.to(logits), *gpu.to(args)).tolist()
    assert got == columns


def boundary(seed: int) -> tuple[float, float]:
    """Two neighbouring logits of the second of two tokens, beside a first one of 0: with the one it
    is drawn, with the other, a float below, it is not. Zeros where it is never drawn."""
    low, high, _, _ = philox(seed, 0)

    def drawn(magnitude: int) -> bool:
        _, w = kept(torch.tensor([0.0, -as_float(magnitude)]), 1.0, 0, 1.0, 0.0)
        return (high << 32 | low) * int(w.sum()) >> 64 >= int(w[0])

    near, far = 0, int(torch.tensor(28.0).view(torch.int32))
    if not drawn(near):
        return 0.0, 0.0
    while near + 1 < far:
        middle = (near + far) // 2
        near, far = (middle, far) if drawn(middle) else (near, middle)
    return -as_float(near), -as_float(far)


def as_float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def test_weights_are_exact_to_the_last_float(gpu: Gpu) -> None:
    """Tokens that the next float32 below would not give: they tell any error of the exponential."""
    ends = [(seed, *boundary(seed)) for seed in range(80)]
    rows = [(seed, logit) for seed, near, far in ends if near < 0 for logit in (near, far)]
    assert len(rows) > 60
    seeds = torch.tensor([seed for seed, _ in rows])
    logits = torch.tensor([[0.0, logit] for _, logit in rows])
    count = len(rows)
    one, none = torch.ones(count), torch.zeros(count)
    args = (one, none.int(), one, none, seeds, none.long())
    want = torch.ops.qkernels_reference.sample(logits, *args)
    assert want.tolist() == [1, 0] * (count // 2)
    assert torch.equal(gpu.ops.sample(gpu.to(logits), *gpu.to(args)).cpu(), want)


def test_extremes(gpu: Gpu, generator: torch.Generator) -> None:
    logits = torch.randn(10, 300, generator=generator)
    logits[0] = 0.0
    logits[1] = 3e38
    logits[1, ::2] = -3e38  # max - min is infinite
    logits[2, 17] = torch.inf
    logits[3] = torch.where(torch.arange(300) == 150, 0.0, -torch.inf)
    logits[4] = torch.where(torch.arange(300) % 2 == 0, 0.0, -0.0)
    logits[9] = -3e38
    logits[9, 7:9] = 3e38
    temperature, top_k, top_p, min_p, seed, offset = settings(10, generator, temperature=1.0)
    temperature[5], temperature[6], temperature[7] = 1e-40, 3e38, 1e-3
    top_p[9] = 1e-30
    for k in (0, 1, 5, 299, 2**31 - 1):
        args = (temperature, torch.full_like(top_k, k), top_p, min_p, seed, offset)
        assert_same_tokens(gpu, logits, args)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.5, 0.999999, 1.0])
def test_temperatures_and_shares(
    gpu: Gpu, temperature: float, top_p: float, generator: torch.Generator
) -> None:
    logits = torch.randn(3, 700, generator=generator) * 4
    for top_k in (0, 1, 50):
        args = settings(3, generator, temperature=temperature, top_k=top_k, top_p=top_p)
        assert_same_tokens(gpu, logits, args)


def test_neighbours_in_float32_are_told_apart(gpu: Gpu, generator: torch.Generator) -> None:
    """All in one bin until the last bits of the key."""
    order = torch.randperm(12, generator=generator)
    row = torch.tensor([1.0 + i * 2.0**-23 for i in range(12)])[order]
    for k, p in ((1, 1.0), (2, 1.0), (11, 1.0), (0, 0.08), (0, 0.1), (0, 0.95), (2, 0.4)):
        args = settings(6, generator, temperature=1.0, top_k=k, top_p=p, min_p=0.0)
        logits = row.expand(6, 12)
        assert_same_tokens(gpu, logits, args)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_empty_rows_have_numbers(gpu: Gpu, temperature: float) -> None:
    for place in (0, 33, 1023, 1024, 2999):
        logits = torch.zeros(3, 3000)
        logits[1] = -torch.inf
        logits[2, place] = torch.nan
        args = settings(3, torch.Generator().manual_seed(0), temperature=temperature)
        got = gpu.ops.sample(gpu.to(logits), *gpu.to(args)).tolist()
        assert got[1:] == [EMPTY, NAN] and got[0] >= 0
        logits[2] = torch.nan
        assert gpu.ops.sample(gpu.to(logits), *gpu.to(args)).tolist()[2] == NAN


def test_greedy_takes_the_first_of_equal_logits(gpu: Gpu) -> None:
    logits = torch.zeros(5, 3000)
    logits[0, [30, 60, 2999]] = 1.0
    logits[1, 2999] = 1e-30
    logits[2] = -5.0
    logits[3, 0], logits[3, 50] = -0.0, 0.0
    logits[4, [1027, 2050]] = torch.inf
    args = settings(5, torch.Generator().manual_seed(0), temperature=0.0)
    assert gpu.ops.sample(gpu.to(logits), *gpu.to(args)).tolist() == [30, 2999, 0, 0, 1027]


def test_settings_out_of_range_draw_some_token(gpu: Gpu, generator: torch.Generator) -> None:
    """Nobody looks at them: that would wait for the GPU. Nothing beyond the row is touched."""
    logits = torch.randn(1, 500, generator=generator)
    nan, inf = torch.nan, torch.inf
    for changes in (
        {"temperature": nan}, {"temperature": -1.0}, {"temperature": inf}, {"top_k": -3},
        {"top_p": nan}, {"top_p": -1.0}, {"top_p": 2.0}, {"min_p": nan}, {"min_p": 2.0},
        {"temperature": nan, "top_k": 7, "top_p": 0.5}, {"temperature": -1.0, "top_p": 0.5},
        {"temperature": inf, "top_k": 7, "top_p": 0.5},
    ):  # fmt: skip
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        args = settings(1, generator, **{**off, **changes})
        token = gpu.ops.sample(gpu.to(logits), *gpu.to(args)).item()
        assert 0 <= token < 500


def test_rows_any_stride_apart(gpu: Gpu, generator: torch.Generator) -> None:
    logits = torch.randn(6, 3, 1000, generator=generator)
    args = settings(6, generator)
    got = gpu.ops.sample(gpu.to(logits)[:, -1], *gpu.to(args)).cpu()
    assert torch.equal(got, torch.ops.qkernels.sample(logits[:, -1], *args))


def test_no_rows(gpu: Gpu, generator: torch.Generator) -> None:
    tokens = gpu.ops.sample(gpu.to(torch.empty(0, 10)), *gpu.to(settings(0, generator)))
    assert tokens.shape == (0,) and tokens.dtype == torch.int64
