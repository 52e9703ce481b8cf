"""The residual of linear and linear_quant: one more float32 addition, before the one rounding."""

from __future__ import annotations

import pytest
import torch
from cases import LINEAR_SPECS, random_plain, random_x
from conftest import Isa
from numerics import assert_within, linear_exact
from torch import Tensor

from qkernels import ops, reference
from qkernels.ops.linear import default_act_group
from qkernels.quant import PackedWeight, QuantSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTS = ["int8", "float"]
NAMES = [str(QuantSpec(4, 32, zero="minimum")), "W8 g32 float16 zero", "W6 g16 int8"]


def float32_result(
    isa: Isa, x: Tensor, packed: PackedWeight, bias: Tensor | None, act: str, group: int
) -> Tensor:
    """What the kernel has before the residual."""
    if act == "float":
        return isa.ops.linear(x.float(), *packed.op_args(), bias, act, group)
    quant = isa.ops.quantize_act(x, group)
    return isa.ops.linear_quant(*quant, *packed.op_args(), bias, torch.float32)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_is_a_separate_addition_in_float32(
    isa: Isa, name: str, dtype: torch.dtype, act: str, generator: torch.Generator
) -> None:
    """Bit for bit, in vectors and in the rows that are left of one."""
    for n, k in ((64, 32), (77, 100), (130, 576)):
        packed = random_plain(LINEAR_SPECS[name], n, k, generator).pack()
        group = default_act_group(packed)
        for m in (0, 1, 3, 17, 130):
            x = random_x(m, k, dtype, generator)
            residual = torch.randn(m, n, generator=generator).to(dtype)
            bias = torch.randn(n, generator=generator) if m % 2 else None
            got = isa.ops.linear(x, *packed.op_args(), bias, act, group, residual)
            before = float32_result(isa, x, packed, bias, act, group)
            assert got.dtype == dtype and torch.equal(got, (before + residual.float()).to(dtype))
            if act == "int8":
                quant = isa.ops.quantize_act(x, group)
                again = isa.ops.linear_quant(*quant, *packed.op_args(), bias, dtype, residual)
                assert torch.equal(got, again)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_bound_of_rounding(
    isa: Isa, dtype: torch.dtype, act: str, generator: torch.Generator
) -> None:
    plain = random_plain(QuantSpec(4, 32, zero="minimum"), 77, 100, generator)
    x, bias = random_x(5, 100, dtype, generator), torch.randn(77, generator=generator)
    residual = torch.randn(5, 77, generator=generator).to(dtype)
    seen = x.double()
    if act == "int8":
        codes, scale, _ = reference.quantize_act(x, 32)
        seen = (codes.double().view(5, -1, 32) * scale.double()[..., None]).view(5, -1)[:, :100]
    exact, bound = linear_exact(seen, plain, bias, dtype, residual)
    for op in (isa.ops.linear, torch.ops.qkernels_reference.linear):
        assert_within(op(x, *plain.pack().op_args(), bias, act, 32, residual), exact, bound)


@pytest.mark.parametrize("act", ACTS)
def test_long_rows_add_it_once(isa: Isa, act: str, generator: torch.Generator) -> None:
    """Sums of many tokens over long rows come about in chunks of columns."""
    packed = random_plain(QuantSpec(8, 32), 70, 17000, generator).pack()
    x = random_x(13, 17000, torch.float32, generator)
    residual = torch.randn(13, 70, generator=generator)
    got = isa.ops.linear(x, *packed.op_args(), None, act, 32, residual)
    alone = isa.ops.linear(x, *packed.op_args(), None, act, 32)
    assert torch.equal(got, alone + residual)


@pytest.mark.parametrize("act", ACTS)
def test_rows_a_stride_apart(isa: Isa, act: str, generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 100, generator).pack()
    x = random_x(6, 100, torch.bfloat16, generator)
    wide = torch.randn(12, 200, generator=generator).bfloat16()
    for residual in (wide[::2, 30:100], wide[:1, 30:100].expand(6, 70), wide[:6, :70]):
        got = isa.ops.linear(x, *packed.op_args(), None, act, 32, residual)
        dense = isa.ops.linear(x, *packed.op_args(), None, act, 32, residual.contiguous())
        assert not residual.is_contiguous() and torch.equal(got, dense)


