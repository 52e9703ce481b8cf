"""embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant import layout
from .pack import dequantize


def embedding(ids: Tensor, *args: Any) -> Tensor:
    """ids [T] int64, W, dtype, multiplier -> [T, K] of dtype. Raises RuntimeError for ids outside 0
    to N - 1."""
    *weight, dtype, multiplier = args
    n, k = weight[-2:]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= n):
        bad = ids[(ids < 0) | (ids >= n)][0]
        raise RuntimeError(f"qkernels::embedding: ids must be from 0 to {n - 1}, got {int(bad)}")
    # Only the 64-row blocks that are asked for, each once.
    blocks, inverse = (ids // layout.UNIT_ROWS).unique(return_inverse=True)
    if blocks.numel() == 0:
        return weight[0].new_empty((0, k), dtype=dtype)
    rows = len(blocks) * layout.UNIT_ROWS
    codes, *groups = weight[:5]
    codes = codes.view(-1, layout.UNIT_ROWS, codes.shape[1])[blocks].reshape(rows, -1)
    groups = [None if t is None else _take(t, blocks) for t in groups]
    table = dequantize(codes, *groups, *weight[5:8], rows, k, torch.float32)
    picked = table[inverse * layout.UNIT_ROWS + ids % layout.UNIT_ROWS]
    return (picked * multiplier).to(dtype)


def _take(groups: Tensor, blocks: Tensor) -> Tensor:
    raw = layout._plain(groups.dtype)  # torch indexes no float8
    return groups.view(raw)[blocks].view(groups.dtype)
