"""attention and attention_dense in Triton: the tests of the CUDA kernels, those that go over shapes
with fewer of them, as kernels are interpreted."""

# Tests of the CUDA kernels are run by being imported.
# ruff: noqa: F401

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import (
    KINDS,
    MASKS,
    dense_case,
    exact,
    make_bias,
    make_case,
    options,
    rows_of,
    run,
)
from gpus import Gpu, triton_gpu
from numerics import UNIT, assert_within
from test_cuda_attention import (
    BF16,
    F16,
    F32,
    PRODUCTS,
    check,
    check_dense,
    test_bfloat16_queries_beyond_float16,
    test_dense_biases,
    test_dense_strided,
    test_extreme_codes_and_scales,
    test_lengths_out_of_range_read_nothing_else,
    test_nothing_to_do,
    test_pages_out_of_range_are_not_there,
    test_queries_that_the_pages_do_not_fit,
    test_rows_that_are_not_aligned,
    test_scores_that_are_all_minus_infinity,
    to,
)
from torch import Tensor

from qkernels import triton
from qkernels.reference.attention import attend
from qkernels.triton import attention as launches
from qkernels.triton import tuning

DECODE = [(1, 1), (1, 270), (3, 40), (0, 9)]
PREFILL = [(20, 40)]
MIXED = [(9, 30), (8, 20), (0, 5), (1, 70), (24, 24)]
# Heads 1, 3, 7 and 16 to one; dims that are powers of two and others; pages that tiles of keys lie
# in, and smaller ones.
SHAPES = [(3, 1, 128, 64), (2, 2, 80, 16), (7, 1, 48, 48), (1, 1, 512, 16), (2, 1, 272, 16)]
SHAPES += [(16, 1, 16, 128), (2, 1, 64, 32)]


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how many multiprocessors there are."""

    def play(count: int) -> None:
        monkeypatch.setattr(launches, "multiprocessors", lambda device: count)

    return play


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ragged", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_shapes(gpu: Gpu, ragged: list[tuple[int, int]], shape: tuple[int, int, int, int]) -> None:
    for kind, dtype in (("bfloat16", BF16), ("int4", F16)):
        check(gpu, make_case(kind, shape, ragged, dtype), MASKS[0])


@pytest.mark.parametrize("kind, dtype", [*PRODUCTS, *((kind, F32) for kind in KINDS)], ids=str)
def test_pages(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    check(gpu, make_case(kind, (4, 2, 32, 16), DECODE, dtype), MASKS[0])
    check(gpu, make_case(kind, (4, 2, 32, 64), MIXED, dtype), MASKS[0])


@pytest.mark.parametrize("mask", MASKS[1:], ids=str)
def test_masks(gpu: Gpu, mask: dict[str, Any]) -> None:
    for kind, dtype in (("float16", F16), ("int8", BF16)):
        for ragged in (DECODE, PREFILL, [(70, 150)]):
            check(gpu, make_case(kind, (2, 1, 64, 16), ragged, dtype), mask)


@pytest.mark.parametrize(
    "names", ["sinks", "alibi_slopes", "distance_bias", "sinks alibi_slopes distance_bias"]
)
def test_biases(gpu: Gpu, names: str) -> None:
    for ragged, mask in ((DECODE, MASKS[0]), ([(20, 30)], MASKS[3])):
        for (kind, dtype), reach in ((PRODUCTS[0], 9), (("int8", F32), 0)):
            case = make_case(kind, (4, 2, 48, 16), ragged, dtype)
            check(gpu, case, mask, make_bias(names, 4, reach))


# ---- launch choices ----


@pytest.mark.parametrize("kind, dtype", [PRODUCTS[0], PRODUCTS[5], ("float32", F32)], ids=str)
def test_splits(gpu: Gpu, kind: str, dtype: torch.dtype, processors: Any) -> None:
    """Lengths around multiples of tiles and splits; most splits of the short ones have nothing."""
    ragged = [(1, length) for length in (1, 64, 385, 511, 1025)]
    case = make_case(kind, (2, 1, 64, 16), ragged, dtype)
    for count in (3, 5):  # four programs each: 2 and 4 splits of 5 sequences
        processors(count)
        check(gpu, case, MASKS[0], make_bias("sinks", 2, 0))
    check(gpu, case, {"causal": True, "window": 200})


def test_more_splits_than_are_merged_at_once(gpu: Gpu, processors: Any) -> None:
    processors(16)
    for bias in ({}, make_bias("sinks", 1, 0)):
        check(gpu, make_case("int8", (1, 1, 80, 16), [(1, 2900)], F16), MASKS[0], bias)


def test_splits_of_sequences_beside_longer_ones(gpu: Gpu, processors: Any) -> None:
    processors(16)
    mixed = [(8, 530), (20, 30), (1, 700), (0, 600), (9, 600)]
    for heads in (1, 3):
        case = make_case("float16", (heads, 1, 64, 16), mixed, F16)
        check(gpu, case, MASKS[0], make_bias("sinks", heads, 0))


@pytest.mark.parametrize("kind, dtype", [("int8", F16), ("bfloat16", BF16)], ids=str)
def test_splits_of_one_prefill(gpu: Gpu, kind: str, dtype: torch.dtype, processors: Any) -> None:
    processors(9)
    case = make_case(kind, (3, 1, 64, 16), [(50, 800)], dtype)
    check(gpu, case, MASKS[0], make_bias("sinks", 3, 0))


def test_tokens_that_crowd_in_one_sequence(gpu: Gpu, processors: Any) -> None:
    """Few on average, so that one launch takes them all; a sequence then has several tiles."""
    ragged = [(0, 5), (21, 290), (0, 1), (0, 513), (2, 2)]
    for count in (1, 20):
        processors(count)
        check(gpu, make_case("float16", (3, 1, 64, 16), ragged, BF16), MASKS[0])


def test_many_sequences(gpu: Gpu) -> None:
    """More than are searched at once."""
    ragged = [(int(i % 97 == 5 or i > 297), 3) for i in range(300)]
    check(gpu, make_case("float16", (1, 1, 16, 16), ragged, F16), MASKS[0])


def test_the_number_of_new_tokens(gpu: Gpu) -> None:
    for count in (7, 8, 9):
        check(gpu, make_case("float16", (2, 1, 64, 16), [(count, 40)], F16), MASKS[0])
        mixed = [(count, 40), (30, 30), (1, 9), (0, 3)]
        check(gpu, make_case("float16", (2, 1, 64, 16), mixed, F16), MASKS[0])


def test_tiles_that_rows_do_not_fill(gpu: Gpu) -> None:
    """Rows of a token may lie in two tiles."""
    for count in (42, 43, 44):
        check(gpu, make_case("float16", (3, 1, 32, 16), [(count, 50)], F16), MASKS[0])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[launches.Tile]:
    """The tiles that the kernel is launched with."""
    if not triton.interpreted():
        pytest.skip("a GPU may have no room for the tiles of others")
    tiles: list[launches.Tile] = []
    kernel = launches.attention_kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def launch(*args: Any, BM: int, BN: int, num_warps: int, **constants: Any) -> None:
                tiles.append(launches.Tile(BM, BN, num_warps, constants["num_stages"]))
                kernel[grid](*args, BM=BM, BN=BN, num_warps=num_warps, **constants)

            return launch

    monkeypatch.setattr(launches, "attention_kernel", Recorded())
    return tiles


# Tiles of sm_90 and later are those of the interpreter, which other tests have.
CLASSES = [("sm80", 64, "float16"), ("sm80", 128, "bfloat16"), ("sm90", 64, "int8")]
CLASSES += [("sm100", 128, "float16")]
CLASSES += [
    (gpu_class, dim, kind)
    for gpu_class in ("gfx9", "gfx11")
    for dim, kind in ((64, "float16"), (64, "int8"), (128, "bfloat16"), (128, "int8"))
]


@pytest.mark.parametrize("gpu_class, dim, kind", CLASSES)
def test_tiles_of_every_class_of_gpu(
    gpu: Gpu,
    launched: list[launches.Tile],
    gpu_class: str,
    dim: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a real one: of decode the most rows and few, in two splits; of prefill."""
    monkeypatch.setattr(tuning, "class_of", lambda device: gpu_class)
    monkeypatch.setattr(launches, "choose_splits", lambda *args: 2)
    dtype = BF16 if kind == "bfloat16" else F16

    def tile(rows: int, decode: bool) -> launches.Tile:
        codes = kind == "int8"
        return launches.choose_tile(dim, rows, dtype, gpu_class, decode=decode, codes=codes)

    check(gpu, make_case(kind, (8, 1, dim, 16), [(8, 140)], dtype), MASKS[0])
    assert launched == [tile(64, True)]
    mixed = [(17, 80), (1, 140)]  # the tokens of each are not known, so taken to be one
    check(gpu, make_case(kind, (8, 1, dim, 64), mixed, dtype), MASKS[0])
    assert launched[1:] == [tile(8, True), tile(8, False)]


