"""Rows of a packed table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..quant.weight import PackedWeight, WeightKind
from . import checks
from .pack import _unpermute
from .registry import WEIGHT, define


def check_embedding(ids: Tensor, *args: Any) -> None:
    *weight, dtype, _ = args
    checks.expect("embedding", "ids", ids, torch.int64, [-1])
    checks.weight("embedding", *weight)
    checks.float_type("embedding", "dtype", dtype)
    checks.same_device("embedding", "ids", ids.device, codes=weight[0])


def _fake(ids: Tensor, *args: Any) -> Tensor:
    check_embedding(ids, *args)
    return ids.new_empty((ids.shape[0], args[9]), dtype=args[10])


define(
    "embedding",
    f"(Tensor ids, {WEIGHT}, ScalarType dtype, float multiplier) -> Tensor",
    fake=_fake,
    reference=checks.checked(check_embedding, reference.embedding),
)


def embedding(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32, multiplier: float = 1.0
) -> Tensor:
    """ids [...] int64, from 0 to N - 1 -> [..., K] of dtype: the rows, dequantized in float32,
    times multiplier.

    Raises RuntimeError for wrong dtypes, and on the CPU for an id out of range. A GPU, which would
    have to be waited for, gives a row of NaN.
    """
    return apply(ids, weight.op_args(), weight.kind, weight.perm, dtype, multiplier)


def apply(
    ids: Tensor,
    args: tuple[Any, ...],
    kind: WeightKind,
    perm: Tensor | None,
    dtype: torch.dtype,
    multiplier: float = 1.0,
) -> Tensor:
    """`embedding` on the arguments of a packed weight, whose kind and perm they do not tell: for
    modules, which hold the tensors themselves."""
    op = select("embedding", ids.device, weight=kind)
    rows = op(ids.reshape(-1), *args, dtype, multiplier)
    if perm is not None:
        rows = _unpermute(rows, perm)
    return rows if ids.dim() == 1 else rows.reshape(*ids.shape, args[-1])
