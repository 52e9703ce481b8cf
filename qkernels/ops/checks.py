"""Metadata checks of the fakes and the reference: csrc/check.h in Python, with the same conditions
and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..quant import layout
from ..quant.spec import BITS, BLOCK, FLAT_SCALES

MAX_GROUP = 1 << 30
MAX_SIZE = 2**31 - 1  # of n and k
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fail(op: str, text: str) -> NoReturn:
    raise RuntimeError(f"qkernels::{op}: {text}")


def check(ok: bool, op: str, text: str | Callable[[], str]) -> None:
    """Raises RuntimeError, as the C++ checks do, unless ok. text may be a function where it is
    costly to write."""
    if not ok:
        fail(op, text if isinstance(text, str) else text())


def same_device(op: str, first: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            fail(op, f"{name} is on {tensor.device}, but {first} is on {device}")


def no_gradient(op: str, *tensors: Tensor) -> None:
    """Refuses a gradient that an op without a backward would lose without a word. For typed
    functions: an autograd formula that raises would cost each call about 15 us in Python."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        fail(op, "has no backward; call it under torch.no_grad()")


def float_type(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        fail(op, f"{name} must be float32, float16 or bfloat16, got {type_name(dtype)}")


def expect(op: str, name: str, tensor: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """tensor has this dtype and these sizes (-1: any), and is contiguous."""
    if tensor.dtype != dtype:
        fail(op, f"{name} must be {type_name(dtype)}, got {type_name(tensor.dtype)}")
    if tensor.dim() != len(sizes) or any(
        w >= 0 and s != w for s, w in zip(tensor.shape, sizes, strict=True)
    ):
        want = ", ".join("*" if size < 0 else str(size) for size in sizes)
        fail(op, f"{name} must be [{want}], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        fail(op, f"{name} must be contiguous; call .contiguous() on it")


def rows(op: str, name: str, tensor: Tensor) -> None:
    """[M, K]: the last dimension dense; rows may be any constant stride apart."""
    if tensor.dim() != 2:
        fail(op, f"{name} must have 2 dimensions, got {list(tensor.shape)}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        fail(op, f"{name} must be dense in its last dimension")


def group_of(op: str, name: str, group: int) -> None:
    if group < 16 or group % 16:
        fail(op, f"{name} must be a positive multiple of 16, got {group}")
    if group > MAX_GROUP:
        fail(op, f"{name} must be at most {MAX_GROUP}, got {group}")


def act_group(op: str, group: int) -> None:
    group_of(op, "act_group", group)


def sizes(op: str, n: int, k: int) -> None:
    if n <= 0 or k <= 0:
        fail(op, f"a weight needs n > 0 and k > 0, got n = {n}, k = {k}")
    if n > MAX_SIZE or k > MAX_SIZE:
        fail(op, f"a weight has at most {MAX_SIZE} rows and columns, got n = {n}, k = {k}")


def weight(
    op: str,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    block_scale: Tensor | None,
    block_zero: Tensor | None,
    table: Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> None:
    """The tensors and numbers of one packed weight; `make_weight` of csrc/check.h."""
    if bits not in BITS:
        fail(op, f"bits must be 2, 3, 4, 5, 6 or 8, got {bits}")
    sizes(op, n, k)
    group_of(op, "group_size", group_size)
    two_level = block_scale is not None
    if two_level and BLOCK % group_size:
        fail(op, f"two-level scales need a group_size that divides 256, got {group_size}")
    kp, blocks = layout.padded_k(k, group_size, two_level), layout.padded_n(n) // 64
    groups = [blocks, kp // group_size, 64]
    expect(op, "codes", codes, torch.int8, [blocks * 64, kp * bits // 8])
    st = scale.dtype
    if block_scale is not None:
        if st not in (torch.int8, torch.uint8):
            fail(
                op, f"two-level scale must be int8, or uint8 pairs of nibbles, got {type_name(st)}"
            )
        expect(op, "block_scale", block_scale, torch.float16, [blocks, kp // BLOCK, 64])
    elif st not in FLAT_SCALES.values():
        fail(
            op,
            "scale must be float32, float16, bfloat16, float8_e8m0fnu, float8_e4m3fn, or "
            "int8/uint8 with a "
            f"block_scale, got {type_name(st)}",
        )
    expect(op, "scale", scale, st, groups)
    if st == torch.uint8:
        if zero is not None or block_zero is None:
            fail(op, "uint8 two-level scales hold their minima: they need block_zero and no zero")
    elif zero is not None:
        integer = zero.dtype == torch.uint8 and not two_level
        if not integer and zero.dtype != st:
            fail(
                op,
                f"zero must be uint8 (zero points) or of the scale's type {type_name(st)} "
                "(minima), "
                f"got {type_name(zero.dtype)}",
            )
        if two_level and block_zero is None:
            fail(op, "two-level minima need block_zero")
        expect(op, "zero", zero, zero.dtype, groups)
    elif block_zero is not None:
        fail(op, "block_zero needs zero")
    if block_zero is not None:
        if not two_level:
            fail(op, "block_zero needs block_scale")
        expect(op, "block_zero", block_zero, torch.float16, [blocks, kp // BLOCK, 64])
    if table is not None:
        if bits != 4:
            fail(op, f"a table of 16 values needs bits = 4, got {bits}")
        if zero is not None or block_zero is not None:
            fail(op, "a table has its own zero: it takes no zero points and no minima")
        expect(op, "table", table, torch.int8, [16])
    same_device(
        op,
        "codes",
        codes.device,
        scale=scale,
        zero=zero,
        block_scale=block_scale,
        block_zero=block_zero,
        table=table,
    )


def checked(check_args: Callable[..., object], function: Callable[..., Any]) -> Callable[..., Any]:
    """function, whose arguments are first given to check_args."""

    def call(*args: Any) -> Any:
        check_args(*args)
        return function(*args)

    return call
