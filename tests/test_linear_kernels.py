"""linear and linear_quant on the CPU: every instruction set against the reference, over weights,
shapes and dtypes.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import Isa
from torch import Tensor

import qkernels  # noqa: F401  (defines the ops and loads the native library)
from qkernels.quant import PackedWeight, PlainWeight, QuantSpec, layout
from qkernels.quant.spec import BITS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def ops(isa: Isa) -> Any:
    """The ops of one instruction set, which is in use."""
    return isa.ops


def random_weight(spec: QuantSpec, n: int, k: int, seed: int = 0) -> PackedWeight:
    """A weight of random codes, scales around 0.01 and zeros of every value that the spec has."""
    g = torch.Generator().manual_seed(seed)
    weight = PackedWeight.empty(spec, n, k)
    groups, blocks = spec.groups(k), -(-k // 256)
    codes = torch.randint(0, 1 << spec.bits, (n, k), generator=g, dtype=torch.uint8)
    zero = block_scale = block_zero = None
    if spec.two_level:
        top = 16 if spec.scale == "uint4" else 64
        low = 0 if spec.scale == "uint4" or spec.zero == "minimum" else -64
        if spec.scale == "uint4":
            scale = torch.randint(0, 256, (n, groups), generator=g, dtype=torch.uint8)
        else:
            scale = torch.randint(low, top, (n, groups), generator=g, dtype=torch.int8)
        block_scale = (torch.rand(n, blocks, generator=g) * 0.002).half()
        if spec.zero == "minimum":
            block_zero = (torch.rand(n, blocks, generator=g) * 0.004).half()
            if spec.scale != "uint4":
                zero = torch.randint(0, top, (n, groups), generator=g, dtype=torch.int8)
    else:
        scale = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(spec.scale_dtype)
        if spec.zero == "integer":
            zero = torch.randint(0, 1 << spec.bits, (n, groups), generator=g, dtype=torch.uint8)
        elif spec.zero == "minimum":
            zero = (torch.randn(n, groups, generator=g) * 0.1).to(spec.scale_dtype)
    weight.write_rows(0, PlainWeight(spec, codes, scale, zero, block_scale, block_zero))
    return weight


@functools.lru_cache(maxsize=64)
def prepared(spec: QuantSpec, n: int, k: int) -> tuple[PackedWeight, Tensor, Tensor]:
    """A random weight; W [N, K] float64; the magnitude of its terms.

    The kernels sum scale * dot and the zero part separately, so the terms are those of w = scale *
    code - shift, and what their float32 roundings are relative to is |scale * code| + |shift|.
    """
    weight = random_weight(spec, n, k)
    w = torch.ops.qkernels_reference.dequantize(*weight.op_args(), torch.float32).double()
    codes = torch.ops.qkernels_reference.unpack(*weight.op_args()).double()
    code_part = spread(weight) * codes
    return weight, w, code_part.abs() + (w - code_part).abs()


def spread(weight: PackedWeight) -> Tensor:
    """The scale of every element [N, K]."""
    ones = PackedWeight(**{**vars_of(weight), "codes": _filled(weight, 1)})
    zeros = PackedWeight(**{**vars_of(weight), "codes": _filled(weight, 0)})
    args = (torch.float32,)
    one = torch.ops.qkernels_reference.dequantize(*ones.op_args(), *args)
    return one.double() - torch.ops.qkernels_reference.dequantize(*zeros.op_args(), *args).double()


def vars_of(weight: PackedWeight) -> dict[str, object]:
    return {name: getattr(weight, name) for name in type(weight).__dataclass_fields__}


def _filled(weight: PackedWeight, code: int) -> Tensor:
    """Codes of the weight, all of them `code`."""
    every = torch.full((weight.n, weight.k), code, dtype=torch.uint8)
    return layout.pack(every, weight.spec.bits, weight.group, weight.spec.two_level)


def quantized(x: Tensor, group: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The three tensors of x, and the float64 values that they stand for [M, K]."""
    codes, scale, sums = torch.ops.qkernels_reference.quantize_act(x, group)
    m, kx = codes.shape
    value = codes.double().view(m, kx // group, group) * scale.double()[..., None]
    return (codes, scale, sums), value.view(m, kx)[:, : x.shape[1]]


def assert_close(y: Tensor, want: Tensor, magnitude: Tensor, terms: int) -> None:
    """|y - want| within the roundings of `terms` float32 additions of that magnitude, and one to
    y's dtype.
    """
    eps32, eps = torch.finfo(torch.float32).eps, torch.finfo(y.dtype).eps
    bound = (terms + 4) * eps32 * magnitude + eps * want.abs() + torch.finfo(y.dtype).tiny
    worst = ((y.double() - want).abs() / bound).max().item() if y.numel() else 0.0
    assert worst <= 1, f"error is {worst:.3g} times the bound"
    assert torch.isfinite(y).all()


def check_int8(
    ops, spec: QuantSpec, m: int, n: int, k: int, act_group: int, dtype=torch.float32, bias=True
) -> None:
    weight, w, magnitude = prepared(spec, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)
    b = torch.randn(n, generator=torch.Generator().manual_seed(2)) if bias else None
    act, value = quantized(x, act_group)
    want, bound = value @ w.T, value.abs() @ magnitude.T
    if b is not None:
        want, bound = want + b.double(), bound + b.double().abs()
    y = ops.linear_quant(*act, *weight.op_args(), b, dtype)
    assert y.shape == (m, n) and y.dtype == dtype
    assert_close(y, want, bound, 2 * k // min(weight.group, act_group))


FLAT = [
    QuantSpec(bits, group, scale, zero)
    for bits in (4, 8)
    for group, scale, zero in (
        (32, "float16", "symmetric"),
        (32, "float16", "minimum"),
        (32, "float16", "integer"),
        (16, "float32", "minimum"),
        (64, "bfloat16", "minimum"),
        (128, "bfloat16", "symmetric"),
        (48, "float16", "integer"),
        (-1, "float32", "symmetric"),
        (-1, "float16", "integer"),
        (256, "float32", "integer"),
    )
]
TWO_LEVEL = [
    QuantSpec(bits, group, scale, zero)
    for bits in (4, 8)
    for group, scale, zero in (
        (16, "int8", "symmetric"),
        (32, "int8", "minimum"),
        (64, "int8", "minimum"),
        (256, "int8", "symmetric"),
        (16, "uint4", "minimum"),
        (128, "uint4", "minimum"),
    )
]
SPECS = [pytest.param(spec, id=str(spec).replace(" ", "-")) for spec in FLAT + TWO_LEVEL]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("act", [16, 32, 96, 256, "row"])
def test_int8_specs_and_activation_groups(ops, spec: QuantSpec, act: int | str) -> None:
    k = 528  # no multiple of most groups
    group, act_group = spec.group(k), k if act == "row" else int(act)
    if group % act_group and act_group % group:
        weight, (act_tensors, _) = (
            random_weight(spec, 64, k),
            quantized(torch.randn(1, k), act_group),
        )
        with pytest.raises(
            RuntimeError, match="one of group_size and act_group must divide the other"
        ):
            ops.linear_quant(*act_tensors, *weight.op_args(), None, torch.float32)
    else:
        check_int8(ops, spec, 5, 96, k, act_group)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "minimum"])
