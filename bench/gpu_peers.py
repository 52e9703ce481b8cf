"""4-bit products of other projects on CUDA, as far as they can be imported.

Each takes weights of its own making in its own layout, of the same shape, bits and group; its first
product is compared with the float one of the same codes before it is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels.bench.cases import LinearCase
from qkernels.bench.check import require_close
from qkernels.bench.gpu import Peer
from qkernels.bench.inputs import Baseline, turns
from qkernels.quant.weight import PackedWeight

_ROWS = 64  # of the weight, that are checked
SCALE = 0.01


class Misfit(ValueError):
    """A peer that does not take a case."""


def _needs(case: LinearCase, what: str, fits: bool) -> None:
    if not fits:
        raise Misfit(f"takes {what}, not {case.weight} with {case.act} activations")


def _checker(x: Tensor, weight: Callable[[], Tensor]) -> Callable[[str, Tensor], None]:
    """weight: its first rows in float32. They may be rounded to x's type on the way, and partial
    sums too: a hundredth of the norm of the products."""

    def check(what: str, y: Tensor) -> None:
        w, one = weight(), x[:4].float()
        bound = 0.01 * one.norm(dim=1)[:, None] * w.norm(dim=1)
        require_close(what, y[:4, : len(w)].float(), one @ w.T, bound)

    return check


def _codes(case: LinearCase, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(5)
    shape = (case.n, case.k)
    return torch.randint(16, shape, dtype=torch.uint8, generator=generator, device=device)


def gemlite(case: LinearCase, weight: PackedWeight, x: Tensor, copies: int) -> Baseline:
    """GemLiteLinear, W4A16; its Triton kernels tune themselves in the first call."""
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    _needs(case, "W4 g128 float", case.spec.bits == 4 and case.act == "float")
    group = case.spec.group(case.k)
    codes = _codes(case, x.device)
    layers = []
    for _ in range(copies):
        layer = GemLiteLinear(
            4, group_size=group, in_features=case.k, out_features=case.n,
            input_dtype=DType.BF16, output_dtype=DType.BF16,
        )  # fmt: skip
        scales = torch.full((case.n, case.k // group), SCALE, dtype=x.dtype, device=x.device)
        zeros = torch.full_like(scales, 8)
        layer.pack(codes, scales, zeros, None)
        layers.append(layer)
    check = _checker(x, lambda: SCALE * (codes[:_ROWS].float() - 8))
    return Baseline(turns([(layer,) for layer in layers], lambda layer: layer(x)), check)


def humming(case: LinearCase, weight: PackedWeight, x: Tensor, copies: int) -> Baseline:
    """HummingLayer, W4A16; it compiles with nvcc."""
    from humming import dtypes  # type: ignore[import-not-found]
    from humming.layer import HummingLayer  # type: ignore[import-not-found]
    from humming.utils.test import generate_random_weight  # type: ignore[import-not-found]

    _needs(case, "W4 float", case.spec.bits == 4 and case.act == "float")
    group = case.spec.group(case.k)
    _, exact, packed, scale, *_ = generate_random_weight(
        n=case.n, k=case.k, group_size=group, dtype=dtypes.uint4, scale_dtype=dtypes.bfloat16
    )
    layers = []
    for _ in range(copies):
        layer = HummingLayer(
            shape_n=case.n, shape_k=case.k, a_dtype=dtypes.bfloat16, b_dtype=dtypes.uint4,
            c_dtype=dtypes.bfloat16, bs_dtype=dtypes.bfloat16, weight_scale_group_size=group,
        ).to(x.device)  # fmt: skip
        layer.load_weight(weight=packed.clone(), weight_scale=scale.clone())
        layer.finish_load()
        layers.append(layer)
    tiles: dict[str, Any] = {}
    try:
        layers[0](inputs=x)
    except TypeError:  # versions that do not choose by themselves
        rows = 16 if case.m <= 16 else 64
        tiles = {"block_shape": (rows, 256, 64), "warp_shape": (rows, 64, 64)}
    check = _checker(x, lambda: exact[:_ROWS].float().to(x.device))
    call = turns([(layer,) for layer in layers], lambda layer: layer(inputs=x, **tiles))
    return Baseline(call, check)


def bitsandbytes(case: LinearCase, weight: PackedWeight, x: Tensor, copies: int) -> Baseline:
    """matmul_4bit of NF4 in blocks of 64: another format of 4 bits, of about the same size."""
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    _needs(case, "4 bits, float", case.spec.bits == 4 and case.act == "float")
    dense = torch.randn(case.n, case.k, device=x.device, dtype=x.dtype)
    quantized, state = bnb.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    items = [(quantized.clone(),) for _ in range(copies)]
    check = _checker(x, lambda: bnb.functional.dequantize_4bit(quantized, state)[:_ROWS].float())
    call = turns(items, lambda w: bnb.matmul_4bit(x, w.t(), quant_state=state))
    return Baseline(call, check)


LINEAR: dict[str, tuple[str, Peer]] = {
    "gemlite": ("gemlite", gemlite),
    "humming": ("humming", humming),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
}


def find() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be imported, and why each other one cannot."""
    found: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for name, (module, peer) in LINEAR.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # importing some of them runs the compiler
            absent[name] = f"{type(error).__name__}: {str(error)[:120]}"
        else:
            found[name] = peer
    return found, absent
