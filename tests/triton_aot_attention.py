"""Attention's kernels, to be compiled ahead of time: one of every kind of page, product and tile."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from qkernels.triton import attention as launches
from qkernels.triton.attention_kernel import attention_kernel, attention_merge_kernel

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
POINTER = {F32: "*fp32", F16: "*fp16", BF16: "*bf16", torch.uint8: "*u8"}
WIDE = ("q_stride", "page_stride", "scale_stride", "k_stride", "v_stride")
INTS = ("query_start", "kv_len", "kv_start", "page_table")
BIAS = ("sinks", "alibi_slopes", "distance_bias")
PARTS = ("part_reference", "part_total", "part_sum")


def case(
    query: torch.dtype,
    kind: str,
    dim: int,
    page: int,
    *,
    decode: bool,
    bias: bool = False,
    window: bool = False,
    each: int = 0,
) -> dict[str, Any]:
    pages = {"float32": F32, "float16": F16, "bfloat16": BF16}.get(kind, torch.uint8)
    codes, group = pages == torch.uint8, 4
    product = launches.product_type(query, pages)
    tile = launches.choose_tile(dim, group, product, decode=decode, codes=codes)
    constexprs: dict[str, Any] = {
        "GROUP": group,
        "D": dim,
        "DP": launches.padded_dim(dim, nibbles=kind == "int4"),
        "PAGE": page,
        "NIBBLES": kind == "int4",
        "CAUSAL": True,
        "WINDOW": window,
        "SOFTCAP": bias,
        "PRODUCT": launches.PRODUCTS[product],
        "BM": tile.rows,
        "BN": tile.keys,
        "EACH": each,
    }
    types = {"q": POINTER[query], "out": POINTER[query], "k": POINTER[pages], "v": POINTER[pages]}
    types |= dict.fromkeys(INTS, "*i32") | dict.fromkeys((*BIAS, *PARTS), "*fp32")
    types |= {"k_scale": "*fp16", "v_scale": "*fp16", "scale": "fp32", "softcap": "fp32"}
    absent = ("kv_start",) if page else ("kv_len", "page_table")
    absent += () if bias else BIAS
    absent += () if codes else ("k_scale", "v_scale")
    absent += () if decode else PARTS
    constexprs |= dict.fromkeys(absent)
    signature = {
        name: "constexpr"
        if name in constexprs
        else types.get(name, "i64" if name in WIDE else "i32")
        for name in attention_kernel.arg_names
    }
    what = "decode" if decode else "prefill"
    return {
        "name": f"attention {what} q {POINTER[query]} {kind} D {dim} page {page}",
        "kernel": attention_kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        "matrix": product != F32,
        "aligned": WIDE,
    }


def merge_case(dim: int, tokens: int) -> dict[str, Any]:
    constexprs = {
        "D": dim,
        "DP": launches.padded_dim(dim, nibbles=False),
        "TOKENS": tokens,
        "BS": 8,
    }
    types = {"out": "*bf16", "sinks": "*fp32", "query_start": "*i32"}
    types |= dict.fromkeys(PARTS, "*fp32")
    signature = {
        name: "constexpr" if name in constexprs else types.get(name, "i32")
        for name in attention_merge_kernel.arg_names
    }
    return {
        "name": f"attention merge D {dim}",
        "kernel": attention_merge_kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": {"num_warps": 1 if dim <= 128 else 4},
        "matrix": False,
    }


def cases() -> list[dict[str, Any]]:
    found = [
        case(query, kind, 128, 64, decode=decode)
        for (query, kind), decode in itertools.product(
            [(F16, "float16"), (BF16, "bfloat16"), (BF16, "float16"), (BF16, "int8"),
             (BF16, "int4"), (F32, "float32"), (F32, "int8")],
            (True, False),
        )
    ]  # fmt: skip
    found += [
        case(BF16, kind, dim, 16, decode=decode, bias=dim == 80)
        for kind, dim, decode in [
            ("bfloat16", 80, True), ("int4", 80, False), ("int8", 256, False), ("int4", 16, True),
            ("bfloat16", 256, False), ("int8", 512, True), ("bfloat16", 512, False),
        ]
    ]  # fmt: skip
    found += [
        case(BF16, "bfloat16", 64, 0, decode=False, window=True),
        case(F16, "float16", 128, 0, decode=True),
        case(F16, "bfloat16", 64, 16, decode=False, bias=True),
        case(BF16, "int4", 128, 64, decode=True, each=2, window=True),
        merge_case(128, 8),
        merge_case(512, 0),
    ]
    return found
