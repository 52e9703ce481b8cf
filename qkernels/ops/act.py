"""Activations quantized at run time: int8, one float32 scale per row and group of columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..quant.spec import round_up
from . import checks
from .registry import define


class QuantAct(NamedTuple):
    """x [M, K] ~= scale * codes.

    codes [M, Kx] int8, |code| <= 127, zero from K on, Kx: K rounded up to whole groups; scale [M,
    Kx / group] float32;
    sums [M, Kx / 16] int16, of 16 codes each.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]


def new_quant_act(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes that quantizing x [M, K] by `group` columns gives; for fakes."""
    m, kx = x.shape[0], round_up(x.shape[1], group)
    return (
        x.new_empty((m, kx), dtype=torch.int8),
        x.new_empty((m, kx // group), dtype=torch.float32),
        x.new_empty((m, kx // 16), dtype=torch.int16),
    )


def check_quantize_act(x: Tensor, group: int) -> None:
    checks.float_type("quantize_act", "x", x.dtype)
    checks.rows("quantize_act", "x", x)
    if x.shape[1] < 1:
        checks.fail("quantize_act", f"x needs at least one column, got {list(x.shape)}")
    checks.group_of("quantize_act", "group", group)


def _fake(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_act(x, group)
    return new_quant_act(x, group)


define(
    "quantize_act",
    "(Tensor x, int group) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=checks.checked(check_quantize_act, reference.quantize_act),
)


def quantize_act(x: Tensor, group: int) -> QuantAct:
    """Rounds x to int8 with one scale, amax / 127, per row and `group` columns.

    x [M, K] float32, float16 or bfloat16, rows dense; group: a multiple of 16. A group that holds a
    value that is not
    finite, or whose amax is below 2^-100, gets codes of 0 (and the scale NaN in the first case, 0
    in the second).
    Raises RuntimeError for another shape, dtype, stride or group, and for a gradient.
    """
    checks.no_gradient("quantize_act", x)
    return QuantAct(*select("quantize_act", x.device)(x, group))
