"""The packed layout and its inverse, and the decoding of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ..quant import layout
from ..quant.spec import BITS, BLOCK
from ..quant.weight import PackedWeight
from . import checks
from .registry import WEIGHT, define


def check_pack(codes: Tensor, bits: int, group_size: int, two_level: bool) -> None:
    checks.expect("pack", "codes", codes, torch.uint8, [-1, -1])
    n, k = codes.shape
    if bits not in BITS:
        checks.fail("pack", f"bits must be 2, 3, 4, 5, 6 or 8, got {bits}")
    checks.sizes("pack", n, k)
    checks.group_of("pack", "group_size", group_size)
    if two_level and BLOCK % group_size:
        checks.fail(
            "pack", f"two-level scales need a group_size that divides 256, got {group_size}"
        )


def _pack_fake(codes: Tensor, bits: int, group_size: int, two_level: bool) -> Tensor:
    check_pack(codes, bits, group_size, two_level)
    n, k = codes.shape
    kp = layout.padded_k(k, group_size, two_level)
    return codes.new_empty((layout.padded_n(n), kp * bits // 8), dtype=torch.int8)


def check_unpack(*args: Any) -> None:
    checks.weight("unpack", *args)


def _unpack_fake(*args: Any) -> Tensor:
    check_unpack(*args)
    codes, n, k = args[0], args[-2], args[-1]
    return codes.new_empty((n, k), dtype=torch.uint8)


def check_dequantize(*args: Any) -> None:
    checks.weight("dequantize", *args[:-1])
    checks.float_type("dequantize", "dtype", args[-1])


def _dequantize_fake(*args: Any) -> Tensor:
    check_dequantize(*args)
    codes, n, k, dtype = args[0], args[-3], args[-2], args[-1]
    return codes.new_empty((n, k), dtype=dtype)


define(
    "pack",
    "(Tensor codes, int bits, int group_size, bool two_level) -> Tensor",
    fake=_pack_fake,
    reference=checks.checked(check_pack, reference.pack),
)
define(
    "unpack",
    f"({WEIGHT}) -> Tensor",
    fake=_unpack_fake,
    reference=checks.checked(check_unpack, reference.unpack),
)
define(
    "dequantize",
    f"({WEIGHT}, ScalarType dtype) -> Tensor",
    fake=_dequantize_fake,
    reference=checks.checked(check_dequantize, reference.dequantize),
)


def pack(codes: Tensor, bits: int, group_size: int, two_level: bool = False) -> Tensor:
    """Codes to the packed layout, padded with zeros to whole units, groups and blocks.

    codes [N, K] uint8, each below 2^bits, contiguous; group_size: columns per scale, a multiple of
    16; two_level: pad K
    to 256 -> [Np, Kp * bits / 8] int8. Raises RuntimeError for anything else.
    """
    return select("pack", codes.device, bits=bits)(codes, bits, group_size, two_level)


def unpack(weight: PackedWeight) -> Tensor:
    """The codes, [N, K] uint8, in logical column order."""
    codes = select("unpack", weight.codes.device, weight=weight.kind)(*weight.op_args())
    return codes if weight.perm is None else _unpermute(codes, weight.perm)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, [N, K] float32, float16 or bfloat16, computed in float32. Raises RuntimeError for
    another dtype."""
    values = select("dequantize", weight.codes.device, weight=weight.kind)(*weight.op_args(), dtype)
    return values if weight.perm is None else _unpermute(values, weight.perm)


def _unpermute(packed_order: Tensor, perm: Tensor) -> Tensor:
    """[*, K] in packed column order -> logical order: column perm[i] of the result is column i."""
    out = torch.empty_like(packed_order)
    out[:, perm] = packed_order
    return out
