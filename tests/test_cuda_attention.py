"""attention and attention_dense on CUDA: every kernel and launch choice against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import (
    EPS,
    KINDS,
    MASKS,
    Case,
    dense_case,
    exact,
    exact_dense,
    make_bias,
    make_case,
    options,
    rows_of,
    run,
)
from gpus import Gpu
from numerics import SMALLEST, UNIT, assert_within
from torch import Tensor

from qkernels.reference.attention import attend

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Pages and queries that tensor cores multiply.
PRODUCTS = [
    ("float16", F16),
    ("float16", BF16),
    ("bfloat16", BF16),
    ("int8", F16),
    ("int8", BF16),
    ("int4", F16),
    ("int4", BF16),
]
# Head dims that are a kernel's own (64, 80, 96, 128, 256, 512) and others; heads 1, 3, 7, 8, 16 to
# one; pages of 16 to 64.
SHAPES = [
    (6, 2, 64, 16),
    (7, 1, 128, 64),
    (4, 4, 80, 16),
    (8, 1, 96, 32),
    (2, 1, 256, 48),
    (3, 1, 512, 16),
    (16, 1, 48, 16),
    (1, 1, 144, 16),
    (2, 2, 272, 16),
    (2, 1, 16, 16),
]
DECODE = [(1, 1), (1, 530), (3, 70), (0, 20), (2, 129), (1, 64)]  # 8 and fewer per sequence
PREFILL = [(70, 70), (9, 100), (0, 20), (1, 40), (40, 41), (2, 300)]  # 9 and more, and fewer


def bound(case: Case, mask: dict[str, Any], bias: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The exact result, and how far from it a kernel of 16-bit products may be.

    `exact` says what float32 sums do. Weights are rounded to the products' type, which moves the
    result by as much of sum(weight |v|); those below 2^-31 of the largest may be lost, each of a
    value of up to twice the range of its row. The result is rounded once.
    """
    truth, slack = exact(case, mask, bias)
    dtype, dim, start = case.q.dtype, case.q.shape[2], case.query_start.tolist()
    products = BF16 if case.k_pages.dtype == BF16 else F16
    size, lost = [truth[:0]], [slack[:0]]
    wide: dict[str, Any] = {name: tensor.double() for name, tensor in bias.items()}
    for b, length in enumerate(case.kv_len.tolist()):
        q = case.q[start[b] : start[b + 1]].double()
        k = rows_of(case.k_pages, case.k_scale, case.page_table[b], length, dim)
        v = rows_of(case.v_pages, case.v_scale, case.page_table[b], length, dim)
        size.append(attend(q, k, v.abs(), *options(dim, mask), **wide))
        most = float(v.abs().max()) if length else 0.0
        lost.append(torch.full((len(q), 1, 1), 4 * 2.0**-31 * length * most).double())
    rounding = 0.0 if dtype == F32 else UNIT[products]
    error = 2 * slack + rounding * torch.cat(size) + torch.cat(lost)
    return truth, error + UNIT[dtype] * (truth.abs() + error) + SMALLEST[dtype]


def to(gpu: Gpu, case: Case) -> Case:
    fields = dataclasses.fields(case)
    return Case(**{f.name: gpu.to(getattr(case, f.name)) for f in fields})


def check(
    gpu: Gpu, case: Case, mask: dict[str, Any], bias: dict[str, Tensor] | None = None
) -> Tensor:
    bias = bias or {}
    on_device = {name: gpu.to(tensor) for name, tensor in bias.items()}
    out = run(gpu.ops, to(gpu, case), mask, on_device).cpu()
    assert out.dtype == case.q.dtype and out.is_contiguous()
    assert_within(out, *bound(case, mask, bias))
    return out


