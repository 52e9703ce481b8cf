"""Half-quadratic quantization: zeros and scales that few large errors do not sway.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. Data-free:
it minimises the l_p norm of the weights' error, p < 1, in place of the squares, by taking turns
between codes, an error term E that soft-thresholding allows to be large in few places, and the zero
that fits W - E best. Here errors count in steps of the group's scale, so that the thresholds mean
the same for weights of any size. Formats without a free zero have their scale fitted in its place,
to the same objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import Rounding, representable

# Of the paper: the exponent of the norm, the weight of the constraint and its growth, the steps.
_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def half_quadratic(rounding: Rounding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale (representable in dtype, as float32) and zero of each group, [n, groups]; of all
    steps the best by the l_p norm. Raises ValueError for powers of two as scales."""
    spec = rounding.spec
    if dtype == torch.float8_e8m0fnu:
        raise ValueError(f"hqq: {spec} has powers of two as scales: there is nothing to fit")
    scale, zero = rounding.full(torch.float32)
    best_scale, best_zero, best = scale, zero, torch.full_like(scale, torch.inf)
    beta = _BETA
    for _ in range(_STEPS + 1):
        objective, next_scale, next_zero = _step(rounding, scale, zero, beta)
        better = objective < best
        best = torch.where(better, objective, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        scale, zero, beta = next_scale, next_zero, beta * _GROWTH
    scale = representable(best_scale, dtype)
    if spec.zero == "integer":
        return scale, best_zero.round().clamp_(0, rounding.top)
    if spec.zero == "minimum":
        return scale, representable(best_zero, dtype)
    return scale, best_zero


def _step(
    rounding: Rounding, scale: Tensor, zero: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the l_p norm of the errors of this scale and zero [n, groups], and the next ones."""
    spec = rounding.spec
    step = scale.abs().clamp(min=2.0**-100)
    q = rounding.levels_of(scale, zero)
    shown = q * scale[..., None]
    if spec.zero == "minimum":
        shown -= zero[..., None]
    error = (rounding.x - shown) / step[..., None]
    error[:, -1, rounding.last :] = 0.0
    size = error.abs()
    slope = size.clamp(min=1e-8).pow_(_NORM - 1)
    objective = (size * slope).sum(dim=2)
    # The proximal operator of the norm: errors below the threshold are no outliers.
    kept = torch.relu(size.sub_(slope.div_(beta)))
    target = rounding.x - torch.copysign(kept, error) * step[..., None]
    target[:, -1, rounding.last :] = 0.0
    if spec.zero == "symmetric":
        q[:, -1, rounding.last :] = 0.0
        fitted = (q * target).sum(dim=2) / (q * q).sum(dim=2).clamp(min=2.0**-100)
        return objective, torch.where(fitted != 0, fitted, scale), zero
    if spec.zero == "minimum":
        shift = q * scale[..., None] - target
        shift[:, -1, rounding.last :] = 0.0
        mean = shift.sum(dim=2) / rounding.count
        return objective, scale, mean.clamp(min=0.0) if spec.scale == "uint4" else mean
    # codes - zero = q, so the zero moves by the mean of what is left, in steps.
    shift = q - target / torch.where(scale.abs() > 2.0**-100, scale, torch.inf)[..., None]
    shift[:, -1, rounding.last :] = 0.0
    return objective, scale, (zero + shift.sum(dim=2) / rounding.count).clamp(0, rounding.top)
