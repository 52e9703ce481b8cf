"""gate and gate_quant."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, device_of, narrow, next_power_of_2, quantize_groups
from .quantize_act import LARGEST_TILE, group_tile, quantize_into

_BLOCK = 1024


@triton.jit
def gate_exp(x):
    """exp within 2 ulp for -87.3 <= x <= 88.3; e^-87.3 below, infinity above; NaN stays. The exp of
    GPUs takes exp2 of x / ln 2 as rounded, whose error grows with x."""
    v = tl.where(x < -87.3, -87.3, tl.where(x > 89.0, 89.0, x))
    # Adding 1.5 * 2^23 rounds v / ln 2 to the integer n, which then stands in the lowest bits.
    shifted = tl.fma(v, 1.44269504, 12582912.0)
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693145752, v)  # ln 2 in two parts
    r = tl.fma(n, -1.42860677e-6, r)
    p = tl.fma(r, 1.3888889e-3, 8.3333333e-3)
    p = tl.fma(p, r, 4.1666667e-2)
    p = tl.fma(p, r, 1.6666667e-1)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    # 2^n: the bits of 1.5 * 2^23 above those of n leave the word, and n = 128 gives infinity.
    power = (shifted.to(tl.uint32, bitcast=True) << 23) + 0x3F800000
    return p * power.to(tl.float32, bitcast=True)


@triton.jit
def gelu_erf(x):
    """x Phi(x). With z = |x| / sqrt 2, Phi(-|x|) = erfcx(z) exp(-z^2) / 2, which keeps its relative
    precision in the tail where 1 + erf would cancel. erfcx(z) = exp(z^2) erfc(z) is a polynomial in
    t = (z - 3) / (z + 3) for z <= 10; beyond, exp(-z^2) is 0."""
    size = tl.abs(x)
    scaled = size * 0.70710678
    z = tl.where(scaled > 10.0, 10.0, scaled)
    t = tl.div_rn(z - 3.0, z + 3.0)
    p = tl.fma(t, 5.3706684e-05, 2.4406856e-05)
    p = tl.fma(p, t, -0.000595398)
    p = tl.fma(p, t, 0.00071869587)
    p = tl.fma(p, t, 0.0042700227)
    p = tl.fma(p, t, -0.024394935)
    p = tl.fma(p, t, 0.07166559)
    p = tl.fma(p, t, -0.15011571)
    p = tl.fma(p, t, 0.24560381)
    p = tl.fma(p, t, -0.32623357)
    p = tl.fma(p, t, 0.17900115)
    # x^2 = square + rest exactly; exp(-rest / 2) is 1 - rest / 2.
    square = x * x
    rest = tl.fma(x, x, -square)
    tail = 0.5 * p * gate_exp(-0.5 * square) * (1.0 - 0.5 * rest)
    bounded = tl.where(size < 14.0, tail, 0.0)  # beyond, square may be infinite, and rest NaN
    return x * tl.where(x < 0.0, bounded, 1.0 - bounded)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu_tanh, gelu_erf or relu of float32 values, by the steps of the CUDA kernel."""
    if ACTIVATION == "silu":
        return tl.div_rn(x, 1.0 + gate_exp(-x))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        return tl.div_rn(x, 1.0 + gate_exp(-x * tl.fma(x * x, 0.071354816, 1.5957691)))
    elif ACTIVATION == "gelu_erf":
        return gelu_erf(x)
    else:
        return tl.where(x < 0, 0.0, x)  # NaN stays


@triton.jit
def gate_value(gate, up, column, there, ACTIVATION: tl.constexpr):
    """activation(gate) * up of one row, float32."""
    v = activate(tl.load(gate + column, there, 0.0).to(tl.float32), ACTIVATION)
    if up is not None:
        v *= tl.load(up + column, there, 0.0).to(tl.float32)
    return v


@triton.jit
def gate_kernel(
    gate, up, y, gate_stride, up_stride, k, blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """gate, up [M, K] (up may be None) -> y [M, K]; grid [M * blocks of K]."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = column < k
    gate += row * gate_stride
    if up is not None:
        up += row * up_stride
    v = gate_value(gate, up, column, there, ACTIVATION)
    tl.store(y + row * k + column, narrow(v, y.dtype.element_ty), there)


@triton.jit
def gate_quant_kernel(
    gate, up, codes, scale, sums, gate_stride, up_stride, k, groups, blocks,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The same, quantized: grid [M * blocks of G groups]."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks * G + tl.arange(0, G)) * GROUP
    column = first[:, None] + tl.arange(0, P)[None, :]
    valid = (column < k) & (tl.arange(0, P)[None, :] < GROUP)
    gate += row * gate_stride
    if up is not None:
        up += row * up_stride
    v = gate_value(gate, up, column, valid, ACTIVATION)
    quantize_groups(v, valid, codes, scale, sums, row, first, groups, GROUP, P)


def _gate(gate: Tensor, up: Tensor | None, activation: str, y: Tensor) -> None:
    """Fills y [M, K], of any float type."""
    m, k = gate.shape
    block = min(_BLOCK, next_power_of_2(k))
    blocks = triton.cdiv(k, block)
    up_stride = 0 if up is None else up.stride(0)
    if m:
        with device_of(gate):
            gate_kernel[(m * blocks,)](
                gate, up, y, gate.stride(0), up_stride, k, blocks, activation, block, **EXACT
            )


def gate(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    y: Tensor = registry.fake("gate")(gate, up, activation)
    _gate(gate, up, activation, y)
    return y


def gate_quant(
    gate: Tensor, up: Tensor | None, activation: str, act_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, sums = registry.fake("gate_quant")(gate, up, activation, act_group)
    if act_group > LARGEST_TILE:  # two kernels: float32 in between is what the op is defined by
        y = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
        _gate(gate, up, activation, y)
        quantize_into(y, act_group, codes, scale, sums)
        return codes, scale, sums
    (m, k), groups = gate.shape, scale.shape[1]
    tile = group_tile(act_group, groups)
    blocks = triton.cdiv(groups, tile.groups)
    up_stride = 0 if up is None else up.stride(0)
    if m:
        with device_of(gate):
            gate_quant_kernel[(m * blocks,)](
                gate, up, codes, scale, sums, gate.stride(0), up_stride, k, groups, blocks,
                activation, act_group, tile.columns, tile.groups, num_warps=tile.warps, **EXACT,
            )  # fmt: skip
    return codes, scale, sums