# ---- every kernel ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind, dtype", PRODUCTS, ids=str)
def test_decode(gpu: Gpu, kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check(gpu, make_case(kind, shape, DECODE, dtype), MASKS[0])


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
@pytest.mark.parametrize("kind, dtype", PRODUCTS[::2], ids=str)
def test_prefill(gpu: Gpu, kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads = shape[0] // shape[1]
    ragged = PREFILL if heads <= 4 else [(20, 20), (9, 100), (1, 7)]
    check(gpu, make_case(kind, shape, ragged, dtype), MASKS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_queries(gpu: Gpu, kind: str) -> None:
    ragged = [(1, 1), (1, 150), (9, 40), (0, 20)]
    for shape, mask in ((SHAPES[0], MASKS[0]), (SHAPES[4], MASKS[3]), (SHAPES[2], MASKS[2])):
        check(gpu, make_case(kind, shape, ragged), mask)


@pytest.mark.parametrize("kind, dtype", [("bfloat16", F16), ("float32", BF16), ("float32", F16)])
def test_queries_that_the_pages_do_not_fit(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    check(gpu, make_case(kind, (6, 2, 80, 16), [(1, 40), (3, 30)], dtype), MASKS[0])


@pytest.mark.parametrize("kind, dtype", PRODUCTS[::2], ids=str)
@pytest.mark.parametrize("ragged", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("mask", MASKS[1:], ids=str)
def test_masks(
    gpu: Gpu, mask: dict[str, Any], ragged: list[tuple[int, int]], kind: str, dtype: torch.dtype
) -> None:
    check(gpu, make_case(kind, (4, 2, 64, 16), ragged, dtype), mask)


@pytest.mark.parametrize(
    "names",
    ["sinks", "alibi_slopes", "distance_bias", "sinks alibi_slopes distance_bias"],
)
@pytest.mark.parametrize("kind, dtype", [("float16", F16), ("int4", BF16), ("int8", F32)], ids=str)
def test_biases(gpu: Gpu, kind: str, dtype: torch.dtype, names: str) -> None:
    for ragged, mask in ((DECODE[:5], MASKS[0]), ([(20, 30), (2, 9)], MASKS[3])):
        for reach in (9, 0):
            bias = make_bias(names, 6, reach)
            check(gpu, make_case(kind, (6, 2, 48, 16), ragged, dtype), mask, bias)


def test_scores_that_are_all_minus_infinity(gpu: Gpu) -> None:
    for kind, ragged in (("float16", [(2, 40)]), ("int8", [(9, 20)])):
        case = make_case(kind, (2, 1, 64, 16), ragged, F16)
        bias = {"distance_bias": torch.full((2, 1), -torch.inf)}
        for more in ({}, make_bias("sinks", 2, 0)):
            out = run(
                gpu.ops, to(gpu, case), MASKS[0], {n: gpu.to(t) for n, t in (bias | more).items()}
            )
            assert (out == 0).all()


# ---- launch choices ----


@pytest.mark.parametrize("kind, dtype", PRODUCTS[::2], ids=str)
def test_split_boundaries(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    """Lengths around multiples of the warps' steps (64 keys) times the splits (2 to 4)."""
    lengths = [63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 511, 513, 1023, 1024]
    ragged = [(1, length) for length in lengths]
    case = make_case(kind, (1, 1, 64, 16), ragged, dtype)
    for multiprocessors in (5, 10, 15, 20):  # three blocks each: 1 to 4 splits of 15 sequences
        with gpu.playing(multiprocessors=multiprocessors):
            check(gpu, case, MASKS[0])
            check(gpu, case, {"causal": True, "window": 200})


def test_many_steps_of_a_warp(gpu: Gpu) -> None:
    """Pages are looked up for 32 steps of 64 keys at once, and as many ahead."""
    case = make_case("float16", (2, 1, 16, 16), [(1, 20), (4, 4300)], F16)
    case.q *= 4  # few keys weigh much, and others for each row
    with gpu.playing(multiprocessors=1):
        check(gpu, case, MASKS[0])


@pytest.mark.parametrize("kind, dtype", [("float16", F16), ("int8", BF16)], ids=str)
def test_tile_boundaries(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    """Prefill of lengths around multiples of a tile of 64 keys, and rows around one of 128."""
    for ragged in ([(63, 63), (64, 64)], [(65, 65), (9, 128)], [(10, 127), (10, 129)]):
        check(gpu, make_case(kind, (2, 1, 64, 16), ragged, dtype), MASKS[0])


def test_splits_with_sinks_and_few_keys(gpu: Gpu) -> None:
    """Most splits have nothing; the sink counts once."""
    for length in (1, 17, 600):
        case = make_case("bfloat16", (2, 1, 64, 16), [(1, length), (1, 1100)], BF16)
        check(gpu, case, MASKS[0], make_bias("sinks", 2, 0))


@pytest.mark.parametrize("kind, dtype", [("float16", BF16), ("int4", F16)], ids=str)
def test_tokens_that_crowd_in_one_sequence(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    """Few on average, so decode takes them all; a block then has several tiles of rows."""
    ragged = [(0, 5), (21, 90), (0, 1), (0, 33), (2, 2)]
    case = make_case(kind, (3, 1, 64, 16), ragged, dtype)
    check(gpu, case, MASKS[0])
    with gpu.playing(multiprocessors=1):
        check(gpu, case, MASKS[2])


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_the_number_of_new_tokens(gpu: Gpu, kind: str) -> None:
    for count in (7, 8, 9):
        check(gpu, make_case(kind, (4, 2, 64, 16), [(count, 40)], F16), MASKS[0])
        mixed = [(count, 40), (30, 30), (1, 90), (0, 3)]
        check(gpu, make_case(kind, (4, 2, 64, 16), mixed, F16), MASKS[0])


def test_on_sm_80(gpu: Gpu) -> None:
    with gpu.playing(architecture=80, multiprocessors=108):
        for shape in ((4, 2, 128, 16), (2, 1, 256, 16), (2, 1, 512, 16)):
            for kind in ("bfloat16", "int8"):
                check(gpu, make_case(kind, shape, [(1, 300), (2, 20)], BF16), MASKS[0])
                check(gpu, make_case(kind, shape, [(12, 30)], BF16), MASKS[0])


def test_where_blocks_have_99_kilobytes(gpu: Gpu) -> None:
    """Larger tiles do not fit: what remains is slower, and right."""
    with gpu.playing(architecture=86, multiprocessors=84):
        for dim in (64, 96, 128, 256, 512):
            for kind in ("bfloat16", "int8"):
                for ragged in ([(1, 100)], [(12, 30)], [(12, 30), (1, 20)]):
                    check(gpu, make_case(kind, (2, 1, dim, 16), ragged, BF16), MASKS[0])


@pytest.mark.parametrize("kind, dtype", PRODUCTS[::2], ids=str)
def test_the_same_bits_every_time(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    case = to(gpu, make_case(kind, (4, 2, 64, 16), [(1, 700), (12, 20), (2, 40)], dtype))
    first = run(gpu.ops, case, MASKS[0])
    for _ in range(3):  # the emulated GPU runs blocks and threads in another order
        assert torch.equal(run(gpu.ops, case, MASKS[0]), first)


# ---- layouts ----


@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
@pytest.mark.parametrize("ragged", [DECODE[2:], [(20, 30)]], ids=["decode", "prefill"])
def test_strided_queries_and_layers(gpu: Gpu, kind: str, ragged: list[tuple[int, int]]) -> None:
    """q may be a slice of a fused projection; pages may be a layer's slice of a larger pool."""
    case = to(gpu, make_case(kind, (6, 2, 64, 32), ragged, F16))
    expected = run(gpu.ops, case, MASKS[0])
    fused = torch.full((len(case.q), 10 * 64 + 1), torch.nan, dtype=F16, device=gpu.device)
    fused[:, : 6 * 64] = case.q.flatten(1)
    q = fused[:, : 6 * 64].view(-1, 6, 64)
    wide: list[Any] = [
        None if t is None else torch.stack((torch.zeros_like(t), t), dim=1)[:, 1]
        for t in case.cache()
    ]
    assert not q.is_contiguous() and wide[0] is not None and not wide[0].is_contiguous()
    strided = Case(q, case.query_start, case.kv_len, case.page_table, *wide)
    assert torch.equal(run(gpu.ops, strided, MASKS[0]), expected)


@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_rows_that_are_not_aligned(gpu: Gpu, kind: str) -> None:
    case = make_case(kind, (2, 1, 32, 16), [(1, 40), (12, 20)], F16)
    odd = []
    for pages in (case.k_pages, case.v_pages):
        memory = torch.zeros(pages.numel() + 1, dtype=pages.dtype)
        odd.append(memory[1:].view(pages.shape))
        odd[-1].copy_(pages)
    on_device = to(gpu, case)
    moved = [gpu.to(torch.cat((t.flatten()[:1], t.flatten())))[1:].view(t.shape) for t in odd]
    shifted = dataclasses.replace(on_device, k_pages=moved[0], v_pages=moved[1])
    out = run(gpu.ops, shifted, MASKS[0]).cpu()
    assert_within(out, *bound(case, MASKS[0], {}))


# ---- numbers ----


@pytest.mark.parametrize("kind, dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("ragged", [[(1, 400)], [(10, 150)]], ids=["decode", "prefill"])
def test_scores_that_grow(
    gpu: Gpu, kind: str, dtype: torch.dtype, ragged: list[tuple[int, int]]
) -> None:
    """The reference of a row and, with codes, the scale of the values are raised again and
    again."""
    case = make_case(kind, (2, 1, 64, 16), ragged, dtype)
    case.q.abs_()
    length = ragged[0][1]
    for t in range(length):
        page, slot = int(case.page_table[0, t // 16]), t % 16
        if case.k_scale is None or case.v_scale is None:
            case.k_pages[page, :, slot] = case.k_pages[page, :, slot].abs() * (t * 3 / length)
        else:
            case.k_scale[page, :, 1, slot] = 0
            case.k_scale[page, :, 0, slot] *= t * 3 / length
            case.v_scale[page, :, 0, slot] *= 2.0 ** (t / 30 - 6)
    check(gpu, case, MASKS[0])


@pytest.mark.parametrize("kind, dtype", [("float16", F16), ("int8", BF16), ("int8", F32)], ids=str)
@pytest.mark.parametrize("ragged", [[(1, 700)], [(10, 150)]], ids=["decode", "prefill"])
def test_scores_that_fall(
    gpu: Gpu, kind: str, dtype: torch.dtype, ragged: list[tuple[int, int]]
) -> None:
    """The first key, and one near the end, outweigh the rest by more than float32 reaches: each
    sum of a part is small beside theirs, whichever part is added first."""
    case = make_case(kind, (2, 1, 64, 16), ragged, dtype)
    case.q.abs_().add_(4)
    for t in (0, ragged[0][1] - 20):
        page, slot = int(case.page_table[0, t // 16]), t % 16
        if case.k_scale is None:
            case.k_pages[page, :, slot] = 6
        else:
            case.k_pages[page, :, slot] = 255
            case.k_scale[page, :, :, slot] = torch.tensor([6 / 255, 0])
    check(gpu, case, MASKS[0])


@pytest.mark.parametrize("kind, dtype", [("float16", F16), ("int8", F32)], ids=str)
def test_scores_far_below_zero(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    """All weigh nothing beside a score of zero, which no part may have."""
    for ragged in ([(1, 700)], [(1, 100)], [(10, 50)]):
        case = make_case(kind, (2, 1, 64, 16), ragged, dtype)
        case.q.abs_().add_(4)
        if case.k_scale is None:
            case.k_pages.abs_().add_(4).neg_()
        else:
            case.k_scale[:, :, 0] *= 2
            case.k_scale[:, :, 1] = 255
        check(gpu, case, MASKS[0])


@pytest.mark.parametrize("count", [1, 10])
def test_one_key_of_large_values(gpu: Gpu, count: int) -> None:
    """The scale of the values is raised for either key of a lane, whatever the scores are."""
    for key in (67, 75):  # not of a warp's first step, which raises all
        case = make_case("int8", (2, 1, 64, 16), [(count, 100)], F16)
        assert case.v_scale is not None
        case.v_scale[int(case.page_table[0, key // 16]), :, 0, key % 16] *= 2.0**14
        check(gpu, case, MASKS[1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("count", [3, 10])
def test_scales_of_nan_are_of_those_who_see_them(gpu: Gpu, kind: str, count: int) -> None:
    case = make_case(kind, (2, 1, 64, 16), [(count, 40)], F16)
    want = run(gpu.ops, to(gpu, case), MASKS[0])
    assert case.k_scale is not None and case.v_scale is not None
    case.k_scale[int(case.page_table[0, 2]), :, 0, 7] = torch.nan
    case.v_scale[int(case.page_table[0, 2]), :, 0, 7] = torch.nan
    out = run(gpu.ops, to(gpu, case), MASKS[0])
    assert torch.equal(out[:-1], want[:-1]) and out[-1].isnan().all()


def test_a_small_softcap(gpu: Gpu) -> None:
    case = make_case("float16", (2, 1, 64, 16), [(1, 40), (10, 20)], F16)
    check(gpu, case, {"causal": True, "softcap": 0.75})


@pytest.mark.parametrize("ragged", [[(1, 40)], [(10, 40)]], ids=["decode", "prefill"])
@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_bfloat16_queries_beyond_float16(
    gpu: Gpu, kind: str, ragged: list[tuple[int, int]]
) -> None:
    for power in (20, -30, -128):
        case = make_case(kind, (2, 1, 64, 16), ragged, BF16)
        case.q *= 2.0**power
        if power > 0:
            for t in (case.k_pages, case.k_scale):
                if t is not None and t.is_floating_point():
                    (t if t is case.k_pages else t[:, :, 0]).mul_(2.0**-12)
        check(gpu, case, MASKS[0])
    case.q[0, 0] = 0
    check(gpu, case, MASKS[0])
    case.q[0, 1, 5] = torch.inf
    out = run(gpu.ops, to(gpu, case), MASKS[0]).cpu()
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()


@pytest.mark.parametrize("count", [1, 10])
def test_queries_that_need_no_scaling(gpu: Gpu, count: int) -> None:
    """Small bfloat16 queries of keys beyond float16, and float16 ones from its largest to its
    smallest number, which 2^-38 of the largest is not."""
    case = make_case("bfloat16", (2, 1, 64, 16), [(count, 40)], BF16)
    case.q *= 2.0**-118
    case.k_pages *= 2.0**118
    check(gpu, case, MASKS[0])

    case = make_case("float16", (2, 1, 64, 16), [(count, 40)], F16)
    case.q.zero_()
    case.q[:, :, 0], case.q[:, :, 1] = 2.0**15, 2.0**-24
    case.k_pages[..., 0] = 0
    case.k_pages[..., 1] *= 2.0**13
    on_device = to(gpu, case)
    out = gpu.ops.attention(*on_device.args(), 2.0**11, True, 0, 0.0).cpu()
    k = rows_of(case.k_pages, None, case.page_table[0], 40, 64)
    v = rows_of(case.v_pages, None, case.page_table[0], 40, 64)
    want = attend(case.q.double(), k, v, 2.0**11, True, 0, 0.0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=8 * UNIT[F16])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("ragged", [[(1, 100)], [(10, 100)]], ids=["decode", "prefill"])
def test_extreme_codes_and_scales(gpu: Gpu, kind: str, ragged: list[tuple[int, int]]) -> None:
    """Zero points at both ends, the smallest scale, and a scale of zero."""
    most = 15 if kind == "int4" else 255
    case = make_case(kind, (1, 1, 64, 16), ragged, F16)
    assert case.k_scale is not None and case.v_scale is not None
    for scale in (case.k_scale, case.v_scale):
        scale[:, :, 0] = 2.0**-4
        scale[:, :, 1] = 0
    check(gpu, case, MASKS[1])
    for scale in (case.k_scale, case.v_scale):
        scale[:, :, 1] = most
    check(gpu, case, MASKS[1])
    case.v_scale[:, :, 0] = 2.0**-24
    check(gpu, case, MASKS[1])
    case.v_scale[:, :, 0] = 0
    assert (check(gpu, case, MASKS[1]) == 0).all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("count", [1, 10])
def test_each_key_and_dim_is_where_it_belongs(gpu: Gpu, kind: str, count: int) -> None:
    """A query that sees one key alone returns its value, whose codes are all different."""
    dtype = BF16 if kind == "bfloat16" else F16
    case = make_case(kind, (1, 1, 96, 16), [(count, 40)], dtype)
    mask = {"causal": True, "window": 1}
    check(gpu, case, mask)
    # q picks one dim of K: scores are the keys' entries there, told apart by a scale of 8.
    for dim in (0, 1, 2, 7, 8, 13, 31, 50, 95):
        case.q.zero_()
        case.q[:, 0, dim] = 8 * 96**0.5
        check(gpu, case, MASKS[1])


# ---- indices out of range ----


@pytest.mark.parametrize("kind, dtype", [("float16", F16), ("int8", BF16), ("float32", F32)])
@pytest.mark.parametrize("count", [1, 12])
def test_pages_out_of_range_are_not_there(
    gpu: Gpu, kind: str, dtype: torch.dtype, count: int
) -> None:
    # In decode, more steps of a warp than its ring has slots: one serves again.
    length = 600 if count == 1 else 150
    case = make_case(kind, (2, 1, 64, 16), [(count, length)], dtype)
    truth, error = bound(case, MASKS[1], {})
    k = rows_of(case.k_pages, case.k_scale, case.page_table[0], length, 64)
    v = rows_of(case.v_pages, case.v_scale, case.page_table[0], length, 64)
    left = torch.ones(length, dtype=torch.bool)
    for page, bad in ((1, -1), (4, len(case.k_pages)), (9, 2**31 - 1)):
        case.page_table[0, page] = bad
        left[16 * page : 16 * page + 16] = False
    want = attend(case.q.double(), k[left], v[left], *options(64, MASKS[1]))
    with gpu.playing(multiprocessors=1):
        out = run(gpu.ops, to(gpu, case), MASKS[1]).cpu()
    assert_within(out, want, 2 * error + 0.01 * (want.abs() + truth.abs()) * (dtype != F32))
    case.page_table.fill_(-1)
    assert (run(gpu.ops, to(gpu, case), MASKS[1]) == 0).all()


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_lengths_out_of_range_read_nothing_else(gpu: Gpu, dtype: torch.dtype) -> None:
    for ragged in ([(1, 20), (2, 40)], [(12, 20), (14, 40)]):
        case = make_case("float16", (2, 1, 64, 16), ragged, dtype)
        case.page_table = torch.where(case.page_table < 0, 0, case.page_table)
        case.k_pages.nan_to_num_(0.5)
        case.v_pages.nan_to_num_(0.5)
        for lengths in ([10**9, 40], [20, -3], [0, 2**31 - 1]):
            case.kv_len = torch.tensor(lengths, dtype=torch.int32)
            out = run(gpu.ops, to(gpu, case), MASKS[1])
            assert not out.isnan().any()
        case.kv_len = torch.tensor([20, 40], dtype=torch.int32)
        for starts in ([0, 10**6, 3], [-5, 1, 2**31 - 1], [3, 2, 1]):
            case.query_start = torch.tensor(starts, dtype=torch.int32)
            run(gpu.ops, to(gpu, case), MASKS[0])


def test_nothing_to_do(gpu: Gpu) -> None:
    for ragged in ([], [(0, 0)], [(0, 5), (0, 0)]):
        case = to(gpu, make_case("int8", (2, 1, 64, 16), ragged, F16))
        assert run(gpu.ops, case, MASKS[0]).shape == (0, 2, 64)


# ---- dense ----


def check_dense(
    gpu: Gpu,
    args: tuple[Tensor, ...],
    mask: dict[str, Any],
    bias: dict[str, Tensor] | None = None,
) -> Tensor:
    q, k, v, *starts = args
    dim, dtype, bias = q.shape[2], q.dtype, bias or {}
    device = {name: gpu.to(tensor) for name, tensor in bias.items()}
    out = gpu.ops.attention_dense(*gpu.to(args), *options(dim, mask), **device).cpu()
    truth = exact_dense(args, mask, bias)
    size = exact_dense((q, k, v.abs(), *starts), mask, bias)
    most = q.double().abs().sum(-1).max() * k.double().abs().max() * dim**-0.5
    slack = (2 * EPS * (dim**0.5 * most + 4 * mask.get("softcap", 0.0)) + 8 * EPS) * v.abs().max()
    rounding = 0.0 if dtype == F32 else UNIT[dtype]
    lost = 4 * 2.0**-31 * len(k) * v.double().abs().max()
    error = 2 * slack.double() + rounding * size + lost
    assert_within(out, truth, error + UNIT[dtype] * (truth.abs() + error) + SMALLEST[dtype])
    return out


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("mask", MASKS[:4], ids=str)
def test_dense(gpu: Gpu, mask: dict[str, Any], dtype: torch.dtype) -> None:
    """Cross attention: also more queries than keys, whose first see nothing, and no keys."""
    check_dense(gpu, dense_case([1, 0, 40], [90, 7, 41], (6, 2), 64, dtype), mask)
    args = dense_case([5, 0, 30, 1, 3], [140, 7, 12, 0, 60], (2, 1), 80, dtype)
    out = check_dense(gpu, args, mask)
    assert (out[35] == 0).all()
    if mask["causal"]:
        assert (out[5:23] == 0).all()
    few = dense_case([1, 3, 0, 2], [300, 2, 7, 0], (2, 1), 128, dtype)
    assert (check_dense(gpu, few, mask)[4:] == 0).all()


@pytest.mark.parametrize("count", [1, 20])
def test_dense_biases(gpu: Gpu, count: int) -> None:
    args = dense_case([count, 3], [50, 30], (2, 1), 64, BF16)
    check_dense(gpu, args, MASKS[1], make_bias("sinks alibi_slopes distance_bias", 2, 6))


@pytest.mark.parametrize("count", [2, 20])
def test_dense_strided(gpu: Gpu, count: int) -> None:
    q, k, v, *starts = gpu.to(dense_case([count, 3], [count, 3], (3, 3), 64, F16))
    want = gpu.ops.attention_dense(q, k, v, *starts, 0.125, True, 0, 0.0)
    fused = torch.cat((q, k, v), dim=1)
    parts = fused[:, :3], fused[:, 3:6], fused[:, 6:]
    assert torch.equal(gpu.ops.attention_dense(*parts, *starts, 0.125, True, 0, 0.0), want)
    odd = torch.cat((fused.flatten(1), fused.flatten(1)[:, :1]), dim=1)  # rows are not aligned
    views = [odd[:, i * 192 : i * 192 + 192].unflatten(1, (3, 64)) for i in range(3)]
    out = gpu.ops.attention_dense(*views, *starts, 0.125, True, 0, 0.0)
    torch.testing.assert_close(out, want, rtol=4 * UNIT[F16], atol=4 * UNIT[F16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("ragged", [[(1, 3000), (1, 40)], [(40, 300), (1, 3000)]])
def test_a_graph_captures_it(ragged: list[tuple[int, int]]) -> None:
    case = make_case("int8", (8, 2, 128, 64), ragged, BF16)
    args = [t.cuda() if isinstance(t, Tensor) else t for t in case.args()]
    want = torch.ops.qkernels.attention(*args, *options(128, MASKS[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.qkernels.attention(*args, *options(128, MASKS[0]))
    graph.replay()
    assert torch.equal(out, want)
