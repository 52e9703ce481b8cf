"""attention and attention_dense: every instruction set against float64 over the same stored
numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    EPS,
    FLOATS,
    KINDS,
    MASKS,
    RAGGED,
    SHAPES,
    Case,
    dense_case,
    exact,
    exact_dense,
    make_case,
    options,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qkernels
from qkernels.ops.attention import attention, attention_dense


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Threads change nothing but the time, as the tests of that show; where cores are busy, waiting
    for them is slow."""
    with_threads(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(isa: Any, kind: str, shape: tuple[int, int, int, int]) -> None:
    case = make_case(kind, shape, RAGGED)
    for mask in MASKS:
        out = run(isa.ops, case, mask)
        assert out.shape == case.q.shape and out.is_contiguous()
        truth, slack = exact(case, mask)
        worst = ((out.double() - truth).abs() / slack).max()
        assert worst <= 1, (mask, float(worst))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_against_float64(kind: str) -> None:
    case = make_case(kind, SHAPES[0], RAGGED)
    for mask in MASKS:
        truth, slack = exact(case, mask)
        assert (
            (run(torch.ops.qkernels_reference, case, mask).double() - truth).abs() <= slack
        ).all(), mask


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
def test_low_precision_queries(isa: Any, kind: str, dtype: torch.dtype) -> None:
    case = make_case(kind, SHAPES[0], RAGGED, dtype)
    out = run(isa.ops, case, MASKS[0])
    assert out.dtype == dtype
    truth, slack = exact(case, MASKS[0])
    rounding = (truth.to(dtype).double() - truth).abs()
    # Rounding a result that is off by the slack may fall on the other neighbour: one unit in the
    # last place.
    unit = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
    assert ((out.double() - truth).abs() <= torch.maximum(2 * rounding, unit) + slack).all()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 12, 71])
def test_every_count_of_rows(isa: Any, group: int) -> None:
    """Rows are taken by threes, twos and ones, converted as loaded or once per tile: the same
    result either way."""
    for kind in ("float16", "int4"):
        case = make_case(kind, (group, 1, 32, 16), [(1, 40), (3, 17)])
        truth, slack = exact(case, MASKS[0])
        assert ((run(isa.ops, case, MASKS[0]).double() - truth).abs() <= slack).all()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_long_context(isa: Any, kind: str) -> None:
    """More keys than 64 chunks of 256, so that chunks get longer; and a window that starts in the
    middle of a chunk."""
    case = make_case(kind, (2, 1, 16, 64), [(1, 16500), (2, 4100)])
    for mask in ({"causal": True}, {"causal": True, "window": 300}):
        truth, slack = exact(case, mask)
        assert ((run(isa.ops, case, mask).double() - truth).abs() <= 2 * slack).all()


