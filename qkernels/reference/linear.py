"""linear and linear_quant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .act import quantize_act
from .pack import dequantize


def linear(x: Tensor, *args: Any) -> Tensor:
    """x [M, K], W, bias [N] or None, act, act_group, residual [M, N] or nothing -> [M, N] of x's
    dtype."""
    weight, (bias, act, act_group, *residual) = args[:10], args[10:]
    if act == "int8":
        return linear_quant(*quantize_act(x, act_group), *weight, bias, x.dtype, *residual)
    return _matmul(x.float(), dequantize(*weight, torch.float32), bias, x.dtype, *residual)


def linear_quant(act_codes: Tensor, act_scale: Tensor, act_sums: Tensor, *args: Any) -> Tensor:
    """codes [M, Kx], scale [M, Kx / group], sums [M, Kx / 16] (implied by the codes, unused), W,
    bias, dtype, residual [M, N] or nothing -> [M, N]."""
    weight, (bias, dtype, *residual) = args[:10], args[10:]
    m, kx = act_codes.shape
    groups, k = act_scale.shape[1], weight[-1]
    x = (act_codes.float().view(m, groups, kx // groups) * act_scale[..., None]).view(m, kx)[:, :k]
    return _matmul(x, dequantize(*weight, torch.float32), bias, dtype, *residual)


def _matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)
