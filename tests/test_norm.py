"""norm, add_norm, norm_quant, add_norm_quant on every instruction set."""

from __future__ import annotations

import pytest
import torch
from numerics import SMALLEST, U32, UNIT, assert_within

import qkernels as qk

REFERENCE = torch.ops.qkernels_reference
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def exact(x, weight, bias, center, dtype):
    """The norm of x in float64, and the bound of a float32 computation that stores dtype.

    A float32 sum of K terms, in any order, is off by at most K u of the sum of their magnitudes.
    """
    x, w = x.double(), weight.double()
    k = x.shape[1]
    mean = x.mean(1, keepdim=True) if center else torch.zeros(x.shape[0], 1, dtype=torch.float64)
    mean_error = (k + 2) * U32 * x.abs().mean(1, keepdim=True) if center else torch.zeros_like(mean)
    d = x - mean
    d_error = mean_error + U32 * d.abs() * center
    square = d.square().mean(1, keepdim=True)
    square_error = (2 * d.abs() * d_error + d_error.square()).mean(1, keepdim=True) + (k + 4) * U32 * square
    rstd = 1 / (square + EPS).sqrt()
    rstd_relative = square_error / (square + EPS) + 4 * U32  # twice the first-order term
    y = d * rstd * w
    error = (d_error * rstd * w.abs()) * (1 + rstd_relative) + y.abs() * (rstd_relative + 4 * U32)
    if bias is not None:
        y = y + bias.double()
        error = error + U32 * (y.abs() + error)
    return y, error + UNIT[dtype] * (y.abs() + error) + SMALLEST[dtype]


def inputs(m, k, dtype, generator, *, with_bias=True):
    x = torch.randn(m, k, generator=generator) + 0.5
    x[:, ::37] *= 20
    weight = torch.randn(k, generator=generator)
    bias = torch.randn(k, generator=generator) if with_bias else None
    return x.to(dtype), torch.randn(m, k, generator=generator).to(dtype), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (1, 576), (3, 17), (5, 1023), (33, 300), (2, 8192)])
def test_norm_and_add_norm(isa, dtype, center, shape, generator):
    x, residual, weight, bias = inputs(*shape, dtype, generator, with_bias=center)
    for ops in (isa.ops, REFERENCE):
        assert_within(ops.norm(x, weight, bias, EPS, center), *exact(x, weight, bias, center, dtype))
        y, total = ops.add_norm(x, residual, weight, bias, EPS, center)
        assert torch.equal(total, x + residual)
        assert_within(y, *exact(total, weight, bias, center, dtype))
        assert y.dtype == total.dtype == dtype


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(0, 64, 32), (1, 576, 32), (3, 17, 48), (5, 1023, 1024), (2, 5000, 5008), (9, 300, 16)])
def test_fused_quantization_is_bitwise_the_composition(isa, dtype, center, shape, generator):
    m, k, group = shape
    x, residual, weight, bias = inputs(m, k, dtype, generator)
    got = isa.ops.norm_quant(x, weight, bias, EPS, center, group)
    assert same(got, isa.ops.quantize_act(isa.ops.norm(x.float(), weight, bias, EPS, center), group))
    *act, total = isa.ops.add_norm_quant(x, residual, weight, bias, EPS, center, group)
    assert torch.equal(total, x + residual)
    assert same(act, isa.ops.norm_quant(total, weight, bias, EPS, center, group))
    reference = REFERENCE.norm_quant(x, weight, bias, EPS, center, group)
    # Norms differ by rounding, so a value at a tie may get the next code.
    assert (got[0].int() - reference[0].int()).abs().amax().item() <= 1 if m else got[0].shape == reference[0].shape
    assert torch.allclose(got[1], reference[1], rtol=2 * (k + 8) * U32 + 1e-6)


def test_variance_does_not_cancel(isa):
    """Two passes: the mean of squares minus the squared mean would lose everything here."""
    k = 1024
    x = 4096.0 + torch.arange(k).remainder(2).float()[None]
    y = isa.ops.norm(x, torch.ones(k), None, 0.0, True)
    assert torch.equal(y, torch.where(x > 4096.0, 1.0, -1.0))


