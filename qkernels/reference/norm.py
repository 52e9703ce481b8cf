"""RMSNorm and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from .act import quantize_act


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """float32 [M, K], whatever x's type."""
    x = x.float()
    if center:
        x = x - x.mean(dim=1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """x [M, K], weight [K], bias [K] or None -> [M, K] of x's dtype."""
    return _norm(x, weight, bias, eps, center).to(x.dtype)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """x, residual [M, K] -> the norm of the sum, and the sum; what is normalized is the sum as rounded to x's dtype."""
    total = x + residual
    return norm(total, weight, bias, eps, center), total


def norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, act_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scale, sums of the norm in float32."""
    return quantize_act(_norm(x, weight, bias, eps, center), act_group)


def add_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, act_group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scale, sums of the norm in float32, and the sum."""
    total = x + residual
    return *norm_quant(total, weight, bias, eps, center, act_group), total
