"""Rounding float weights to any QuantSpec: to the nearest code, with the clip of each group
searched for the least
squared error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .spec import BLOCK, QuantSpec, round_up
from .weight import UNIT_ROWS, PackedWeight, PlainWeight, check_g_idx

# Clips tried per group, as parts of the range; the first that is best wins. Finer steps gain under
# 1% of the error.
_CLIPS = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
}
_FINE_CLIPS = (1.0, 0.97, 0.94)
ALGOS = ("auto", "rtn")
_TINY = 2.0**-100  # a smaller scale counts as 0: its inverse must stay finite

# Values per row block: a few such float32 buffers stay in a core's L2 cache.
_BLOCK_VALUES = 1 << 18


def quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    g_idx: Tensor | None = None,
    search: bool = True,
    name: str = "weight",
) -> PlainWeight:
    """weight [N, K], any float dtype -> codes, scales and zeros, on its device.

    g_idx [K] int32: the group of every column, for act_order. search: False takes the whole range
    of each group.
    e4m3 scales reach from 2^-9 to 448: divide the weight by a factor of the whole tensor first (see
    QuantSpec).
    name: of the weight in messages. Raises ValueError for values that are not finite, scales that
    overflow, a shape that
    is not [N, K], and a g_idx that does not fit.
    """
    check_weight(weight, spec, g_idx, name)
    rows = block_rows(weight.shape[1])
    blocks = [
        _quantize_block(weight, spec, g_idx, search, name, at, rows)
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
    algo: str = "rtn",
    name: str = "weight",
) -> PackedWeight:
    """`quantize(...).pack()`, in row blocks, so that the plain weight is never whole in memory."""
    check_algo(algo)
    check_weight(weight, spec, g_idx, name)
    packed = PackedWeight.empty(spec, weight.shape[0], weight.shape[1], device=weight.device)
    rows = block_rows(weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        packed.write_rows(start, _quantize_block(weight, spec, g_idx, search, name, start, rows))
    return packed


def check_algo(algo: str) -> None:
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
    search: bool,
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
    rounding = _Rounding(x, spec, k - (groups - 1) * group)
    if spec.two_level:
        scale, zero = rounding.search(torch.float32, search)
        stored: dict[str, Any] = _to_two_levels(scale, zero, spec, group)
        plain_scale, plain_zero = _from_two_levels(stored, spec, group)
    else:
        plain_scale, plain_zero = rounding.search(spec.scale_dtype, search)
        zero_dtype = spec.zero_dtype
        stored = {
            "scale": _store(plain_scale, spec.scale_dtype),
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


def _store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e8m0fnu:  # powers of two already
        exponent = torch.where(scale > 0, torch.frexp(scale).exponent - 1, -127)
        return (exponent + 127).to(torch.uint8).view(dtype)
    return scale.to(dtype)


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale as the format holds it, in float32. e8m0: rounded up, so that clips of 1/2 step through
    the powers."""
    if dtype == torch.float32:
        return scale
    if dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
        return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), 0.0)
    rounded = scale.to(dtype).float()
    # float8 saturates where the others overflow; 464 is half a step above its largest, 448.
    return (
        torch.where(scale.abs() >= 464.0, torch.inf, rounded)
        if dtype == torch.float8_e4m3fn
        else rounded
    )


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > _TINY, 1.0 / scale, 0.0)


