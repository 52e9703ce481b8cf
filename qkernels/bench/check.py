"""Results against the reference, before anything is timed. A fast wrong kernel is an error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.spec import BLOCK
from ..quant.weight import PlainWeight, dequantize_groups

U32 = 2.0**-24  # half a unit in the last place of float32


def unit(dtype: torch.dtype) -> float:
    """Half a unit in the last place: the largest relative error of rounding to a float type."""
    return torch.finfo(dtype).eps / 2


class CheckError(RuntimeError):
    """A kernel's result is not what the reference gives."""


def require_close(what: str, got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Raises CheckError unless |got - want| <= bound everywhere; NaN fails."""
    if got.shape != want.shape:
        raise CheckError(f"{what}: shape {list(got.shape)}, expected {list(want.shape)}")
    error, bound = (got.double() - want.double()).abs(), bound.double().expand_as(want)
    wrong = ~(error <= bound)
    if wrong.any():
        worst = (error / bound).nan_to_num(torch.inf).flatten().argmax()
        at = [int(i) for i in torch.unravel_index(worst, error.shape)]
        raise CheckError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ from the reference; "
            f"worst at {at}: {got.flatten()[worst].item():.6g}, expected "
            f"{want.flatten()[worst].item():.6g} within {bound.flatten()[worst].item():.2g}"
        )


def magnitude(plain: PlainWeight) -> Tensor:
    """[N, K] float32: |scale * code| + |scale * zero|, or with minima |scale * code| + |minimum|.
    Kernels may sum the two parts apart, so rounding is relative to them, not to the value. Flat
    scales and int8 ones, no tables."""
    spec, k = plain.spec, plain.k
    scale = plain.scale.float().abs()
    offset = scale * float(spec.zero_point)
    if plain.zero is not None and spec.zero == "integer":
        offset = scale * plain.zero.float()
    block = torch.arange(scale.shape[1]) * spec.group(k) // BLOCK
    if plain.block_scale is not None:
        factor = plain.block_scale.float().abs()[:, block]
        scale, offset = scale * factor, offset * factor
    if plain.zero is not None and spec.zero == "minimum":
        offset = plain.zero.float().abs()
        if plain.block_zero is not None:
            offset = offset * plain.block_zero.float().abs()[:, block]
    # scale * code - minimum, with a minimum of -offset.
    return dequantize_groups(
        plain.codes, scale, -offset, None, None, None, bits=spec.bits, group=spec.group(k)
    )


def some(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({i * (count - 1) // (most - 1) for i in range(most)})
