"""pack, unpack and dequantize. `W` are the ten arguments of a packed weight (docs/design.md)."""

from __future__ import annotations

from typing import Any

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


def unpack(*weight: Any) -> Tensor:
    """W -> [N, K] uint8."""
    codes, bits, n, k = weight[0], weight[6], weight[8], weight[9]
    return layout.unpack(codes, bits, n, k)


def dequantize(*args: Any) -> Tensor:
    """W, dtype -> [N, K] of dtype."""
    codes, scale, zero, block_scale, block_zero, table, bits, group, n, k, dtype = args
    groups, blocks = -(-k // group), -(-k // 256)

    def plain(packed: Tensor | None, count: int) -> Tensor | None:
        return None if packed is None else layout.unpack_groups(packed, n, count)

    return dequantize_groups(
        layout.unpack(codes, bits, n, k),
        layout.unpack_groups(scale, n, groups),
        plain(zero, groups),
        plain(block_scale, blocks),
        plain(block_zero, blocks),
        table,
        bits=bits,
        group=group,
    ).to(dtype)
