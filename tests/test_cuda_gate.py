"""gate and gate_quant on CUDA, within the bounds that the CPU's kernels are held to."""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu
from numerics import assert_within
from test_gate import ACTIVATIONS, DTYPES, exact, inputs, same

# Rows of pieces of 16 bytes, one and several per thread, several blocks; and rows that are not.
SHAPES = [(0, 64), (1, 8), (1, 1536), (9, 600), (1, 1), (3, 17), (5, 1023), (33, 300)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(
    gpu: Gpu,
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, int],
    generator: torch.Generator,
) -> None:
    gate, up = inputs(*shape, dtype, generator)
    for factor in (up, None):
        got = gpu.ops.gate(gpu.to(gate), gpu.to(factor), activation).cpu()
        assert got.dtype == dtype
        assert_within(got, *exact(gate, factor, activation, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_over_the_whole_range(gpu: Gpu, activation: str) -> None:
    """From where the tail vanishes to where it is 1, in steps that hit both sides of every
    branch."""
    ends = [-1e4, -100.0, -89.0, -88.5, -88.0, -87.0, 0.0, 1e-30, 87.0, 88.5, 100.0, 1e30]
    x = torch.cat([torch.linspace(-15, 15, 20001), torch.linspace(-92, -80, 999)])
    x = torch.cat([x, torch.tensor(ends)])
    got = gpu.ops.gate(gpu.to(x[None]), None, activation).cpu()
    assert_within(got, *exact(x[None], None, activation, torch.float32))


def test_the_tail_of_erf_is_exact_in_relative_terms(gpu: Gpu) -> None:
    """A GPU has fused multiply-adds: what x^2 loses in rounding is known and made good. Without it,
    or added twice, the tail would be off by x^2 / 2 roundings."""
    x = torch.linspace(-12.9, -4, 5003)
    want = x.double() * 0.5 * torch.erfc(-x.double() / 2**0.5)
    got = gpu.ops.gate(gpu.to(x[None]), None, "gelu_erf").cpu()[0]
    assert ((got.double() / want - 1).abs() <= 16 * 2.0**-24).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(gpu: Gpu, activation: str) -> None:
    x = torch.tensor([[torch.inf, torch.nan, -torch.inf, 3e38, -3e38]])
    got = gpu.ops.gate(gpu.to(x), None, activation).cpu()
    assert got[0, 0] == torch.inf and got[0, 1].isnan()
    assert got[0, 3] == x[0, 3] and got[0, 4] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape",
    [(0, 64, 32), (1, 1536, 32), (3, 200, 48), (2, 1000, 1008), (3, 17, 48), (9, 300, 16)],
    ids=str,
)
def test_fused_quantization_is_bitwise_the_composition(
    gpu: Gpu,
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, int, int],
    generator: torch.Generator,
) -> None:
    m, k, group = shape
    gate, up = gpu.to(inputs(m, k, dtype, generator))
    for factor in (up, None):
        got = gpu.ops.gate_quant(gate, factor, activation, group)
        wide = None if factor is None else factor.float()
        composed = gpu.ops.gate(gate.float(), wide, activation)
        want = torch.ops.qkernels_reference.quantize_act(composed.cpu(), group)
        assert same(tuple(t.cpu() for t in got), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_any_stride_apart(gpu: Gpu, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Halves of one matrix, and what keeps one of the addresses from being a multiple of 16."""
    both = gpu.to(torch.randn(9, 2 * 288 + 1, generator=generator).to(dtype))
    even = both[:, :-1].contiguous()
    views = [
        (even[::2, :288], even[::2, 288:]),
        (even[:, 1:257], even[:, 288:544]),
        (even[:, :256], even[:, 289:545]),
        (even[:, :256], both[:, :256]),
        (both[:, :256], even[:, :256]),
        (even[:, :250], even[:, 288:538]),
        (even[:1].expand(3, 576), even[:3]),
    ]
    for gate, up in views:
        dense = gpu.ops.gate(gate.contiguous(), up.contiguous(), "gelu_erf")
        assert torch.equal(gpu.ops.gate(gate, up, "gelu_erf"), dense)
        act = gpu.ops.gate_quant(gate.contiguous(), up.contiguous(), "silu", 32)
        assert same(gpu.ops.gate_quant(gate, up, "silu", 32), act)


def test_bad_arguments(gpu: Gpu) -> None:
    x = gpu.to(torch.randn(4, 64))
    with pytest.raises(RuntimeError, match="gate: up must be float32 like gate, got float16"):
        gpu.ops.gate(x, x.half(), "silu")
    with pytest.raises(RuntimeError, match="gate_quant: gate must be dense"):
        gpu.ops.gate_quant(x.T, None, "silu", 32)