@pytest.mark.parametrize("kind, dtype", [PRODUCTS[0], PRODUCTS[6]], ids=str)
def test_the_same_bits_every_time(gpu: Gpu, kind: str, dtype: torch.dtype, processors: Any) -> None:
    processors(16)
    case = make_case(kind, (2, 1, 64, 16), [(1, 700), (12, 20), (2, 40)], dtype)
    moved = [t if t is None else gpu.to(t) for t in case.args()]
    first, second = (gpu.ops.attention(*moved, 0.125, True, 0, 0.0) for _ in range(2))
    assert torch.equal(first, second)


# ---- layouts and numbers ----


@pytest.mark.parametrize("ragged", [DECODE[1:], PREFILL], ids=["decode", "prefill"])
def test_strided_queries_and_layers(gpu: Gpu, ragged: list[tuple[int, int]]) -> None:
    """q may be a slice of a fused projection; pages may be a layer's slice of a larger pool."""
    case = make_case("int4", (4, 2, 64, 32), ragged, F16)
    args: list[Any] = [t if t is None else gpu.to(t) for t in case.args()]
    expected = gpu.ops.attention(*args, 0.125, True, 0, 0.0)
    fused = torch.full((len(case.q), 6 * 64 + 1), torch.nan, dtype=F16, device=gpu.device)
    fused[:, : 4 * 64] = args[0].flatten(1)
    args[0] = fused[:, : 4 * 64].view(-1, 4, 64)
    args[4:] = [torch.stack((torch.zeros_like(t), t), dim=1)[:, 1] for t in args[4:]]
    assert not args[0].is_contiguous() and not args[4].is_contiguous()
    assert torch.equal(gpu.ops.attention(*args, 0.125, True, 0, 0.0), expected)


