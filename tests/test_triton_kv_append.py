"""kv_append in Triton: the tests of the CUDA kernel, over fewer shapes, as it is interpreted."""

# Tests of the CUDA kernels are run by being imported.
# ruff: noqa: F401

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpus import Gpu, triton_gpu
from test_cuda_kv_append import (
    KINDS,
    check,
    same,
    test_hard_rows,
    test_indices_out_of_range_write_nothing,
    test_indices_that_are_one_too_large,
    test_many_sequences,
    test_nothing_to_do,
    test_one_token,
    test_strided_inputs_and_layers,
)
from test_kv_append import SHAPES, clone, ints, make_case
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
RAGGED = [(1, 1), (1, 100), (5, 20), (0, 20)]


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_reference_bitwise(gpu: Gpu, kind: str, shape: tuple[int, ...]) -> None:
    for dtype in (F32, F16, BF16) if shape == SHAPES[1] else (BF16,):
        args = make_case(kind, shape, RAGGED, dtype)
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


def test_more_sequences_than_are_searched_at_once(gpu: Gpu) -> None:
    ragged = [(int(i in (3, 255, 256, 299)), 3) for i in range(300)]
    check(gpu, make_case("float16", SHAPES[3], ragged))


def test_more_heads_than_a_program_takes(gpu: Gpu) -> None:
    check(gpu, make_case("int4", (27, 9, 128, 16, 128), [(1, 20)]))


# ---- as a torch op ----


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_opcheck(gpu: Gpu, kind: str) -> None:
    args = make_case(kind, (2, 1, 32, 16, 32), [(1, 5), (2, 20)])
    torch.library.opcheck(gpu.ops.kv_append.default, tuple(gpu.to(args)))


def test_compiles(gpu: Gpu) -> None:
    args = gpu.to(make_case("int8", (2, 1, 32, 16, 32), [(1, 5), (2, 20)]))
    eager = clone(args)

    def step(*a: Any) -> Tensor:
        q = gpu.ops.kv_append(*a)
        return gpu.ops.attention(q, *a[5:], 0.125, True, 0, 0.0)

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(out, step(*eager))
    assert all(torch.equal(a, b) for a, b in zip(args[8:], eager[8:], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_captures_it(gpu: Gpu) -> None:
    args = make_case("int8", SHAPES[0], RAGGED)
    theirs, ours = clone(args), gpu.to(args)
    want = torch.ops.qkernels_reference.kv_append(*theirs)
    gpu.ops.kv_append(*clone(ours))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu.ops.kv_append(*ours)
    graph.replay()
    assert same(out, want)
    assert all(a is None or same(a, b) for a, b in zip(ours[8:], theirs[8:], strict=True))