def test_large_scores_do_not_overflow(isa: Any) -> None:
    case = make_case("float32", SHAPES[0], RAGGED)
    case.q *= 1e4
    truth, slack = exact(case, MASKS[0])
    out = run(isa.ops, case, MASKS[0])
    assert torch.isfinite(out).all()
    assert ((out.double() - truth).abs() <= slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_its_own_sequence_only(isa: Any, kind: str) -> None:
    case = make_case(kind, SHAPES[0], [(3, 200), (1, 140)])
    clean = run(isa.ops, case, MASKS[0])
    case.q[1] = torch.nan
    out = run(isa.ops, case, MASKS[0])
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nan_of_an_integer_key_reaches_only_who_sees_it(isa: Any, kind: str) -> None:
    """Such a key has a NaN scale (kv_append)."""
    case = make_case(kind, SHAPES[0], [(10, 10), (1, 12)])
    clean = run(isa.ops, case, {"causal": True, "window": 5})
    assert case.k_scale is not None and case.v_scale is not None
    for scale in (case.k_scale, case.v_scale):
        scale[case.page_table[0, 0].long(), :, 0, 9] = torch.nan
        scale[case.page_table[1, 0].long(), :, 0, 3] = torch.nan  # before the window
    out = run(isa.ops, case, {"causal": True, "window": 5})
    assert out[9].isnan().all()
    assert torch.equal(out[[*range(9), 10]], clean[[*range(9), 10]])


def flat_case(kind: str, dim: int, keys: int) -> Case:
    """One query of ones over keys of the largest code, which stands for 1."""
    case = make_case(kind, (2, 1, dim, 64), [(1, keys)])
    case.q.fill_(1.0)
    assert case.k_scale is not None and case.v_scale is not None
    for codes in (case.k_pages, case.v_pages):
        codes.fill_(255)
    for scale in (case.k_scale, case.v_scale):
        scale[..., 0, :] = 1 / (15 if kind == "int4" else 255)
        scale[..., 1, :] = 0
    return case


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dim", [16, 256, 272, 512])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_largest_products_of_integer_pages(isa: Any, kind: str, dim: int, sign: float) -> None:
    case = flat_case(kind, dim, 100)
    case.q *= sign
    truth, slack = exact(case, MASKS[0])
    assert ((run(isa.ops, case, MASKS[0]).double() - truth).abs() <= slack).all()


def test_many_small_weights_are_not_lost(isa: Any) -> None:
    """One key has half of 2^-15 of all others' weights each, so that a weight alone is less than
    half a step of 16 bits; its value is 0, theirs are 1."""
    case = flat_case("int8", 16, 64)
    case.v_pages[:, :, 0] = 0
    case.k_pages[:, :, 1:] = 0
    case.q.fill_(11.1 / 16**0.5)  # times 16, times D ** -0.5
    truth, _ = exact(case, MASKS[0])
    out = run(isa.ops, case, MASKS[0]).double()
    assert 9e-4 < float(truth.max()) < 1e-3
    assert ((out - truth).abs() <= 0.05 * truth).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_and_queries_of_zero_and_the_smallest(isa: Any, kind: str) -> None:
    for k_scale, v_scale, q in ((0.0, 0.01, 1.0), (0.01, 0.0, 1.0), (0.01, 0.01, 0.0)):
        case = make_case(kind, (4, 2, 32, 16), [(1, 40), (9, 17)])
        assert case.k_scale is not None and case.v_scale is not None
        case.k_scale[..., 0, :], case.v_scale[..., 0, :] = k_scale, v_scale
        case.q *= q
        truth, slack = exact(case, MASKS[0])
        assert ((run(isa.ops, case, MASKS[0]).double() - truth).abs() <= slack).all()
        case.v_scale[..., 0, :] = 2.0**-24  # the smallest of float16
        truth, slack = exact(case, MASKS[0])
        assert ((run(isa.ops, case, MASKS[0]).double() - truth).abs() <= slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_threads_nor_batch(
    isa: Any, kind: str, with_threads: Callable[[int], None]
) -> None:
    ragged = [*RAGGED, (1, 1000)]
    case = make_case(kind, SHAPES[0], ragged)
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        results.append(run(isa.ops, case, MASKS[2]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for b, (count, _) in enumerate(ragged):
        first = int(case.query_start[b])
        alone = case.alone(b)
        assert torch.equal(run(isa.ops, alone, MASKS[2]), results[0][first : first + count])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_page_order_does_not_matter(data: st.DataObject) -> None:
    page = data.draw(st.sampled_from([16, 32, 64]))
    keys = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    ragged = [(data.draw(st.integers(0, length)), length) for length in keys]
    kind = data.draw(st.sampled_from(KINDS))
    case = make_case(kind, (4, 2, 32, page), ragged)
    before = run(torch.ops.qkernels, case, MASKS[0])
    order = torch.tensor(data.draw(st.permutations(range(case.k_pages.shape[0]))))
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order))
    table = torch.where(case.page_table >= 0, where[case.page_table.clamp(min=0).long()].int(), -1)
    moved = [None if t is None else t[order] for t in case.cache()]
    after = run(
        torch.ops.qkernels, Case(case.q, case.query_start, case.kv_len, table, *moved), MASKS[0]
    )
    assert torch.equal(before, after)
    truth, slack = exact(case, MASKS[0])
    if before.numel():
        assert ((before.double() - truth).abs() <= slack).all()


def test_chunked_prefill_is_prefill(isa: Any) -> None:
    case = make_case("float32", SHAPES[0], [(150, 150)])
    truth, slack = exact(case, MASKS[0])
    for first, last in ((0, 64), (64, 65), (65, 150)):
        chunk = Case(
            case.q[first:last],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([last], dtype=torch.int32),
            case.page_table,
            *case.cache(),
        )
        out = run(isa.ops, chunk, MASKS[0])
        assert ((out.double() - truth[first:last]).abs() <= slack[first:last]).all()


def test_strided_queries_and_layers(isa: Any) -> None:
    """q may be a slice of a fused projection; pages may be a layer's slice of a larger pool."""
    case = make_case("int8", SHAPES[0], RAGGED)
    expected = run(isa.ops, case, MASKS[0])
    heads, dim = case.q.shape[1:]
    fused = torch.full((case.q.shape[0], (heads + 6) * dim), torch.nan)
    fused[:, : heads * dim] = case.q.flatten(1)
    q = fused[:, : heads * dim].view(-1, heads, dim)
    wide = [torch.stack((torch.zeros_like(t), t), dim=1)[:, 1] for t in case.cache()]
    assert not q.is_contiguous() and not wide[0].is_contiguous()
    strided = Case(q, case.query_start, case.kv_len, case.page_table, *wide)
    assert torch.equal(run(isa.ops, strided, MASKS[0]), expected)


def test_nothing_to_do(isa: Any) -> None:
    for ragged in ([], [(0, 0)], [(0, 5), (0, 0)]):
        case = make_case("float32", SHAPES[0], ragged)
        assert run(isa.ops, case, MASKS[0]).shape == (0, 9, 64)


# ---- dense ----


def sdpa(args: tuple[Tensor, ...], causal: bool) -> Tensor:
    q, k, v, query_start, kv_start = args
    out = []
    for b in range(len(query_start) - 1):
        part = q[query_start[b] : query_start[b + 1]].transpose(0, 1)[None]
        rows = slice(int(kv_start[b]), int(kv_start[b + 1]))
        keys, values = (t[rows].transpose(0, 1)[None] for t in (k, v))
        n, m = part.shape[2], keys.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
        out.append(
            F.scaled_dot_product_attention(part, keys, values, mask, enable_gqa=True)[0].transpose(
                0, 1
            )
        )
    return torch.cat(out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, dim", [((9, 3), 64), ((4, 4), 80), ((8, 2), 128), ((2, 1), 16)])
def test_dense_against_sdpa(
    isa: Any, heads: tuple[int, int], dim: int, causal: bool, dtype: torch.dtype
) -> None:
    args = dense_case([1, 77, 130], [200, 77, 131], heads, dim, dtype)
    out = isa.ops.attention_dense(*args, dim**-0.5, causal, 0, 0.0)
    truth = sdpa(tuple(t.double() if t.is_floating_point() else t for t in args), causal)
    torchs = (sdpa(args, causal).double() - truth).abs().max()
    assert (out.double() - truth).abs().max() <= 2 * torchs + 4 * EPS


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_dense_masks_and_cross_attention(isa: Any, mask: dict[str, Any]) -> None:
    args = dense_case([5, 0, 90, 1, 3], [140, 7, 30, 0, 300], (6, 2), 32, torch.float32)
    out = isa.ops.attention_dense(*args, *options(32, mask))
    truth = torch.ops.qkernels_reference.attention_dense(*args, *options(32, mask)).double()
    exact64 = exact_dense(args, mask)
    torchs = (truth - exact64).abs().max()
    assert (out.double() - exact64).abs().max() <= 2 * torchs + 16 * EPS * (
        1 + mask.get("softcap", 0.0)
    )
    if mask["causal"]:
        assert (
            out[5:65] == 0
        ).all()  # the first 60 of 90 queries stand before the first of 30 keys
    assert (out[95] == 0).all()  # no keys at all


def test_a_window_beyond_every_key_changes_nothing(isa: Any) -> None:
    q, k = torch.randn(6, 2, 32), torch.randn(3, 1, 32)  # the first queries stand before all keys
    starts = torch.tensor([0, 6], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    without, with_one = (
        isa.ops.attention_dense(q, k, k, *starts, 0.2, False, window, 0.0)
        for window in (0, 2**63 - 1)
    )
    assert torch.equal(without, with_one)


def test_dense_strided(isa: Any) -> None:
    q, k, v, *starts = dense_case([50, 70], [50, 70], (3, 3), 64, torch.float16)
    fused = torch.cat((q, k, v), dim=1)
    parts = fused[:, :3], fused[:, 3:6], fused[:, 6:]
    out = isa.ops.attention_dense(*parts, *starts, 0.125, False, 0, 0.0)
    assert torch.equal(out, isa.ops.attention_dense(q, k, v, *starts, 0.125, False, 0, 0.0))


def test_dense_bits_do_not_depend_on_threads(isa: Any, with_threads: Callable[[int], None]) -> None:
    args = dense_case([1, 200, 3], [1000, 200, 300], (4, 1), 64, torch.float32)
    results = []
    for threads in (1, 2):
        with_threads(threads)
        results.append(isa.ops.attention_dense(*args, 0.125, True, 0, 0.0))
    assert torch.equal(*results)


# ---- as torch ops ----


@pytest.mark.parametrize("kind", ["float16", "int4"])
def test_opcheck(kind: str) -> None:
    case = make_case(kind, SHAPES[0], RAGGED)
    torch.library.opcheck(torch.ops.qkernels.attention.default, (*case.args(), 0.125, True, 0, 0.0))


def test_opcheck_dense() -> None:
    args = dense_case([1, 7], [20, 7], (4, 2), 32, torch.float32)
    torch.library.opcheck(torch.ops.qkernels.attention_dense.default, (*args, 0.125, True, 0, 0.0))


def test_compiles() -> None:
    case = make_case("int8", SHAPES[0], RAGGED)
    compiled = torch.compile(
        lambda *args: attention(*args, window=9) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*case.args()), attention(*case.args(), window=9) * 2)
    args = dense_case([1, 7], [20, 7], (4, 2), 32, torch.float32)
    dense = torch.compile(attention_dense, fullgraph=True, backend="aot_eager")
    assert torch.equal(dense(*args), attention_dense(*args))


def test_reference_is_a_backend() -> None:
    case = make_case("float32", SHAPES[0], RAGGED)
    with qkernels.backend("reference"):
        out = attention(*case.args())
    assert torch.equal(out, run(torch.ops.qkernels_reference, case, MASKS[0]))
