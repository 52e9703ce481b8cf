"""Activation quantization. Every step is one IEEE float32 operation, so that kernels can match it bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.spec import round_up

TINY = 2.0**-100  # below this amax a group is zero: 127 / amax must stay finite


def quantize_act(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> codes [M, Kx] int8, scale [M, Kx / group] float32, sums [M, Kx / 16] int16.

    scale = amax / 127; code = round_half_even(x * (127 / amax)), both divisions rounded to float32. amax < 2^-100:
    scale and codes 0. A value that is not finite: the scale is NaN and the codes are 0.
    """
    m, k = x.shape
    kx = round_up(k, group)
    padded = torch.nn.functional.pad(x.float(), (0, kx - k)).view(m, kx // group, group)
    amax = padded.abs().amax(dim=2)  # propagates NaN
    used = (amax >= TINY) & torch.isfinite(amax)
    top = torch.full_like(amax, 127.0)  # a tensor: torch computes 127.0 / amax as reciprocal times 127, two roundings
    inverse = torch.where(used, top / amax, 0.0)
    codes = torch.where(used[..., None], torch.round(padded * inverse[..., None]), 0.0).to(torch.int8)
    scale = torch.where(used, amax / top, torch.where(amax < TINY, 0.0, torch.nan))
    sums = codes.view(m, kx // 16, 16).sum(dim=2, dtype=torch.int32).to(torch.int16)
    return codes.view(m, kx), scale, sums
