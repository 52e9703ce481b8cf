"""gate and gate_quant on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import SMALLEST, U32, UNIT, assert_within

import qkernels as qk
from qkernels.ops.gate import ACTIVATIONS

REFERENCE = torch.ops.qkernels_reference
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TINY = 2.0**-125  # exp is 0 below -87.3, so results smaller than this may be 0


def exact(gate, up, activation, dtype):
    """activation(gate) * up in float64, and the bound of the kernel's error.

    The roundings of the argument of exp count times that argument: none for silu, three for
    gelu_tanh, one for gelu_erf's x^2 / 2 on sets without a fused multiply-add. The polynomial of
    erfcx cancels by up to 8, in its eleven steps; all else is a few roundings.
    """
    x = gate.double()
    if activation == "silu":
        y, relative = x / (1 + torch.exp(-x)), torch.full_like(x, 8)
    elif activation == "gelu_tanh":
        argument = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        y, relative = x / (1 + torch.exp(-argument)), 8 + 4 * argument.abs().clamp(max=90)
    elif activation == "gelu_erf":
        y, relative = x * 0.5 * torch.erfc(-x / math.sqrt(2)), 64 + x.square() / 2
    else:
        y, relative = x.clamp(min=0), torch.zeros_like(x)
    error = relative * U32 * y.abs() + TINY * (1 + x.abs())
    if up is not None:
        y, error = y * up.double(), error * up.double().abs()
        error = error + U32 * y.abs()
    return y, error + UNIT[dtype] * (y.abs() + error) + SMALLEST[dtype]


def inputs(m, k, dtype, generator, scale=4.0):
    gate = torch.randn(m, k, generator=generator) * scale
    return gate.to(dtype), torch.randn(m, k, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (1, 1536), (3, 17), (5, 1023), (33, 300)])
def test_gate(isa, dtype, activation, shape, generator):
    gate, up = inputs(*shape, dtype, generator)
    assert_within(isa.ops.gate(gate, up, activation), *exact(gate, up, activation, dtype))
    assert_within(isa.ops.gate(gate, None, activation), *exact(gate, None, activation, dtype))
    assert isa.ops.gate(gate, up, activation).dtype == dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_over_the_whole_range(isa, activation):
    """From where the tail vanishes to where it is 1, in steps that hit both sides of every
    branch."""
    x = torch.cat(
        [
            torch.linspace(-15, 15, 20001),
            torch.tensor([-1e4, -100.0, -88.5, -87.0, 0.0, 1e-30, 87.0, 100.0, 1e30]),
        ]
    )
    assert_within(
        isa.ops.gate(x[None], None, activation), *exact(x[None], None, activation, torch.float32)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(isa, activation):
    x = torch.tensor([[torch.inf, torch.nan, -torch.inf, 3e38, -3e38]])
    got = isa.ops.gate(x, None, activation)  # not torch's: its gelu overflows here on AVX-512
    assert got[0, 0] == torch.inf and got[0, 1].isnan()
    assert got[0, 3] == x[0, 3] and got[0, 4] == 0


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(0, 64, 32), (1, 1536, 32), (3, 17, 48), (2, 5000, 5008), (9, 300, 16)]
)
def test_fused_quantization_is_bitwise_the_composition(isa, dtype, activation, shape, generator):
    m, k, group = shape
    gate, up = inputs(m, k, dtype, generator)
    got = isa.ops.gate_quant(gate, up, activation, group)
    assert same(
        got, isa.ops.quantize_act(isa.ops.gate(gate.float(), up.float(), activation), group)
    )
    got = isa.ops.gate_quant(gate, None, activation, group)
    assert same(got, isa.ops.quantize_act(isa.ops.gate(gate.float(), None, activation), group))


def test_rows_any_stride_apart_and_teams(isa, with_threads, generator):
    both = torch.randn(20, 2 * 3000, generator=generator)
    gate, up = both[::2, :3000], both[::2, 3000:]
    dense = isa.ops.gate(gate.contiguous(), up.contiguous(), "gelu_erf")
    act = isa.ops.gate_quant(gate.contiguous(), up.contiguous(), "silu", 32)
    for threads in (1, 2, 3):
        with_threads(threads)
        assert torch.equal(isa.ops.gate(gate, up, "gelu_erf"), dense)
        assert same(isa.ops.gate_quant(gate, up, "silu", 32), act)


def test_bad_arguments_raise_alike():
    x = torch.randn(4, 64)
    cases = [
        (
            "gate",
            (x.double(), None, "silu"),
            "gate must be float32, float16 or bfloat16, got float64",
        ),
        ("gate", (x.T, None, "silu"), "gate must be dense in its last dimension"),
        ("gate", (x[:, :0], None, "silu"), "gate needs at least one column"),
        ("gate", (x, x.half(), "silu"), "up must be float32 like gate, got float16"),
        ("gate", (x, x[:2], "silu"), r"up must be \[4, 64\] like gate, got \[2, 64\]"),
        (
            "gate",
            (x, None, "swish"),
            'activation must be silu, gelu_tanh, gelu_erf or relu, got "swish"',
        ),
        ("gate_quant", (x, None, "silu", 8), "act_group must be a positive multiple of 16, got 8"),
    ]
    for name, args, message in cases:
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        for ops, given in (
            (torch.ops.qkernels, args),
            (REFERENCE, args),
            (torch.ops.qkernels, meta),
        ):
            with pytest.raises(RuntimeError, match=message):
                getattr(ops, name)(*given)


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_a_gradient_is_refused(namespace):
    x = torch.randn(4, 64, requires_grad=True)
    ops = getattr(torch.ops, namespace)
    with pytest.raises(RuntimeError, match="qkernels::gate: has no backward"):
        ops.gate(x, None, "silu").sum().backward()
    with pytest.raises(RuntimeError, match="qkernels::gate_quant: has no backward"):
        ops.gate_quant(x, x, "silu", 32)[1].sum().backward()


def test_opcheck_and_compile(generator):
    gate, up = inputs(5, 100, torch.float16, generator)
    torch.library.opcheck(torch.ops.qkernels.gate.default, (gate, up, "gelu_tanh"))
    torch.library.opcheck(torch.ops.qkernels.gate.default, (gate, None, "relu"))
    torch.library.opcheck(torch.ops.qkernels.gate_quant.default, (gate, up, "silu", 48))

    def mlp(gate, up):
        return qk.ops.gate(gate, up), *qk.ops.gate_quant(gate, up, "gelu_erf", act_group=32)

    assert same(torch.compile(mlp, fullgraph=True, backend="aot_eager")(gate, up), mlp(gate, up))
