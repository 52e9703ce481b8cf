"""Kernels of attention and kv_append, to be compiled ahead of time: kinds of pages, products and
tiles."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from qkernels.triton import attention as launches
from qkernels.triton.attention_kernel import attention_kernel, attention_merge_kernel
from qkernels.triton.core import next_power_of_2
from qkernels.triton.kv_append import kv_append_kernel

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
POINTER = {F32: "*fp32", F16: "*fp16", BF16: "*bf16", torch.uint8: "*u8"}
WIDE = ("q_stride", "page_stride", "scale_stride", "k_stride", "v_stride")
INTS = ("query_start", "kv_len", "kv_start", "page_table")
BIAS = ("sinks", "alibi_slopes", "distance_bias")
PARTS = ("part_reference", "part_total", "part_sum")


def attention_case(
    gpu: str,
    query: torch.dtype,
    kind: str,
    dim: int,
    page: int,
    *,
    decode: bool,
    bias: bool = False,
    window: bool = False,
    each: int = 0,
    group: int = 4,
    tokens: int = 1,
) -> dict[str, Any]:
    """group: heads of q per head of k. tokens: of a sequence, which size the tiles of decode."""
    pages = {"float32": F32, "float16": F16, "bfloat16": BF16}.get(kind, torch.uint8)
    codes = pages == torch.uint8
    product = launches.product_type(query, pages)
    rows = tokens * group
    tile = launches.choose_tile(dim, rows, product, gpu, decode=decode, codes=codes)
    constexprs: dict[str, Any] = {
        "GROUP": group,
        "D": dim,
        "DP": next_power_of_2(dim),
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
        "name": f"attention {what} q {POINTER[query]} {kind} D {dim} page {page}"
        + f" rows {rows}" * (rows > group),
        "kernel": attention_kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **launches.FUSED,
        },
        "matrix": product != F32,
        "aligned": [*WIDE, *types],
    }


def merge_case(dim: int, tokens: int) -> dict[str, Any]:
    constexprs = {"D": dim, "DP": next_power_of_2(dim), "TOKENS": tokens, "BS": 8}
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
        "options": {"num_warps": 1 if dim <= 128 else 4, **launches.FUSED},
        "matrix": False,
        "aligned": list(types),
    }


def append_case(query: torch.dtype, kind: str, dim: int, page: int) -> dict[str, Any]:
    pages = {"float16": F16, "bfloat16": BF16}.get(kind, torch.uint8)
    bits = {"int8": 8, "int4": 4}.get(kind, 0)
    constexprs: dict[str, Any] = {
        "Q_HEADS": 8,
        "KV_HEADS": 2,
        "D": dim,
        "DP": next_power_of_2(dim),
        "PAGE": page,
        "ROTARY": dim,
        "BITS": bits,
        "H": max(1, min(1024 // next_power_of_2(dim), 8)),
        "positions": None,
    }
    if not bits:
        constexprs |= {"k_scale": None, "v_scale": None}
    types = dict.fromkeys(("q", "k", "v", "q_out"), POINTER[query])
    types |= dict.fromkeys(("k_pages", "v_pages"), POINTER[pages])
    types |= dict.fromkeys(("k_scale", "v_scale"), "*fp16") | {"rope": "*fp32"}
    types |= dict.fromkeys(INTS, "*i32")
    aligned = ["q_stride", "k_stride", "v_stride", "page_stride", "scale_stride"]
    signature = {
        name: "constexpr"
        if name in constexprs
        else types.get(name, "i64" if name in aligned else "i32")
        for name in kv_append_kernel.arg_names
    }
    return {
        "name": f"kv_append {POINTER[query]} {kind} D {dim}",
        "kernel": kv_append_kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": {"num_warps": 4},
        "matrix": False,
        "aligned": [*aligned, *types],
    }


def cases(kind: str, every: bool) -> list[dict[str, Any]]:
    """kind: class of GPU. every: all kinds of pages; else what differs most."""
    found = [
        attention_case(kind, BF16, "bfloat16", 128, 64, decode=False),
        attention_case(kind, BF16, "int8", 128, 64, decode=False),
        attention_case(kind, F16, "float16", 128, 64, decode=True),
        attention_case(kind, BF16, "int4", 128, 64, decode=True, each=2, window=True),
        attention_case(kind, BF16, "bfloat16", 64, 0, decode=False, window=True),
        attention_case(kind, F32, "float32", 64, 16, decode=True, bias=True),
        merge_case(128, 8),
        append_case(BF16, "int4", 128, 64),
        append_case(F16, "float16", 80, 16),
    ]
    if every:
        pages = [(F16, "float16"), (BF16, "float16"), (BF16, "int4"), (F32, "float32")]
        pages += [(F32, "int8"), (F16, "bfloat16")]
        for (query, page), decode in itertools.product(pages, (True, False)):
            found.append(attention_case(kind, query, page, 128, 64, decode=decode))
        shapes = [("bfloat16", 80, True), ("int4", 80, False), ("int8", 256, False)]
        shapes += [("int4", 16, True), ("bfloat16", 256, False), ("int8", 512, True)]
        shapes += [("bfloat16", 512, False), ("bfloat16", 272, True)]
        for page, dim, decode in shapes:
            found.append(attention_case(kind, BF16, page, dim, 16, decode=decode, bias=dim == 80))
        few_tokens = [(BF16, "bfloat16"), (F16, "float16"), (BF16, "int8"), (BF16, "int4")]
        for (query, page), dim, group in itertools.product(few_tokens, (64, 128), (4, 8)):
            found.append(
                attention_case(kind, query, page, dim, 64, decode=True, group=group, tokens=8)
            )
        found += [merge_case(512, 0), append_case(F32, "int8", 512, 32)]
    return found
