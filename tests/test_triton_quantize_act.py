"""quantize_act in Triton: the tests of the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu, triton_gpu
from test_cuda_quantize_act import *  # noqa: F403
from test_quantize_act import assert_same


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


def test_opcheck_and_compile(gpu: Gpu, generator: torch.Generator) -> None:
    x = gpu.to(torch.randn(2, 100, generator=generator))
    torch.library.opcheck(gpu.ops.quantize_act.default, (x, 48))

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gpu.ops.quantize_act(x, 32)

    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), gpu.ops.quantize_act(x, 32))
