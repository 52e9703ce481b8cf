"""linear's Triton kernels as they are compiled ahead of time: every width and zero, with and
without a table of values, activations of 16 bits and int8, the shapes of each class of GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from qkernels.triton import linear, linear_kernels, tuning

_POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*i16",
    "e8m0": "*u8",
    "e4m3": "*u8",
    "int8": "*i8",
    "uint4": "*u8",
}
_OUTPUTS = {"int8": "*fp16", "float16": "*fp16", "bfloat16": "*bf16"}
_NUMBERS = ["m", "n", "k", "units", "group_units", "act_units", "act_groups"]
_NUMBERS += ["x_stride", "y_stride", "residual_stride", "part_units"]


def _case(
    kernel: str,
    bits: int,
    scale: str,
    zero: str,
    act: str,
    kind: str,
    m: int,
    units: int,
    split: bool,
    table: bool = False,
    added: bool = False,
) -> dict[str, Any]:
    """units: the most that a group has. table: codes stand for values of one. added: a bias and a
    residual are added in the kernel."""
    key = tuning.Key(kernel, bits, scale, getattr(torch, act), m, 4096, 4096)
    shape = tuning.of_table(key, kind)
    two_level = scale in ("int8", "uint4")
    has_zero = zero == "integer" or (zero == "minimum" and scale != "uint4")
    int8 = act == "int8"
    signature = {
        "x": {"int8": "*i8", "float16": "*fp16", "bfloat16": "*bf16"}[act],
        "x_scale": "*fp32" if int8 else "constexpr",
        "codes": "*i32",
        "scale": _POINTERS[scale],
        "zero": ("*u8" if zero == "integer" else _POINTERS[scale]) if has_zero else "constexpr",
        "block_scale": "*fp16" if two_level else "constexpr",
        "block_zero": "*fp16" if two_level and zero == "minimum" else "constexpr",
        "table": "*i8" if table else "constexpr",
        "y": "*fp32" if split else _OUTPUTS[act],
        "bias": "*fp32" if added else "constexpr",
        "residual": _OUTPUTS[act] if added else "constexpr",
        **dict.fromkeys(_NUMBERS, "i32"),
    }
    constexprs: dict[str, Any] = {
        "BITS": bits,
        "SCALE": scale,
        "ZERO": zero,
        "MIDDLE": 0.0 if table else float(1 << (bits - 1)),
        "SPLIT": split,
    }
    if isinstance(shape, tuning.TileConfig):
        u = min(shape.units, units)
        product = linear.operands(act_int8=int8, bits=bits, table=table, zero=zero, units=u)
        types = {
            "int8": tl.int8,
            "float16": tl.float16,
            "bfloat16": tl.bfloat16,
        }
        constexprs |= {
            "TYPE": types[product or act],
            "B": shape.row_blocks,
            "M": shape.tokens,
            "U": u,
        }
        function = linear_kernels.linear_tile_kernel
    else:
        constexprs |= {"U": shape.units, "STAGES": shape.stages}
        function = linear_kernels.linear_gemv_kernel
    name = f"{kernel} W{bits} {scale} {zero} {act} M={m} {units} units"
    name += " table" * table + " bias residual" * added
    return {
        "name": name,
        "kernel": function,
        "signature": signature,
        "constexprs": constexprs,
        "options": {"num_warps": shape.warps, "num_stages": shape.stages},
        "matrix": kernel == "tile",
        "aligned": ["x", "codes", "scale", "y", "n", "k", "x_stride", "y_stride"],
    }


def _sum_case(to: str, added: bool) -> dict[str, Any]:
    """The sum of the parts of K."""
    numbers = ("m", "n", "parts", "y_stride", "residual_stride")
    signature = {"partial": "*fp32", "y": to, **dict.fromkeys(numbers, "i32")}
    signature |= {"bias": "*fp32", "residual": to} if added else {}
    return {
        "name": f"sum of parts {to}" + " bias residual" * added,
        "kernel": linear_kernels.linear_sum_kernel,
        "signature": signature,
        "constexprs": {"BLOCK": 256},
        "options": {},
        "matrix": False,
        "aligned": ["partial", "y", "n", "y_stride"],
    }


def cases(kind: str, every: bool) -> list[dict[str, Any]]:
    """kind: class of GPU. every: all widths and zeros with all activations; else a few."""
    if not every:
        few = [("gemv", 4, "float16", "symmetric", "float16", 1, 2)]
        few += [("tile", 4, "float16", "symmetric", "float16", m, 2) for m in (16, 128)]
        few += [("tile", 4, "int8", "minimum", "bfloat16", 64, 2)]
        few += [("tile", 8, "float16", "symmetric", "int8", 128, 8)]
        some = [_case(*form, kind, m, units, m <= 16) for *form, m, units in few]
        mxfp4 = (4, "e8m0", "symmetric", "bfloat16", kind)
        return [*some, _case("tile", *mxfp4, 64, 2, False, True, True), _sum_case("*bf16", True)]
    made = [_sum_case(to, added) for to in ("*fp16", "*bf16", "*fp32") for added in (False, True)]
    for scale, units in (("e8m0", 2), ("e4m3", 1), ("float16", 4)):  # MXFP4, NVFP4, IQ4_NL
        for act in ("float16", "bfloat16", "int8"):
            weight = (4, scale, "symmetric", act, kind)
            made.append(_case("gemv", *weight, 1, units, False, True, True))
            for m in (16, 64, 128):
                made.append(_case("tile", *weight, m, units, False, True, True))
    scales = [("float16", "symmetric", 2), ("float16", "integer", 8), ("bfloat16", "minimum", 2)]
    scales += [("float32", "integer", 1), ("int8", "minimum", 2)]
    formats = [(bits, *scale) for bits in (2, 3, 4, 5, 6, 8) for scale in scales]
    formats += [
        (4, "e8m0", "symmetric", 2),
        (4, "e4m3", "symmetric", 1),
        (2, "uint4", "minimum", 1),
    ]
    for bits, scale, zero, units in formats:
        for act in ("float16", "bfloat16", "int8"):
            made.append(_case("gemv", bits, scale, zero, act, kind, 1, units, True))
            for m in (16, 64, 128):
                made.append(_case("tile", bits, scale, zero, act, kind, m, units, m == 16))
    return made
