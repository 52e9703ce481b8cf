"""gate and gate_quant."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from .core import EXACT, device_of, narrow, next_power_of_2, quantize_groups

_BLOCK = 1024


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu_tanh, gelu_erf or relu of float32 values."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2 u) - 1
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(u)
    elif ACTIVATION == "gelu_erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return tl.where(x < 0, 0.0, x)


@triton.jit
def gate_kernel(
    gate, up, y, gate_stride, up_stride, k, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """gate, up [M, K] (up may be None) -> y [M, K]; grid [M, blocks of K]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < k
    v = activate(tl.load(gate + row * gate_stride + column, there, 0.0).to(tl.float32), ACTIVATION)
    if up is not None:
        v *= tl.load(up + row * up_stride + column, there, 0.0).to(tl.float32)
    tl.store(y + row * k + column, narrow(v, y.dtype.element_ty), there)


@triton.jit
def gate_quant_kernel(
    gate, up, codes, scale, sums, gate_stride, up_stride, k, groups,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The same, quantized: grid [M, blocks of G groups]."""
    row = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(1) * G + tl.arange(0, G)) * GROUP
    column = first[:, None] + tl.arange(0, P)[None, :]
    valid = (column < k) & (tl.arange(0, P)[None, :] < GROUP)
    v = activate(tl.load(gate + row * gate_stride + column, valid, 0.0).to(tl.float32), ACTIVATION)
    if up is not None:
        v *= tl.load(up + row * up_stride + column, valid, 0.0).to(tl.float32)
    quantize_groups(v, valid, codes, scale, sums, row, first, groups, GROUP, P)


def gate(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    y: Tensor = registry.fake("gate")(gate, up, activation)
    m, k = gate.shape
    up_stride = 0 if up is None else up.stride(0)
    block = min(_BLOCK, next_power_of_2(k))
    if y.numel():
        with device_of(gate):
            gate_kernel[(m, triton.cdiv(k, block))](
                gate, up, y, gate.stride(0), up_stride, k, activation, block, **EXACT
            )
    return y


def gate_quant(
    gate: Tensor, up: Tensor | None, activation: str, act_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, sums = registry.fake("gate_quant")(gate, up, activation, act_group)
    (m, k), groups = gate.shape, scale.shape[1]
    p = max(16, next_power_of_2(act_group))
    g = max(1, min(_BLOCK // p, next_power_of_2(groups)))
    up_stride = 0 if up is None else up.stride(0)
    if codes.numel():
        with device_of(gate):
            gate_quant_kernel[(m, triton.cdiv(groups, g))](
                gate, up, codes, scale, sums, gate.stride(0), up_stride, k, groups,
                activation, act_group, p, g, **EXACT,
            )  # fmt: skip
    return codes, scale, sums