class _Rounding:
    """Groups x [n, groups, group] float32 and how codes for them follow from a scale and a zero,
    both [n, groups].

    The zero is subtracted from codes (symmetric and integer) or from values (minimum: x = scale *
    code - zero).
    """

    def __init__(self, x: Tensor, spec: QuantSpec, last: int) -> None:
        """last: columns of the last group that are not padding."""
        self.x, self.spec, self.last = x, spec, last
        self.top = (1 << spec.bits) - 1
        self.buffer = torch.empty_like(x)
        if spec.table is not None:
            levels, code = torch.tensor(spec.table, dtype=torch.float32, device=x.device).sort(
                stable=True
            )
            first = torch.ones_like(levels, dtype=torch.bool)
            first[1:] = levels[1:] != levels[:-1]  # of equal values the lowest code
            self.levels, self.level_code = levels[first], code[first].to(torch.uint8)
            self.between = (self.levels[1:] + self.levels[:-1]) / 2

    def search(self, dtype: torch.dtype, search: bool) -> tuple[Tensor, Tensor]:
        """The scale (representable in dtype, as float32) and zero of least squared error among the
        clips."""
        clips = _CLIPS.get(self.spec.bits, _FINE_CLIPS) if search else (1.0,)
        if dtype == torch.float8_e8m0fnu:
            clips = (1.0, 0.5) if search else (1.0,)
        lo, hi = self.x.amin(dim=2), self.x.amax(dim=2)  # aminmax takes five times both
        scale, zero = self._clipped(lo, hi, clips[0], dtype)
        if len(clips) == 1:
            return scale, zero
        error = self._error(scale, zero)
        for clip in clips[1:]:
            other_scale, other_zero = self._clipped(lo, hi, clip, dtype)
            other = self._error(other_scale, other_zero)
            better = other < error
            error = torch.where(better, other, error)
            scale, zero = (
                torch.where(better, other_scale, scale),
                torch.where(better, other_zero, zero),
            )
        return scale, zero

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """[n, groups, group] uint8."""
        if self.spec.table is not None:
            return self.level_code[self._level(scale)]
        return self._code(scale, zero).to(torch.uint8)

    def _clipped(
        self, lo: Tensor, hi: Tensor, clip: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """scale and zero that make the codes span this part of the range lo .. hi."""
        spec = self.spec
        if spec.zero == "symmetric":
            # The value of largest magnitude, with its sign, takes the code of largest magnitude:
            # -2^(bits-1), or the extreme of the table. So negative scales are normal, except where
            # the ends are alike or the format has no sign: there both ends must fit.
            ends = (
                (-spec.zero_point, spec.zero_point - 1)
                if spec.table is None
                else (min(spec.table), max(spec.table))
            )
            unsigned = spec.scale in ("e8m0", "e4m3") or ends[0] == -ends[1]
            if unsigned and ends[0] < 0 < ends[1]:
                full = torch.maximum(lo / ends[0], hi / ends[1])
            else:
                full = torch.where(-lo > hi, lo, hi) / max(ends, key=abs)
            scale = _representable(full * clip, dtype)
            return scale, torch.full_like(scale, float(spec.zero_point))
        if spec.scale == "uint4":  # its minima are what is subtracted, and have no sign
            lo = lo.clamp(max=0.0)
        if spec.zero == "integer":
            lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
            scale = _representable((hi - lo) * (clip / self.top), dtype)
            return scale, torch.round(-lo * clip * _inverse(scale)).clamp_(0, self.top)
        middle, half = hi / 2 + lo / 2, (hi / 2 - lo / 2) * clip
        if spec.scale == "uint4":  # a range that begins at 0 stays there
            minimum = (half - middle).clamp(min=0.0)
        else:
            minimum = -lo if clip == 1.0 else half - middle
        return _representable(half * (2.0 / self.top), dtype), _representable(minimum, dtype)

    def _code(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes as floats, in the buffer."""
        q = torch.mul(self.x, _inverse(scale)[..., None], out=self.buffer)
        if self.spec.zero == "minimum":
            q = q.add_((zero * _inverse(scale))[..., None]).round_()
        else:
            q = q.round_().add_(zero[..., None])
        return q.clamp_(0, self.top)

    def _level(self, scale: Tensor) -> Tensor:
        """Indices of the nearest levels of the table."""
        return torch.bucketize(
            torch.mul(self.x, _inverse(scale)[..., None], out=self.buffer),
            self.between,
            out_int32=True,
        )

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Sum of squares over each group, [n, groups]; infinite where the scale is."""
        if self.spec.table is not None:
            q = self.levels[self._level(scale)].mul_(scale[..., None])
        elif self.spec.zero == "minimum":
            q = self._code(scale, zero).mul_(scale[..., None]).sub_(zero[..., None])
        else:
            q = self._code(scale, zero).sub_(zero[..., None]).mul_(scale[..., None])
        q = q.sub_(self.x)
        q[:, -1, self.last :] = 0.0
        error = q.square_().sum(dim=2)
        return torch.where(torch.isfinite(error), error, torch.inf)


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
    integers = torch.round(padded * _inverse(block.float())[..., None]).clamp_(-top, top)
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
