"""The CUDA kernel of kv_append against the reference: the same bits, and nothing else written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpus import Gpu
from test_kv_append import RAGGED, ROWS, SHAPES, append_rows, clone, ints, make_case, places
from torch import Tensor

from qkernels.cache import KV_DTYPES

KINDS = list(KV_DTYPES)
REFERENCE = torch.ops.qkernels_reference


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.cpu().float().nan_to_num(-1), theirs.float().nan_to_num(-1))


def check(gpu: Gpu, args: list[Any]) -> list[Any]:
    """Runs both on copies of the same pages; whole pages are compared, so a stray write shows."""
    ours, theirs = gpu.to(clone(args)), clone(args)
    out, expected = gpu.ops.kv_append(*ours), REFERENCE.kv_append(*theirs)
    assert out.is_contiguous() and same(out, expected)
    for a, b in zip(ours[8:], theirs[8:], strict=True):
        assert a is None or same(a, b)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_reference_bitwise(
    gpu: Gpu, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    args = make_case(kind, shape, [*RAGGED[:2], (5, 20), *RAGGED[3:]], dtype)
    before = clone(args)
    check(gpu, args)
    assert all(a is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_without_rotation(gpu: Gpu, kind: str) -> None:
    check(gpu, make_case(kind, SHAPES[1], RAGGED, rope=False))


def test_positions(gpu: Gpu) -> None:
    args = make_case("int8", SHAPES[1], RAGGED)
    args[4] = torch.randint(0, 128, (args[0].shape[0],), dtype=torch.int32)
    args[4][:2] = ints(127, 0)
    check(gpu, args)


def test_one_token(gpu: Gpu) -> None:
    for length in (1, 16, 17, 128):
        check(gpu, make_case("int4", SHAPES[1], [(1, length)]))


def test_many_sequences(gpu: Gpu) -> None:
    """Every token finds its own, also between and behind sequences that bring none."""
    counts = [0, 3, 0, 0, 1, 2, 1, 0]
    check(gpu, make_case("float32", SHAPES[3], [(n, n + 5 * i) for i, n in enumerate(counts)]))


def test_strided_inputs_and_layers(gpu: Gpu) -> None:
    args = make_case("int4", SHAPES[0], [(3, 20), (1, 65)])
    expected = clone(args)
    REFERENCE.kv_append(*expected)
    fused = gpu.to(torch.cat(args[:3], dim=1))
    pools = [gpu.to(torch.stack((t, t, t), dim=1)) for t in args[8:]]
    strided = [*fused.split([9, 3, 3], dim=1), *gpu.to(args[3:8]), *(pool[:, 1] for pool in pools)]
    assert not strided[1].is_contiguous() and not strided[8].is_contiguous()
    gpu.ops.kv_append(*strided)
    for pool, before, after in zip(pools, args[8:], expected[8:], strict=True):
        assert same(pool[:, 1], after)
        assert same(pool[:, 0], before) and same(pool[:, 2], before)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_hard_rows(gpu: Gpu, kind: str) -> None:
    bad = torch.randn(4, 64)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38)):
        bad[row, 9 * row + 5] = value
    v = torch.cat((torch.stack(list(ROWS.values())), bad))
    args = make_case(kind, (1, 1, 64, 16, 2), [(len(v), len(v))], rope=False)
    args[1], args[2] = v[:, None].clone(), v[:, None].flip(0).clone()
    ours = check(gpu, args)
    expected = append_rows(REFERENCE, kind, v)
    assert same(ours[10], expected[10])


def test_indices_out_of_range_write_nothing(gpu: Gpu) -> None:
    """The host does not read them: a token without a place is left out, the others are not."""
    args = make_case("int8", SHAPES[1], [(2, 30), (1, 5), (1, 7), (1, 9)])
    args[7][0, 1], args[7][1, 0] = 1000, -1  # of tokens 0 and 1, of token 2
    args[6][2] = 10**6  # token 3 lies beyond the table
    ours = gpu.to(clone(args))
    out = gpu.ops.kv_append(*ours).cpu()
    assert out[3].isnan().any()  # and beyond the rows of rope
    fine = [x[4:5] if i < 3 else x for i, x in enumerate(args)]
    fine[5], fine[6], fine[7] = ints(0, 1), args[6][3:], args[7][3:]
    expected = clone(fine)
    want = REFERENCE.kv_append(*expected)
    assert torch.equal(out[4], want[0])
    for a, b in zip(ours[8:], expected[8:], strict=True):
        assert same(a, b)
    args[6][2] = -5
    gpu.ops.kv_append(*gpu.to(clone(args)))


def test_indices_that_are_one_too_large(gpu: Gpu) -> None:
    """The first page that is not there, the first row of rope that is not, the first place behind
    the table, of the last sequence, whose memory belongs to nobody."""
    args = make_case("int8", SHAPES[1], [(1, 3), (1, 7), (1, 16)])
    args[3] = args[3][:8].clone()
    args[4] = ints(2, 8, 5)
    args[7][0, 0] = len(args[8])
    args[6][2] = args[7].shape[1] * args[8].shape[2] + 1
    ours = gpu.to(clone(args))
    out = gpu.ops.kv_append(*ours).cpu()
    assert not out[0].isnan().any() and out[1].isnan().any() and not out[2].isnan().any()
    fine = [x[1:2] if i < 3 else x for i, x in enumerate(args)]
    fine[4], fine[5], fine[6], fine[7] = args[4][1:2], ints(0, 1), args[6][1:2], args[7][1:2]
    fine[3] = torch.cat((args[3], torch.full_like(args[3][:1], torch.nan)))
    expected = clone(fine)
    REFERENCE.kv_append(*expected)
    for a, b in zip(ours[8:], expected[8:], strict=True):
        assert same(a, b)


def test_nothing_to_do(gpu: Gpu) -> None:
    for ragged in ([], [(0, 0)], [(0, 5)]):
        args = gpu.to(make_case("int8", SHAPES[0], ragged))
        assert gpu.ops.kv_append(*args).shape == (0, 9, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_captures_it() -> None:
    args = make_case("int8", SHAPES[0], RAGGED)
    theirs = clone(args)
    want = REFERENCE.kv_append(*theirs)
    ours = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    torch.ops.qkernels.kv_append(*ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.qkernels.kv_append(*ours)
    page, slot = places(args)
    ours[8][page.cuda(), :, slot.cuda()] = 0
    graph.replay()
    assert same(out, want)
    assert all(a is None or same(a, b) for a, b in zip(ours[8:], theirs[8:], strict=True))