def test_leading_dimensions(generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 100, generator).pack()
    x, residual = torch.randn(2, 3, 100), torch.randn(2, 3, 70)
    got = ops.linear(x, packed, residual=residual)
    assert torch.equal(got, ops.linear(x, packed) + residual)
    one = ops.linear(x[0, 0], packed, residual=residual[0, 0])
    assert torch.equal(one, ops.linear(x[0, 0], packed) + residual[0, 0])
    for other in (residual.view(3, 2, 70), residual.view(6, 70), residual[..., :-1]):
        with pytest.raises(RuntimeError, match=r"residual must be \[2, 3, 70\] like the result"):
            ops.linear(x, packed, residual=other)


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference", "fake"])
def test_errors(namespace: str, generator: torch.Generator) -> None:
    device = "meta" if namespace == "fake" else "cpu"
    of = getattr(torch.ops, "qkernels" if namespace == "fake" else namespace)
    weight = random_plain(QuantSpec(4, 32), 70, 100, generator).pack().to(device).op_args()
    x, residual = torch.zeros(3, 100, device=device), torch.zeros(3, 70, device=device)
    act = of.quantize_act(x, 32)
    for bad, said in (
        (residual.half(), "residual must be float32 like the result, got float16"),
        (residual[0], r"residual must have 2 dimensions, got \[70\]"),
        (residual[:2], r"residual must be \[3, 70\] like the result, got \[2, 70\]"),
        (residual[:, :69], r"residual must be \[3, 70\] like the result, got \[3, 69\]"),
        (residual.t().contiguous().t(), "residual must be dense in its last dimension"),
    ):
        with pytest.raises(RuntimeError, match=f"qkernels::linear: {said}"):
            of.linear(x, *weight, None, "float", 0, bad)
        with pytest.raises(RuntimeError, match=f"qkernels::linear_quant: {said}"):
            of.linear_quant(*act, *weight, None, torch.float32, bad)
    with pytest.raises(RuntimeError, match="residual must be float16 like the result, got float32"):
        of.linear_quant(*act, *weight, None, torch.float16, residual)


def test_on_another_device(generator: torch.Generator) -> None:
    weight = random_plain(QuantSpec(4, 32), 70, 100, generator).pack().to("meta").op_args()
    x, residual = torch.zeros(3, 100, device="meta"), torch.zeros(3, 70)
    with pytest.raises(RuntimeError, match="residual is on cpu, but x is on meta"):
        torch.ops.qkernels.linear(x, *weight, None, "float", 0, residual)
    act = torch.ops.qkernels.quantize_act(x, 32)
    with pytest.raises(RuntimeError, match="residual is on cpu, but act_codes is on meta"):
        torch.ops.qkernels.linear_quant(*act, *weight, None, torch.float32, residual)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_opcheck(namespace: str, act: str, generator: torch.Generator) -> None:
    of = getattr(torch.ops, namespace)
    weight = random_plain(QuantSpec(4, 32), 70, 100, generator).pack().op_args()
    x = torch.randn(3, 100, requires_grad=act == "float")
    residual = torch.randn(3, 70, requires_grad=True)
    torch.library.opcheck(of.linear.default, (x, *weight, torch.randn(70), act, 32, residual))
    quant = of.quantize_act(x.detach(), 32)
    args = (*quant, *weight, None, torch.float32, residual.detach())
    torch.library.opcheck(of.linear_quant.default, args)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("x_grad", [False, True])
def test_gradient(x_grad: bool, backend: str, act: str, generator: torch.Generator) -> None:
    from qkernels import backends

    plain = random_plain(QuantSpec(4, 32, zero="integer", act_order=True), 70, 100, generator)
    packed = plain.pack()
    x = torch.randn(2, 3, 100, requires_grad=x_grad)
    residual = torch.randn(2, 3, 70, requires_grad=True)
    up = torch.randn(2, 3, 70, generator=generator)
    with backends.backend(backend):
        ops.linear(x, packed, act=act, residual=residual).backward(up)
    assert residual.grad is not None and torch.equal(residual.grad, up)
    if x_grad:
        torch.testing.assert_close(x.grad, up @ plain.dequantize())


def test_linear_quant_has_no_gradient(generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 100, generator).pack()
    act = ops.quantize_act(torch.randn(3, 100), 32)
    residual = torch.randn(3, 70, requires_grad=True)
    with pytest.raises(RuntimeError, match="linear_quant: has no backward"):
        ops.linear_quant(act, packed, residual=residual)
    with torch.no_grad():
        got = ops.linear_quant(act, packed, residual=residual)
    assert torch.equal(got, ops.linear_quant(act, packed) + residual.detach())


def test_no_forward_mode_derivative(generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 100, generator).pack()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="residual has a tangent"),
    ):
        residual = torch.autograd.forward_ad.make_dual(torch.randn(3, 70), torch.ones(3, 70))
        ops.linear(torch.randn(3, 100), packed, residual=residual)


@pytest.mark.parametrize("act", ACTS)
def test_compiles(act: str, generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 100, generator).pack()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, residual: Tensor) -> Tensor:
        return ops.linear(x * 2, packed, act=act, residual=residual) + 1

    for m in (3, 5):
        x = torch.randn(m, 100, requires_grad=True)
        residual = torch.randn(m, 70, requires_grad=True)
        y = run(x, residual)
        assert torch.equal(y, ops.linear(x * 2, packed, act=act, residual=residual) + 1)
        y.sum().backward()
        assert residual.grad is not None and torch.equal(residual.grad, torch.ones(m, 70))
        assert x.grad is not None and x.grad.abs().sum() > 0
