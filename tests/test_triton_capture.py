"""Triton kernels of the ops on rows, tables and logits in a captured graph: they wait for nothing,
and read their inputs anew each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import FORMATS, random_plain
from gpus import triton_gpu
from test_sample import settings
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPS = ["norm", "add_norm_quant", "gate_quant", "quantize_act", "embedding", "dequantize", "sample"]
OPS += ["linear of one token", "linear of several", "linear of int8"]


def calls(generator: torch.Generator) -> dict[str, tuple[Callable[[Tensor], object], Tensor]]:
    """Of every op: a function of one input, and that input."""
    gpu = triton_gpu()
    ops = gpu.ops
    x = gpu.to(torch.randn(4, 4096, generator=generator).bfloat16())
    ones = torch.ones(4096, device=x.device)
    weight = gpu.to(random_plain(FORMATS["Q4_K"].spec, 512, 512, generator).pack().op_args())
    ids = gpu.to(torch.randint(0, 512, (4,), generator=generator))
    drawn = gpu.to(settings(4, generator))
    return {
        "norm": (lambda x: ops.norm(x, ones, None, 1e-5, False), x),
        "add_norm_quant": (lambda x: ops.add_norm_quant(x, x, ones, None, 1e-5, False, 32), x),
        "gate_quant": (lambda x: ops.gate_quant(x, x, "silu", 32), x),
        "quantize_act": (lambda x: ops.quantize_act(x, 4096), x),
        "embedding": (lambda i: ops.embedding(i, *weight, torch.bfloat16, 1.0), ids),
        "dequantize": (lambda c: ops.dequantize(c, *weight[1:], torch.bfloat16), weight[0]),
        "sample": (lambda l: ops.sample(l, *drawn), x.float()),
        "linear of one token": (lambda x: ops.linear(x, *weight, None, "float", 0), x[:1, :512]),
        "linear of several": (lambda x: ops.linear(x, *weight, None, "float", 0), x[:, :512]),
        "linear of int8": (lambda x: ops.linear(x, *weight, None, "int8", 256), x[:, :512]),
    }


@pytest.mark.parametrize("name", OPS)
def test_a_graph_captures_it(name: str, generator: torch.Generator) -> None:
    function, given = calls(generator)[name]
    given = given.clone()
    changed = given.flip(-1)
    want = function(changed)  # compiles the kernel, too
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = function(given)
    given.copy_(changed)
    graph.replay()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
