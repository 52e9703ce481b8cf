"""pack, unpack and dequantize. `W` are the ten arguments of a packed weight (docs/design.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant import layout
from ..quant.weight import dequantize_groups


def pack(codes: Tensor, bits: int, group_size: int, two_level: bool) -> Tensor:
    """codes [N, K] uint8 -> [Np, Kp * bits / 8] int8. Raises RuntimeError for codes beyond their
    bits."""
    if bits < 8 and int(codes.max()) >> bits:
        raise RuntimeError(
            f"qkernels::pack: codes must be below 2^bits = {1 << bits}, but some have higher "
            "bits set"
        )
    return layout.pack(codes, bits, group_size, two_level)


def unpack(
    codes: Tensor, scale: Tensor, zero: Tensor | None, block_scale: Tensor | None, block_zero: Tensor | None,
    table: Tensor | None, bits: int, group_size: int, n: int, k: int,
) -> Tensor:  # fmt: skip
    """-> [N, K] uint8."""
    return layout.unpack(codes, bits, n, k)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, block_scale: Tensor | None, block_zero: Tensor | None,
    table: Tensor | None, bits: int, group_size: int, n: int, k: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """-> [N, K] of dtype."""
    groups, blocks = -(-k // group_size), -(-k // 256)

    def plain(packed: Tensor | None, count: int) -> Tensor | None:
        return None if packed is None else layout.unpack_groups(packed, n, count)

    return dequantize_groups(
        layout.unpack(codes, bits, n, k), layout.unpack_groups(scale, n, groups), plain(zero, groups),
        plain(block_scale, blocks), plain(block_zero, blocks), table, bits=bits, group=group_size,
    ).to(dtype)  # fmt: skip