def test_int8_tokens(ops, bits: int, zero: str, m: int) -> None:
    check_int8(ops, QuantSpec(bits, 32, "float16", zero), m, 160, 96, 32)


@pytest.mark.parametrize("n", [1, 16, 31, 33, 64, 65, 129, 200])
@pytest.mark.parametrize("k", [1, 16, 17, 100])
def test_int8_ragged(ops, n: int, k: int) -> None:
    for m in (1, 3, 6):
        check_int8(ops, QuantSpec(4, 32, "float16", "minimum"), m, n, k, 32)
        check_int8(ops, QuantSpec(8, 16, "float32", "symmetric"), m, n, k, 32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_output_types(ops, dtype: torch.dtype, bias: bool) -> None:
    for m in (1, 2, 7):
        check_int8(ops, QuantSpec(4, 32, "float16", "minimum"), m, 100, 64, 32, dtype, bias)


def test_int8_many_tokens(ops) -> None:
    check_int8(ops, QuantSpec(4, 32, "float16", "minimum"), 513, 96, 576, 32)
    check_int8(ops, QuantSpec(8, 32, "float16"), 250, 64, 64, 32)


@pytest.mark.parametrize("bits", BITS)
def test_int8_extreme_codes(ops, bits: int) -> None:
    """Every weight code at its top against +-127: 16-bit sums must not saturate, int32 sums of a
    long group not wrap.
    """
    k = 32768
    spec = QuantSpec(bits, -1, "float32", "symmetric")
    weight = random_weight(spec, 64, k)
    weight.codes.copy_(_filled(weight, (1 << bits) - 1))
    for sign in (1, -1):
        codes = torch.full((3, k), 127 * sign, dtype=torch.int8)
        sums = torch.full((3, k // 16), 16 * 127 * sign, dtype=torch.int16)
        y = ops.linear_quant(codes, torch.ones(3, 1), sums, *weight.op_args(), None, torch.float32)
        dot = float(k * 127 * sign * ((1 << bits) - 1 - (1 << (bits - 1))))
        want = weight.scale[0, 0].expand(3, 64) * torch.tensor(dot, dtype=torch.float32)
        torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.parametrize("value", [-128, 127])
def test_int8_extreme_tables(ops, value: int) -> None:
    """The same with a table's ends: -128 must not be taken for 128, nor 128 * 127 * 2 saturate."""
    k = 32768
    weight = random_weight(QuantSpec(4, -1, "float32", table=(*range(14), -128, 127)), 64, k)
    weight.codes.copy_(_filled(weight, 14 if value < 0 else 15))
    for sign in (1, -1):
        codes = torch.full((5, k), 127 * sign, dtype=torch.int8)
        sums = torch.full((5, k // 16), 16 * 127 * sign, dtype=torch.int16)
        y = ops.linear_quant(codes, torch.ones(5, 1), sums, *weight.op_args(), None, torch.float32)
        want = weight.scale[0, 0].expand(5, 64) * torch.tensor(float(k * 127 * sign * value))
        torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float(ops, spec: QuantSpec, dtype: torch.dtype) -> None:
    k, n = 528, 96
    weight, w, _ = prepared(spec, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2))
    for m in (1, 5):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        y = ops.linear(x, *weight.op_args(), bias, "float", 0)
        want = x.double() @ w.T + bias.double()
        assert_close(y, want, x.double().abs() @ w.T.abs() + bias.double().abs(), k)


@pytest.mark.parametrize("spec", SPECS)
def test_float_is_exact_in_the_weight(ops, spec: QuantSpec) -> None:
    """One-hot activations read the dequantized weight, bit for bit."""
    k, n = 80, 70
    weight = random_weight(spec, n, k)
    w = torch.ops.qkernels_reference.dequantize(*weight.op_args(), torch.float32)
    y = ops.linear(torch.eye(k), *weight.op_args(), None, "float", 0)
    assert torch.equal(y, w.T)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 129, 260])
@pytest.mark.parametrize("n,k", [(1, 1), (33, 17), (64, 64), (97, 130)])
def test_float_shapes(ops, m: int, n: int, k: int) -> None:
    for spec in (QuantSpec(4, 32, "float16", "minimum"), QuantSpec(8, 16, "bfloat16", "symmetric")):
        weight, w, _ = prepared(spec, n, k)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        y = ops.linear(x, *weight.op_args(), None, "float", 0)
        assert y.shape == (m, n)
        assert_close(y, x.double() @ w.T, x.double().abs() @ w.T.abs(), k)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [0, 1, 3, 40])
def test_linear_quantizes_as_quantize_act_does(ops, dtype: torch.dtype, m: int) -> None:
    weight = random_weight(QuantSpec(4, 32, "float16", "minimum"), 96, 176)
    x = torch.randn(m, 176, generator=torch.Generator().manual_seed(1)).to(dtype)
    for group in (16, 32, 64):
        act = ops.quantize_act(x, group)
        y = ops.linear(x, *weight.op_args(), None, "int8", group)
        assert torch.equal(y, ops.linear_quant(*act, *weight.op_args(), None, dtype))


@pytest.mark.parametrize("act", ["int8", "float"])
def test_rows_of_a_wider_tensor(ops, act: str) -> None:
    weight = random_weight(QuantSpec(4, 32, "float16", "minimum"), 64, 96)
    wide = torch.randn(7, 200, generator=torch.Generator().manual_seed(1))
    x = wide[:, 50:146]
    args = (*weight.op_args(), None, act, 32)
    assert torch.equal(ops.linear(x, *args), ops.linear(x.contiguous(), *args))
    assert torch.equal(
        ops.linear(wide[:1, 3:99].expand(4, 96), *args)[3],
        ops.linear(wide[:1, 3:99].contiguous(), *args)[0],
    )
    with pytest.raises(
        RuntimeError, match="qkernels::linear: x must be dense in its last dimension"
    ):
        ops.linear(torch.randn(96, 7).T, *args)


@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_and_company_change_no_bit(ops, act: str, dtype: torch.dtype) -> None:
    """Neither the size of the team nor the other tokens of a batch show in a token's result."""
    before = torch.get_num_threads()
    try:
        for spec in (
            QuantSpec(4, 32, "float16", "minimum"),
            QuantSpec(8, 32, "float16"),
            QuantSpec(4, 32, "int8", "minimum"),
        ):
            weight = random_weight(spec, 232, 320)
            x = torch.randn(300, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
            args = (*weight.op_args(), None, act, 32)
            torch.set_num_threads(1)
            alone = ops.linear(x, *args)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(ops.linear(x, *args), alone)
                for m in (1, 2, 3, 7):
                    assert torch.equal(ops.linear(x[:m], *args), alone[:m])
    finally:
        torch.set_num_threads(before)


def test_not_a_number_reaches_the_result(ops) -> None:
    weight = random_weight(QuantSpec(4, 32, "float16", "minimum"), 64, 96)
    x = torch.randn(3, 96)
    x[1, 40] = torch.nan
    x[2, 5] = torch.inf
    for act in ("int8", "float"):
        y = ops.linear(x, *weight.op_args(), None, act, 32)
        assert torch.isfinite(y[0]).all() and y[1].isnan().all() and not torch.isfinite(y[2]).any()


def test_bad_arguments_are_named() -> None:
    weight = random_weight(QuantSpec(4, 32, "float16", "minimum"), 64, 96)
    w, x = weight.op_args(), torch.randn(2, 96)
    act, _ = quantized(x, 32)
    ops = torch.ops.qkernels
    for message, args in [
        (r"x must be \[.*96\], got \[2, 95\]", (x[:, :95], *w, None, "int8", 32)),
        ("x must have 2 dimensions", (x[0], *w, None, "int8", 32)),
        ("x must be float32, float16 or bfloat16", (x.double(), *w, None, "int8", 32)),
        (r"bias must be \[64\], got \[63\]", (x, *w, torch.zeros(63), "int8", 32)),
        ("bias must be (float32|Float), got", (x, *w, torch.zeros(64).half(), "int8", 32)),
        ('act must be "int8" or "float", got "int4"', (x, *w, None, "int4", 32)),
        ("act_group must be a positive multiple of 16, got 24", (x, *w, None, "int8", 24)),
        ("act_group must be a positive multiple of 16, got 0", (x, *w, None, "int8", 0)),
    ]:
        for namespace in (ops, torch.ops.qkernels_reference):
            with pytest.raises(RuntimeError, match=f"qkernels::linear: {message}"):
                namespace.linear(*args)
    codes, scale, sums = act
    for message, args in [
        ("act_codes must be (int8|Char), got", (codes.short(), scale, sums)),
        (
            "act_codes must have k = 96 columns rounded up",
            (codes[:, :64].contiguous(), scale, sums),
        ),
        ("act_codes must have k = 96 columns rounded up", (codes, scale[:, :0].contiguous(), sums)),
        ("act_scale must be (float32|Float), got", (codes, scale.double(), sums)),
        (r"act_sums must be \[2, 6\], got \[2, 5\]", (codes, scale, sums[:, :5].contiguous())),
        ("act_codes must be contiguous", (codes.T.contiguous().T, scale, sums)),
    ]:
        with pytest.raises(RuntimeError, match=f"qkernels::linear_quant: {message}"):
            ops.linear_quant(*args, *w, None, torch.float32)


def test_opcheck_and_compile() -> None:
    weight = random_weight(QuantSpec(4, 32, "float16", "minimum"), 64, 96)
    bias = torch.randn(64)
    for m in (0, 3):
        x = torch.randn(m, 96)
        for act in ("int8", "float"):
            torch.library.opcheck(
                torch.ops.qkernels.linear.default, (x, *weight.op_args(), bias, act, 32)
            )
        act_tensors = quantized(x, 32)[0]
        torch.library.opcheck(
            torch.ops.qkernels.linear_quant.default,
            (*act_tensors, *weight.op_args(), None, torch.float16),
        )

    def f(x: Tensor) -> Tensor:
        return torch.ops.qkernels.linear(x * 2, *weight.op_args(), bias, "int8", 32) + 1

    x = torch.randn(5, 96)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_gradient_reaches_x() -> None:
    weight = random_weight(QuantSpec(4, 32, "float16", "minimum"), 64, 96)
    x = torch.randn(3, 96, requires_grad=True)
    grad = torch.randn(3, 64)
    torch.ops.qkernels.linear(x, *weight.op_args(), None, "float", 0).backward(grad)
    w = torch.ops.qkernels_reference.dequantize(*weight.op_args(), torch.float32)
    torch.testing.assert_close(x.grad, grad @ w)
