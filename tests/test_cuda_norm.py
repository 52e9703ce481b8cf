"""The norm ops' CUDA kernels against the reference: every kernel that launch_norm picks, by type,
length and alignment.
"""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu

EPS = 1e-5
# A warp per row with 1, 2 and 4 pieces, a block with 1, 2, 4 (and 8), 512 threads, the loop; 577 is
# not aligned.
COLUMNS = [64, 256, 576, 1024, 2048, 4096, 8192, 16384, 20000, 577]
# A block has 8 rows that a warp takes each, or one.
SHAPES = [(0, 64), (1, 64), (8, 64), (70, 64), (9, 256), (9, 576), (1, 1024), (9, 1024)]
SHAPES += [(2, 2048), (2, 4096), (2, 8192), (1, 16384), (1, 20000), (3, 577), (2, 20)]


def inputs(m: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(m * 100003 + k)
    x, residual = (torch.randn(m, 2 * k, generator=generator)[:, :k].to(dtype) for _ in range(2))
    weight, bias = (torch.randn(k, generator=generator) for _ in range(2))
    return x, residual, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_norm(gpu: Gpu, m: int, k: int, center: bool, dtype: torch.dtype) -> None:
    x, residual, weight, bias = inputs(m, k, dtype)
    want, total = torch.ops.qkernels_reference.add_norm(
        x, residual, weight, bias if center else None, EPS, center
    )
    device = gpu.to([x, residual, weight, bias if center else None])
    got, got_total = gpu.ops.add_norm(*device, EPS, center)
    assert torch.equal(got_total.cpu(), total)
    # One rounding to the type, and the order of the sums: K additions of float32.
    bound = torch.finfo(dtype).eps * want.float().abs() + k**0.5 * 2.0**-23 * (
        1 + want.float().abs()
    )
    assert ((got.cpu().float() - want.float()).abs() <= bound).all()
    alone = gpu.ops.norm(got_total, *device[2:], EPS, center)
    assert torch.equal(alone, got)


def shape_of_row(columns: int) -> int:
    """Which kernel of launch_norm takes float32 rows of so many columns; -1: the loop."""
    ends = [128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    return next((i for i, end in enumerate(ends) if columns <= end), -1)


@pytest.mark.parametrize("group", [16, 32, 48, 256, 4096])
@pytest.mark.parametrize("k", COLUMNS)
def test_norm_quant_is_quantize_act_of_the_norm(gpu: Gpu, k: int, group: int) -> None:
    """Bit for bit where both run the same kernel; float32 in, so that the norm's own output has not
    been rounded."""
    x, residual, weight, bias = inputs(9 if k <= 1024 else 3, k, torch.float32)
    x[1, k // 2], x[2] = torch.nan, 0
    device = gpu.to([x, residual, weight, bias])
    y, total = gpu.ops.add_norm(*device, EPS, False)
    want = torch.ops.qkernels_reference.quantize_act(y.cpu(), group)
    *got, got_total = gpu.ops.add_norm_quant(*device, EPS, False, group)
    assert torch.equal(torch.nan_to_num(got_total), torch.nan_to_num(total))
    if shape_of_row(k) == shape_of_row(-(-k // group) * group):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(torch.nan_to_num(one.cpu().float()), torch.nan_to_num(other.float()))
        return
    codes, scale, sums = (t.cpu() for t in got)  # squares were summed in another order
    torch.testing.assert_close(scale, want[1], rtol=k**0.5 * 2.0**-23, atol=0, equal_nan=True)
    assert (codes.int() - want[0].int()).abs().max() <= 1
    assert torch.equal(sums.int(), codes.int().unflatten(1, (-1, 16)).sum(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [64, 1040, 65])
def test_values_that_are_quantized_by_another_rule(gpu: Gpu, k: int, dtype: torch.dtype) -> None:
    """x of +-1 and eps = 0 are normalized to +-1, so that the weight is what is quantized. A group
    each: the smallest amax that is used and the one below, the largest float, infinity, codes that
    are the values, ties."""
    tiny = torch.tensor(2.0**-100)
    columns = -(-k // 16) * 16
    y = torch.linspace(0.1, 1, columns).view(-1, 16)
    y = torch.where(torch.arange(16) % 3 == 0, -y, y)
    special = [tiny, tiny.nextafter(tiny * 0), torch.tensor(3.4028234663852886e38), torch.inf]
    for i in range(len(y)):
        if i % 6 < 4:
            y[i] *= min(float(special[i % 6]), 1.0)
            y[i, 3] = special[i % 6]
        else:
            y[i] = torch.arange(16) * 8 + (0.5 if i % 6 == 5 else 0)
            y[i, 15] = -127
    weight = y.flatten()[:k].contiguous()
    x = torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0).expand(3, k).contiguous()
    want = torch.ops.qkernels_reference.quantize_act(x * weight, 16)
    got = gpu.ops.norm_quant(*gpu.to([x.to(dtype), weight, None]), 0.0, False, 16)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(torch.nan_to_num(one.cpu().float()), torch.nan_to_num(other.float()))


@pytest.mark.parametrize("center", [False, True])
def test_squares_that_overflow(gpu: Gpu, center: bool) -> None:
    """Their sum is infinite, one over its root zero."""
    x = torch.linspace(-1, 1, 64).repeat(2, 1) * 1e30
    x[1] = torch.linspace(-1, 1, 64)
    args = (torch.ones(64), None, EPS, center)
    want = torch.ops.qkernels_reference.norm(x, *args)
    got = gpu.ops.norm(gpu.to(x), *gpu.to(args[:2]), *args[2:]).cpu()
    assert not want[0].any()
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tensors_on_two_devices() -> None:
    x, _, weight, _ = inputs(2, 64, torch.float32)
    with pytest.raises(RuntimeError, match=r"weight is on cpu, but x is on cuda:0"):
        torch.ops.qkernels.norm(x.cuda(), weight, None, EPS, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_captures_it() -> None:
    x, _, weight, _ = (t.cuda() for t in inputs(4, 4096, torch.bfloat16))
    want = torch.ops.qkernels.norm(x, weight, None, EPS, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.qkernels.norm(x, weight, None, EPS, False)
    graph.replay()
    assert torch.equal(y, want)
