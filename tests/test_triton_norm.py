"""The norm ops in Triton: the tests of the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu, triton_gpu
from numerics import assert_within
from test_cuda_norm import *  # noqa: F403
from test_cuda_norm import EPS, inputs
from test_norm import exact, same

# Interpreted, they are numpy's warnings of what the op is meant to do.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


@pytest.mark.parametrize("shape", [(3, 1), (17, 33), (2, 20000)])
@pytest.mark.parametrize("center", [False, True])
def test_within_the_bounds_of_the_cpu(gpu: Gpu, center: bool, shape: tuple[int, int]) -> None:
    """A column, several rows in a program, the loop; rows any stride apart."""
    x, residual, weight, bias = inputs(*shape, torch.float16)
    y, total = gpu.ops.add_norm(*gpu.to([x, residual, weight, bias]), EPS, center)
    assert torch.equal(total.cpu(), x + residual)
    assert_within(y.cpu(), *exact(total.cpu(), weight, bias, center, torch.float16))


def test_opcheck_and_compile(gpu: Gpu) -> None:
    x, residual, weight, bias = gpu.to(inputs(2, 100, torch.bfloat16))
    ops = gpu.ops
    torch.library.opcheck(ops.norm.default, (x, weight, bias, EPS, True))
    torch.library.opcheck(ops.add_norm.default, (x, residual, weight, None, EPS, False))
    torch.library.opcheck(ops.norm_quant.default, (x, weight, None, EPS, False, 48))
    torch.library.opcheck(ops.add_norm_quant.default, (x, residual, weight, bias, EPS, True, 16))

    def block(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *act, total = ops.add_norm_quant(x, residual, weight, None, EPS, False, 32)
        return ops.norm(total, weight, bias, EPS, True), *act

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert same(compiled(x, residual), block(x, residual))
