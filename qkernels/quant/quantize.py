"""Float weights to any QuantSpec: to the nearest code, or half-quadratic, a block of rows at a
time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .hqq import half_quadratic
from .rounding import Rounding, inverse, store
from .spec import BLOCK, QuantSpec, round_up
from .weight import UNIT_ROWS, PackedWeight, PlainWeight, check_g_idx

Method = Callable[[Rounding, torch.dtype], tuple[Tensor, Tensor]]
ALGOS = ("auto", "rtn", "hqq")

# Values per row block: a few such float32 buffers stay in a core's L2 cache.
_BLOCK_VALUES = 1 << 18


def quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    g_idx: Tensor | None = None,
    search: bool = True,
    algo: str = "auto",
    name: str = "weight",
) -> PlainWeight:
    """weight [N, K], any float dtype -> codes, scales and zeros, on its device.

    g_idx [K] int32: the group of every column, for act_order. algo: "rtn" takes the nearest codes
    for the scale and zero of least squared error that a search of clips finds, "hqq" those of
    half-quadratic quantization, "auto" what measured best, which is "rtn" for every spec. search:
    False takes the whole range of each group. e4m3 scales reach from 2^-9 to 448: divide the weight
    by a factor of the whole tensor first (see QuantSpec). name: of the weight in messages. Raises
    ValueError for values that are not finite, scales that overflow, a shape that is not [N, K], and
    a g_idx or an algorithm that does not fit.
    """
    how = _method(algo, spec, search)
    check_weight(weight, spec, g_idx, name)
    rows = block_rows(weight.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        blocks = [
            _quantize_block(weight, spec, g_idx, how, name, at, rows)
            for at in range(0, weight.shape[0], rows)
        ]
    if len(blocks) == 1:
        return blocks[0]
    joined: dict[str, Any] = {
        part: _cat([getattr(block, part) for block in blocks])
        for part in ("codes", "scale", "zero", "block_scale", "block_zero")
        if getattr(blocks[0], part) is not None
    }
    return replace(blocks[0], **joined)


def quantize_packed(
    weight: Tensor,
    spec: QuantSpec,
    *,
    g_idx: Tensor | None = None,
    search: bool = True,
    algo: str = "auto",
    name: str = "weight",
) -> PackedWeight:
    """`quantize(...).pack()`, in row blocks, so that the plain weight is never whole in memory."""
    how = _method(algo, spec, search)
    check_weight(weight, spec, g_idx, name)
    packed = PackedWeight.empty(spec, weight.shape[0], weight.shape[1], device=weight.device)
    rows = block_rows(weight.shape[1])
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, weight.shape[0], rows):
            packed.write_rows(start, _quantize_block(weight, spec, g_idx, how, name, start, rows))
    return packed


def _method(algo: str, spec: QuantSpec, search: bool) -> Method:
    check_algo(algo)
    if not search:
        if algo == "hqq":
            raise ValueError("quantize: search=False takes the whole range, and hqq searches")
        return Rounding.full
    return half_quadratic if algorithm_of(algo, spec) == "hqq" else Rounding.search


def check_algo(algo: str) -> None:
    """Raises ValueError for an algorithm that does not exist."""
    if algo not in ALGOS:
        raise ValueError(f"algo must be one of {ALGOS}, got {algo!r}")


def algorithm_of(algo: str, spec: QuantSpec) -> str:
    """What "auto" is for a format."""
    return "rtn" if algo == "auto" else algo


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """||W - dequantized|| / ||W||, of weight [N, K]; in row blocks. 0 for a weight of zeros."""
    rows = block_rows(packed.k)
    lost = norm = 0.0
    for start in range(0, packed.n, rows):
        stop = min(start + rows, packed.n)
        exact = weight[start:stop].detach().float()
        norm += float(exact.double().square().sum())
        lost += float((packed.slice_rows(start, stop).dequantize() - exact).double().square().sum())
    return (lost / norm) ** 0.5 if norm else 0.0


def block_rows(k: int) -> int:
    """Rows of k columns that are quantized at a time: a multiple of 64."""
    return max(1, _BLOCK_VALUES // (k * UNIT_ROWS)) * UNIT_ROWS


def check_weight(weight: Tensor, spec: QuantSpec, g_idx: Tensor | None, name: str) -> None:
    if weight.dim() != 2 or min(weight.shape) < 1 or not weight.is_floating_point():
        raise ValueError(
            f"{name} must be [N, K] of a float dtype with N, K > 0, got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    if spec.act_order != (g_idx is not None):
        raise ValueError(f"{name}: {spec} {'needs a' if spec.act_order else 'has no'} g_idx")
    if g_idx is not None:
        k = weight.shape[1]
        if tuple(g_idx.shape) != (k,) or g_idx.dtype != torch.int32:
            raise ValueError(
                f"{name}: g_idx must be torch.int32 [{k}], got {g_idx.dtype} {list(g_idx.shape)}"
            )
        check_g_idx(g_idx, spec.group(k))


def _cat(parts: list[Tensor]) -> Tensor:
    if (
        parts[0].dtype.itemsize == 1 and parts[0].is_floating_point()
    ):  # torch concatenates no float8
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def _quantize_block(
    weight: Tensor,
    spec: QuantSpec,
    g_idx: Tensor | None,
    method: Method,
    name: str,
    start: int,
    rows: int,
) -> PlainWeight:
    """Rows start .. start + rows."""
    block = weight[start : start + rows].detach().float()
    if not torch.isfinite(block.sum()) and not (finite := torch.isfinite(block)).all():
        row, col = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {block[row, col].item()} at row {row + start}, column {col}"
        )
    n, k = block.shape
    group, groups = spec.group(k), spec.groups(k)
    perm = None if g_idx is None else torch.argsort(g_idx, stable=True)
    if perm is not None:
        block = block[:, perm]
    if groups * group != k:  # the last column again: it moves neither end of the range
        block = torch.cat([block, block[:, -1:].expand(n, groups * group - k)], dim=1)
    x = block.reshape(n, groups, group).contiguous()
    rounding = Rounding(x, spec, k - (groups - 1) * group)
    if spec.two_level:
        scale, zero = method(rounding, torch.float32)
        stored: dict[str, Any] = _to_two_levels(scale, zero, spec, group)
        plain_scale, plain_zero = _from_two_levels(stored, spec, group)
    else:
        plain_scale, plain_zero = method(rounding, spec.scale_dtype)
        zero_dtype = spec.zero_dtype
        stored = {
            "scale": store(plain_scale, spec.scale_dtype),
            "zero": None if zero_dtype is None else plain_zero.to(zero_dtype),
        }
    for part, values in (("scale", plain_scale), ("zero", plain_zero)):
        if not (finite := torch.isfinite(values)).all():
            row, index = (~finite).nonzero()[0].tolist()
            dtype = torch.float16 if spec.two_level else spec.scale_dtype
            raise ValueError(
                f"{name}: the {part} of row {row + start}, group {index} overflows {dtype}"
            )
    codes = rounding.codes(plain_scale, plain_zero).view(n, groups * group)[:, :k]
    if perm is not None:
        logical = torch.empty_like(codes)
        logical[:, perm] = codes
        codes = logical
    return PlainWeight(spec, codes.contiguous(), g_idx=g_idx, **stored)


def _to_two_levels(
    scale: Tensor, zero: Tensor, spec: QuantSpec, group: int
) -> dict[str, Tensor | None]:
    """Scales and minima [n, groups] as small integers times the float16 of their block."""
    top = 15 if spec.scale == "uint4" else 127
    integers, block_scale = _two_levels(scale, top, group)
    if spec.zero != "minimum":
        return {"scale": integers.to(torch.int8), "block_scale": block_scale}
    minima, block_zero = _two_levels(zero, top, group)
    if spec.scale == "uint4":
        pairs = integers.to(torch.uint8) | (minima.to(torch.uint8) << 4)
        return {"scale": pairs, "block_scale": block_scale, "block_zero": block_zero}
    return {
        "scale": integers.to(torch.int8),
        "zero": minima.to(torch.int8),
        "block_scale": block_scale,
        "block_zero": block_zero,
    }


def _two_levels(values: Tensor, top: int, group: int) -> tuple[Tensor, Tensor]:
    n, groups = values.shape
    per_block = BLOCK // group
    padded = torch.nn.functional.pad(values, (0, round_up(groups, per_block) - groups)).view(
        n, -1, per_block
    )
    block = (padded.abs().amax(dim=2) / top).to(torch.float16)
    integers = torch.round(padded * inverse(block.float())[..., None]).clamp_(-top, top)
    return integers.view(n, -1)[:, :groups], block


def _from_two_levels(
    stored: dict[str, Tensor | None], spec: QuantSpec, group: int
) -> tuple[Tensor, Tensor]:
    """The scales and zeros that decoding will see."""
    scale, block_scale = stored["scale"], stored["block_scale"]
    assert scale is not None and block_scale is not None
    block_of = torch.arange(scale.shape[1], device=scale.device) * group // BLOCK
    low = (scale & 15).float() if spec.scale == "uint4" else scale.float()
    plain = low * block_scale.float()[:, block_of]
    if spec.zero != "minimum":
        return plain, torch.full_like(plain, float(spec.zero_point))
    minima, block_zero = stored.get("zero"), stored["block_zero"]
    assert block_zero is not None
    high = (scale >> 4).float() if minima is None else minima.float()
    return plain, high * block_zero.float()[:, block_of]