@pytest.mark.parametrize("ragged", [[(1, 400)], [(10, 150)]], ids=["decode", "prefill"])
def test_scores_that_grow(gpu: Gpu, ragged: list[tuple[int, int]]) -> None:
    """The reference of a row and, with codes, the scale of the values are raised again and
    again."""
    for kind, dtype in PRODUCTS[::2]:
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


@pytest.mark.parametrize("count", [1, 12])
def test_value_scales_that_grow_from_tile_to_tile(gpu: Gpu, count: int) -> None:
    """Sums so far are brought to the scale of the later ones, which do not outweigh them."""
    case = make_case("int8", (1, 1, 64, 16), [(count, 250)], F16)
    assert case.v_scale is not None
    for page, of_sequence in enumerate(case.page_table[0].tolist()):
        case.v_scale[of_sequence, :, 0] *= 2.0 ** (page // 4)
    check(gpu, case, MASKS[1])


def test_many_small_weights_are_not_lost(gpu: Gpu) -> None:
    """One key has all weight but 2^-24.4 of it for each other, less than float16 has steps for; its
    value is 0, theirs are 1."""
    case = make_case("float16", (1, 1, 16, 16), [(1, 64)], F16)
    for pages in (case.k_pages, case.v_pages):
        pages.fill_(1)
    case.k_pages[case.page_table[0, 0].long(), :, 0] = 2
    case.v_pages[case.page_table[0, 0].long(), :, 0] = 0
    case.q.fill_(16.91 / 16 * 16**0.5)
    truth, _ = exact(case, MASKS[0])
    out = run(gpu.ops, to(gpu, case), MASKS[0]).cpu().double()
    assert ((out - truth).abs() <= 0.1 * truth).all()  # as they are stored: of 2^-18.4 by 2^-25


@pytest.mark.parametrize("count", [1, 12])
def test_tiles_of_keys_whose_page_is_out_of_range(gpu: Gpu, count: int) -> None:
    """Pages that hold whole tiles are looked up once for all their keys."""
    case = make_case("bfloat16", (2, 1, 64, 128), [(count, 500)], BF16)
    left = torch.ones(500, dtype=torch.bool)
    k, v = (rows_of(t, None, case.page_table[0], 500, 64) for t in (case.k_pages, case.v_pages))
    for page, bad in ((0, -1), (2, len(case.k_pages))):
        case.page_table[0, page] = bad
        left[128 * page : 128 * page + 128] = False
    want = attend(case.q.double(), k[left], v[left], *options(64, MASKS[1]))
    out = run(gpu.ops, to(gpu, case), MASKS[1]).cpu()
    assert_within(
        out,
        want,
        4 * UNIT[BF16] * attend(case.q.double(), k[left], v[left].abs(), *options(64, MASKS[1])),
    )


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "int4"])
def test_each_key_and_dim_is_where_it_belongs(gpu: Gpu, kind: str) -> None:
    """A query that sees one key alone returns its value, whose codes are all different."""
    dtype = BF16 if kind == "bfloat16" else F16
    case = make_case(kind, (1, 1, 96, 16), [(10, 40)], dtype)
    check(gpu, case, {"causal": True, "window": 1})
    # q picks one dim of K a token: scores are the keys' entries there, told apart by a scale of 8.
    case.q.zero_()
    for token, dim in enumerate((0, 1, 2, 7, 8, 13, 31, 50, 94, 95)):
        case.q[token, 0, dim] = 8 * 96**0.5
    check(gpu, case, MASKS[1])


