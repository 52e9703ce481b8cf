"""gate and gate_quant in Triton: the tests of the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu, triton_gpu
from test_cuda_gate import *  # noqa: F403
from test_gate import inputs, same

# Interpreted, they are numpy's warnings of what the op is meant to do.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


def test_groups_beyond_a_tile(gpu: Gpu, generator: torch.Generator) -> None:
    gate, up = gpu.to(inputs(1, 300, torch.float16, generator))
    got = gpu.ops.gate_quant(gate, up, "silu", 16400)
    composed = gpu.ops.gate(gate.float(), up.float(), "silu")
    want = torch.ops.qkernels_reference.quantize_act(composed.cpu(), 16400)
    assert same(tuple(t.cpu() for t in got), want)


def test_opcheck_and_compile(gpu: Gpu, generator: torch.Generator) -> None:
    gate, up = gpu.to(inputs(2, 100, torch.float16, generator))
    torch.library.opcheck(gpu.ops.gate.default, (gate, up, "gelu_tanh"))
    torch.library.opcheck(gpu.ops.gate.default, (gate, None, "relu"))
    torch.library.opcheck(gpu.ops.gate_quant.default, (gate, up, "silu", 48))

    def mlp(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gpu.ops.gate(gate, up, "silu"), *gpu.ops.gate_quant(gate, up, "gelu_erf", 32)

    assert same(torch.compile(mlp, fullgraph=True, backend="aot_eager")(gate, up), mlp(gate, up))
