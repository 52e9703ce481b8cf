"""linear and linear_quant: y = x W^T + bias + residual over packed weights.

Three ways, by the number of tokens:

    gemv     one: every lane multiplies the codes of its words in float32
    tile     up to 384: codes become a matrix in 16 bits (or int8), which holds them exactly; the
             sums over the columns of one group are scaled afterwards, in float32
    dense    beyond, and float32 activations: the weight is dequantized, and torch multiplies

The first two may cut K into parts; a second kernel adds them up, in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import registry
from ..quant.spec import round_up
from . import interpreted, tuning
from .core import EXACT, device_of, multiprocessors, next_power_of_2
from .linear_kernels import linear_gemv_kernel, linear_sum_kernel, linear_tile_kernel
from .pack import dequantize
from .quantize_act import quantize_act
from .tuning import Config, GemvConfig, TileConfig
from .weight import Weight, weight_args

_W = 10  # arguments that a weight is
_DENSE_BYTES = 64 << 10 if interpreted() else 256 << 20  # tests have small ones
_PACKED_TOKENS = 384  # as csrc/cuda/linear.cu, where its reason stands


class Activations(NamedTuple):
    """x [M, K] of 16 bits with scale None, or int8 codes [M, Kx] with scale [M, Kx / group]."""

    x: Tensor
    scale: Tensor | None
    group: int

    @property
    def columns(self) -> int:
        return self.x.shape[1]


def _parts(tiles: int, steps: int, device: torch.device, least: int) -> int:
    """Into how many parts K is cut, so that the blocks fill the device about twice; each has
    `least` steps or more."""
    wanted = triton.cdiv(2 * multiprocessors(device), max(1, tiles))
    return max(1, min(wanted, steps // least))


def _run_packed(
    act: Activations, w: Weight, bias: Tensor | None, residual: Tensor | None, y: Tensor
) -> None:
    """gemv or tile, by the number of tokens and the table of shapes."""
    m = act.x.shape[0]
    table = " table" if w.table is not None else ""
    kind = f"g{w.group} {w.scale_kind} {w.zero_kind}{table}"
    if m == 1:
        key = tuning.Key("gemv", w.bits, kind, act.x.dtype, m, w.n, w.k)
        config = tuning.choose(key, act.x.device, lambda c: _gemv(c, act, w, bias, residual, y))
        _gemv(config, act, w, bias, residual, y)
    else:
        key = tuning.Key("tile", w.bits, kind, act.x.dtype, m, w.n, w.k)
        config = tuning.choose(key, act.x.device, lambda c: _tile(c, act, w, bias, residual, y))
        _tile(config, act, w, bias, residual, y)


def _common_units(a: int, b: int) -> int:
    """The largest power of two of units of which both groups are made."""
    both = (a | b) // 16
    return both & -both


def _launch(
    kernel: Any, tiles: int, step_units: int, least: int, act: Activations, w: Weight,
    bias: Tensor | None, residual: Tensor | None, y: Tensor, constants: dict[str, Any],
) -> None:  # fmt: skip
    """Launches a kernel on the parts of K, and the sum of the parts."""
    (m, k), n = act.x.shape, w.n
    units = w.kp // 16
    steps = triton.cdiv(units, step_units)
    parts = _parts(tiles, steps, y.device, least)
    part_units = triton.cdiv(steps, parts) * step_units
    parts = triton.cdiv(units, part_units)
    split = parts > 1
    to = torch.empty((parts, m, n), dtype=torch.float32, device=y.device) if split else y
    residual_stride = 0 if residual is None else residual.stride(0)
    act_groups = 1 if act.scale is None else act.scale.shape[1]
    kernel[(tiles, parts)](
        act.x, act.scale, w.codes, w.scale, w.zero, w.block_scale, w.block_zero, w.table,
        to, None if split else bias, None if split else residual,
        m, n, k, units, w.group // 16, act.group // 16, act_groups,
        act.x.stride(0), n if split else y.stride(0), residual_stride, part_units,
        BITS=w.bits, SCALE=w.scale_kind, ZERO=w.zero_kind, MIDDLE=w.middle, SPLIT=split,
        **constants, **EXACT,
    )  # fmt: skip
    if split:
        block = min(256, next_power_of_2(n))
        linear_sum_kernel[(m, triton.cdiv(n, block))](
            to, y, bias, residual, m, n, parts, y.stride(0), residual_stride, block, **EXACT
        )


def _gemv(c: Config, act: Activations, w: Weight, bias: Any, residual: Any, y: Tensor) -> None:
    assert isinstance(c, GemvConfig)
    constants = {"U": c.units, "STAGES": c.stages, "num_warps": c.warps}
    tiles = triton.cdiv(w.n, 64)
    _launch(linear_gemv_kernel, tiles, c.units, 2, act, w, bias, residual, y, constants)


def operands(*, act_int8: bool, bits: int, table: bool, zero: str, units: int) -> str | None:
    """The type of what is multiplied in a tile; None: that of x. int8 takes 32 columns at least,
    and codes that are signed bytes; float16 holds whatever there is exactly."""
    if not act_int8:
        return None
    fits = table or bits < 8 or zero == "symmetric"
    return "int8" if fits and units >= 2 else "float16"


def _tile(c: Config, act: Activations, w: Weight, bias: Any, residual: Any, y: Tensor) -> None:
    assert isinstance(c, TileConfig)
    act_group = act.group if act.scale is not None else w.group
    units = min(c.units, _common_units(w.group, act_group))
    int8, table = act.scale is not None, w.table is not None
    kind = operands(act_int8=int8, bits=w.bits, table=table, zero=w.zero_kind, units=units)
    type_ = getattr(tl, kind or str(act.x.dtype).removeprefix("torch."))
    constants = {"TYPE": type_, "B": c.row_blocks, "M": c.tokens, "U": units}
    constants |= {"num_warps": c.warps, "num_stages": c.stages}
    tiles = triton.cdiv(w.n, 64 * c.row_blocks) * triton.cdiv(act.x.shape[0], c.tokens)
    least = max(1, 8 // units)
    _launch(linear_tile_kernel, tiles, units, least, act, w, bias, residual, y, constants)


def _rows_of(weight: tuple[Any, ...], row: int, rows: int) -> tuple[Any, ...]:
    """`rows` rows from `row` on, whole blocks of 64 but for the last, as a weight of its own."""
    codes, *groups = weight[:5]
    if rows == weight[-2]:
        return weight
    end = row + round_up(rows, 64)
    blocks = slice(row // 64, end // 64)
    cut = [None if t is None else t[blocks] for t in groups]
    return (codes[row:end], *cut, *weight[5:8], rows, weight[-1])


def _dense(
    x: Tensor, weight: tuple[Any, ...], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Of the dequantized matrix there are _DENSE_BYTES at a time; a larger one goes by rows."""
    n, k = weight[-2:]
    rows = max(64, _DENSE_BYTES // (k * x.element_size()) // 64 * 64)
    parts = [
        torch.mm(x, dequantize(*_rows_of(weight, row, min(rows, n - row)), x.dtype).T)
        for row in range(0, n, rows)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if bias is None and residual is None:
        return y
    total = y.float()
    if bias is not None:
        total = total + bias
    if residual is not None:
        total = total + residual.float()
    return total.to(x.dtype)


def linear(x: Tensor, *args: Any) -> Tensor:
    """x [M, K], W, bias [N] or None, act, act_group, residual [M, N] or nothing -> [M, N] of x's
    dtype."""
    y: Tensor = registry.fake("linear")(x, *args)
    weight, (bias, act, act_group, residual) = args[:_W], (*args[_W:], None)[:4]
    if y.numel() == 0:
        return y
    with device_of(x):
        if act == "int8":
            codes, scale, _ = quantize_act(x, act_group)
            given = Activations(codes, scale, act_group)
        elif x.dtype == torch.float32 or x.shape[0] > _PACKED_TOKENS:
            return _dense(x, weight, bias, residual)
        else:
            given = Activations(x, None, 16)
        _run_packed(given, weight_args(*weight), bias, residual, y)
    return y


def linear_quant(act_codes: Tensor, act_scale: Tensor, act_sums: Tensor, *args: Any) -> Tensor:
    """codes [M, Kx], scale [M, Kx / group], sums [M, Kx / 16] (implied by the codes, unused), W,
    bias, dtype, residual [M, N] or nothing -> [M, N]."""
    y: Tensor = registry.fake("linear_quant")(act_codes, act_scale, act_sums, *args)
    weight, (bias, _, residual) = args[:_W], (*args[_W:], None)[:3]
    if y.numel():
        group = act_codes.shape[1] // act_scale.shape[1]
        with device_of(act_codes):
            given = Activations(act_codes, act_scale, group)
            _run_packed(given, weight_args(*weight, op="linear_quant"), bias, residual, y)
    return y