@pytest.mark.parametrize("kind, dtype", [("int8", F16), ("int4", F16), ("int4", F32)], ids=str)
def test_nan_of_an_integer_key_reaches_only_who_sees_it(
    gpu: Gpu, kind: str, dtype: torch.dtype
) -> None:
    """Such a key has a NaN scale (kv_append)."""
    case = make_case(kind, (3, 1, 64, 16), [(10, 10), (1, 12)], dtype)
    mask = {"causal": True, "window": 5}
    clean = run(gpu.ops, to(gpu, case), mask).cpu()
    assert case.k_scale is not None and case.v_scale is not None
    for scale in (case.k_scale, case.v_scale):
        scale[case.page_table[0, 0].long(), :, 0, 9] = torch.nan
        scale[case.page_table[1, 0].long(), :, 0, 3] = torch.nan  # before the window
    out = run(gpu.ops, to(gpu, case), mask).cpu()
    assert out[9].isnan().all()
    assert torch.equal(out[[*range(9), 10]], clean[[*range(9), 10]])


# ---- dense ----


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_dense(gpu: Gpu, dtype: torch.dtype) -> None:
    """Cross attention: also more queries than keys, whose first see nothing, and no keys."""
    for mask in MASKS[:4]:
        args = dense_case([5, 0, 30, 1, 3], [140, 7, 12, 0, 60], (2, 1), 80, dtype)
        out = check_dense(gpu, args, mask)
        assert (out[35] == 0).all()
        if mask["causal"]:
            assert (out[5:23] == 0).all()
    few = dense_case([1, 3, 0, 2], [300, 2, 7, 0], (2, 1), 128, dtype)
    assert (check_dense(gpu, few, MASKS[0])[4:] == 0).all()


def test_a_window_beyond_every_key_changes_nothing(gpu: Gpu) -> None:
    q, k = torch.randn(6, 2, 32), torch.randn(3, 1, 32)  # the first queries stand before all keys
    starts = torch.tensor([0, 6], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    without, with_one = (
        gpu.ops.attention_dense(*gpu.to((q, k, k, *starts)), 0.2, False, window, 0.0)
        for window in (0, 2**63 - 1)
    )
    torch.testing.assert_close(without, with_one, rtol=1e-6, atol=1e-6)


# ---- as torch ops ----


def test_opcheck(gpu: Gpu) -> None:
    case = make_case("int4", (2, 1, 32, 16), [(1, 40), (2, 3)])
    args = [t if t is None else gpu.to(t) for t in case.args()]
    torch.library.opcheck(gpu.ops.attention.default, (*args, 0.125, True, 0, 0.0))
    dense = gpu.to(dense_case([1, 3], [5, 3], (2, 1), 32, F32))
    torch.library.opcheck(gpu.ops.attention_dense.default, (*dense, 0.125, True, 0, 0.0))


def test_compiles(gpu: Gpu) -> None:
    def both(args: list[Any], dense: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return (
            gpu.ops.attention(*args, 0.125, True, 9, 0.0) * 2,
            gpu.ops.attention_dense(*dense, 0.125, False, 0, 0.0) * 2,
        )

    case = make_case("int8", (2, 1, 32, 16), [(1, 40), (2, 3)])
    args = [t if t is None else gpu.to(t) for t in case.args()]
    dense = gpu.to(dense_case([1, 3], [5, 3], (2, 1), 32, F32))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(args, dense), both(args, dense), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ragged", [[(1, 3000), (1, 40)], [(40, 300), (1, 3000)]])
def test_a_graph_captures_it(gpu: Gpu, ragged: list[tuple[int, int]]) -> None:
    case = to(gpu, make_case("int8", (8, 2, 128, 64), ragged, BF16))
    want = run(gpu.ops, case, MASKS[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(gpu.ops, case, MASKS[0])
    graph.replay()
    assert torch.equal(out, want)