def test_rows_any_stride_apart_and_teams(isa, with_threads, generator):
    x, residual, weight, bias = inputs(40, 700, torch.float16, generator)
    x, residual = x[::2, 50:650], residual[1::2, 30:630]
    weight, bias = weight[:600], bias[:600]
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        results.append(isa.ops.add_norm_quant(x, residual, weight, bias, EPS, True, 32))
    dense = isa.ops.add_norm_quant(x.contiguous(), residual.contiguous(), weight, bias, EPS, True, 32)
    assert all(same(r, dense) for r in results)


def test_nan_stays_in_its_row(isa):
    x = torch.ones(3, 64)
    x[1, 7] = torch.nan
    y = isa.ops.norm(x, torch.ones(64), None, EPS, False)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    assert isa.ops.norm_quant(x, torch.ones(64), None, EPS, False, 32)[1].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_bad_arguments_raise_alike():
    x, w = torch.randn(4, 64), torch.ones(64)
    cases = [
        ("norm", (x.int(), w, None, EPS, False), "x must be float32, float16 or bfloat16, got int32"),
        ("norm", (x.T, w, None, EPS, False), "x must be dense in its last dimension"),
        ("norm", (x[:, :0], w[:0], None, EPS, False), "x needs at least one column"),
        ("norm", (x, w.half(), None, EPS, False), "weight must be float32, got float16"),
        ("norm", (x, w[:32], None, EPS, False), r"weight must be \[64\], got \[32\]"),
        ("norm", (x, w, w[:32], EPS, False), r"bias must be \[64\], got \[32\]"),
        ("norm", (x, w, None, -1.0, False), "eps must not be negative, got -1"),
        ("norm", (x, w, None, float("nan"), False), "eps must not be negative, got nan"),
        ("add_norm", (x, x.half(), w, None, EPS, False), "residual must be float32 like x, got float16"),
        ("add_norm", (x, x[:2], w, None, EPS, False), r"residual must be \[4, 64\] like x, got \[2, 64\]"),
        ("norm_quant", (x, w, None, EPS, False, 40), "act_group must be a positive multiple of 16, got 40"),
        ("add_norm_quant", (x, x, w, None, EPS, False, -16), "act_group must be a positive multiple of 16, got -16"),
    ]
    for name, args, message in cases:
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        for ops, given in ((torch.ops.qkernels, args), (REFERENCE, args), (torch.ops.qkernels, meta)):
            with pytest.raises(RuntimeError, match=message):
                getattr(ops, name)(*given)


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_a_gradient_is_refused(namespace):
    ops = getattr(torch.ops, namespace)
    x, w = torch.randn(4, 64, requires_grad=True), torch.ones(64)
    with pytest.raises(RuntimeError, match="qkernels::norm: has no backward"):
        ops.norm(x, w, None, EPS, False).sum().backward()
    with pytest.raises(RuntimeError, match="qkernels::add_norm: has no backward"):
        ops.add_norm(x, x, w, None, EPS, False)[1].sum().backward()
    assert not any(t.requires_grad for t in ops.norm_quant(x, w, None, EPS, False, 32))


def test_opcheck_and_compile(generator):
    x, residual, weight, bias = inputs(5, 100, torch.bfloat16, generator)
    ops = torch.ops.qkernels
    torch.library.opcheck(ops.norm.default, (x, weight, bias, EPS, True))
    torch.library.opcheck(ops.add_norm.default, (x, residual, weight, None, EPS, False))
    torch.library.opcheck(ops.norm_quant.default, (x, weight, None, EPS, False, 48))
    torch.library.opcheck(ops.add_norm_quant.default, (x, residual, weight, bias, EPS, True, 16))

    def block(x, residual):
        act, total = qk.ops.add_norm_quant(x, residual, weight, eps=EPS, act_group=32)
        return qk.ops.norm(total, weight, bias, EPS, True), *act

    assert same(torch.compile(block, fullgraph=True, backend="aot_eager")(x, residual), block(x, residual))
