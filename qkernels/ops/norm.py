"""RMSNorm and LayerNorm, with an optional residual added first and an optional int8 output.

y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias for LayerNorm (center), and without the mean for RMSNorm:
in float32, rounded once. None has a backward: asking for a gradient raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from . import checks
from .act import QuantAct, new_quant_act
from .registry import define, no_backward

_TAIL = "Tensor weight, Tensor? bias, float eps, bool center"


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, act_group: int | None
) -> None:
    checks.float_type(op, "x", x.dtype)
    checks.rows(op, "x", x)
    k = x.shape[1]
    if k < 1:
        checks.fail(op, f"x needs at least one column, got {list(x.shape)}")
    if residual is not None:
        if residual.dtype != x.dtype:
            names = checks.type_name(x.dtype), checks.type_name(residual.dtype)
            checks.fail(op, f"residual must be {names[0]} like x, got {names[1]}")
        checks.rows(op, "residual", residual)
        if residual.shape != x.shape:
            checks.fail(op, f"residual must be {list(x.shape)} like x, got {list(residual.shape)}")
    checks.expect(op, "weight", weight, torch.float32, [k])
    if bias is not None:
        checks.expect(op, "bias", bias, torch.float32, [k])
    if not eps >= 0:
        checks.fail(op, f"eps must not be negative, got {eps:g}")
    if act_group is not None:
        checks.act_group(op, act_group)
    checks.same_device(op, "x", x.device, residual=residual, weight=weight, bias=bias)


def _new_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> None:
    _check("norm", x, None, weight, bias, eps, None)


def check_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> None:
    _check("add_norm", x, residual, weight, bias, eps, None)


def check_norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, act_group: int
) -> None:
    _check("norm_quant", x, None, weight, bias, eps, act_group)


def check_add_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, act_group: int
) -> None:
    _check("add_norm_quant", x, residual, weight, bias, eps, act_group)


def _norm_fake(*args: Any) -> Tensor:
    check_norm(*args)
    return _new_rows(args[0])


def _add_norm_fake(*args: Any) -> tuple[Tensor, Tensor]:
    check_add_norm(*args)
    return _new_rows(args[0]), _new_rows(args[0])


def _norm_quant_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_norm_quant(*args)
    return new_quant_act(args[0], args[-1])


def _add_norm_quant_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_add_norm_quant(*args)
    return *new_quant_act(args[0], args[-1]), _new_rows(args[0])


define(
    "norm",
    f"(Tensor x, {_TAIL}) -> Tensor",
    fake=_norm_fake,
    reference=checks.checked(check_norm, reference.norm),
    backward=no_backward("norm"),
)
define(
    "add_norm",
    f"(Tensor x, Tensor residual, {_TAIL}) -> (Tensor, Tensor)",
    fake=_add_norm_fake,
    reference=checks.checked(check_add_norm, reference.add_norm),
    backward=no_backward("add_norm"),
)
define(
    "norm_quant",
    f"(Tensor x, {_TAIL}, int act_group) -> (Tensor, Tensor, Tensor)",
    fake=_norm_quant_fake,
    reference=checks.checked(check_norm_quant, reference.norm_quant),
)
define(
    "add_norm_quant",
    f"(Tensor x, Tensor residual, {_TAIL}, int act_group) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_add_norm_quant_fake,
    reference=checks.checked(check_add_norm_quant, reference.add_norm_quant),
    backward=no_backward("add_norm_quant"),
)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6, center: bool = False) -> Tensor:
    """RMSNorm, or LayerNorm where center is set.

    x [M, K] float32, float16 or bfloat16, rows dense; weight, bias [K] float32 -> [M, K] of x's dtype. Statistics are
    float32, the mean and the variance in two passes. Raises RuntimeError for another shape, dtype or stride, for
    eps < 0, and for a gradient.
    """
    return select("norm", x.device)(x, weight, bias, eps, center)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual, both [M, K] of x's dtype.

    residual [M, K] of x's dtype, rows dense. What is normalized is the sum after rounding to that dtype. The rest is as
    in `norm`.
    """
    return select("add_norm", x.device)(x, residual, weight, bias, eps, center)


def norm_quant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    *,
    act_group: int,
) -> QuantAct:
    """quantize_act(norm(x.float(), ...), act_group), bitwise, without the tensor in between.

    act_group: columns per scale, a multiple of 16. The rest is as in `norm`.
    """
    return QuantAct(*select("norm_quant", x.device)(x, weight, bias, eps, center, act_group))


def add_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    *,
    act_group: int,
) -> tuple[QuantAct, Tensor]:
    """norm_quant(x + residual) and x + residual, [M, K] of x's dtype; see `add_norm` and `norm_quant`."""
    op = select("add_norm_quant", x.device)
    codes, scale, sums, total = op(x, residual, weight, bias, eps, center, act_group)
    return QuantAct(codes, scale, sums), total
