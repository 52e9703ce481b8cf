"""Linear layers over packed weights, beside torch's bfloat16, int4 and int8 ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select
from ..ops.linear import default_act_group
from ..quant.layout import UNIT_ROWS
from ..quant.weight import PackedWeight
from ..reference import linear as reference_linear
from ..reference import quantize_act
from .cases import LinearCase
from .check import U32, magnitude, require_close, some, unit
from .inputs import (
    Baseline,
    Problem,
    Rotation,
    activations,
    float_copies,
    random_bytes,
    random_floats,
    random_weight,
    turns,
    weight_copies,
)

BFLOAT16, FLOAT32 = "torch_bfloat16", "torch_float32"
INT4, INT8, INT_MM = "torch_int4pack", "torch_int8pack", "torch_int_mm"
_CHECKED_ROWS = 4  # of x
_CHECKED_BLOCKS = 5  # of 64 rows of the weight, so that every thread's share has some


def build(case: LinearCase, rotation: Rotation) -> Problem:
    weight = random_weight(case.spec, case.n, case.k)
    copies = weight_copies(weight, rotation)
    x = activations(case.m, case.k)
    act_group = default_act_group(weight) if case.act == "int8" else 0
    op = select(
        "linear", x.device, weight=weight.kind, act=case.act, group=weight.group,
        act_group=act_group,
    )  # fmt: skip
    args = [(x, *copy.op_args(), None, case.act, act_group) for copy in copies]
    problem = Problem(
        turns(args, op),
        lambda: _check(case, op(*args[-1]), x, weight, act_group),
        nbytes=case.nbytes,
        ops=2.0 * case.m * case.n * case.k,
        peak="int8" if case.act == "int8" else "float32",
        rotated=len(copies) * weight.nbytes,
    )
    for name in baseline_names(case):
        if name == INT4 and (reason := _int4_misfit(case)):
            problem.left_out[INT4] = reason
        else:
            problem.add_baseline(name, partial(_BASELINES[name], case, x, rotation))
    return problem


def baseline_names(case: LinearCase) -> list[str]:
    """torch's products of the same codes, and those of float weights: bfloat16 for their bytes,
    float32 because without AVX-512 torch has no fast bfloat16 product."""
    names = [BFLOAT16, FLOAT32]
    if case.spec.bits == 4:
        names.append(INT4)
    if case.spec.bits == 8:
        names.append(INT8)
        if case.act == "int8":
            names.append(INT_MM)
    return names


def _check(case: LinearCase, y: Tensor, x: Tensor, weight: PackedWeight, act_group: int) -> None:
    """Some rows of x times some blocks of the weight; all of it where that is little.

    Kernel and reference each sum K products in float32. Rounding errors grow like a random walk:
    sqrt(K) u of the sum of the magnitudes, of which four times is allowed, and 8 u for the scales.
    A worst-case bound of K u would let a whole group be missing where K is large.
    """
    rows, blocks = _checked(case)
    part = x[rows]
    size = part.abs()
    if case.act == "int8":
        codes, scale, _ = quantize_act(part, act_group)
        size = codes.float().abs() * scale.repeat_interleave(act_group, dim=1)
    for start, stop in blocks:
        cut = weight.slice_rows(start, stop)
        want = reference_linear(part, *cut.op_args(), None, case.act, act_group)
        bound = 2 * (4 * case.k**0.5 + 8) * U32 * (size[:, : case.k] @ magnitude(cut.unpack()).T)
        require_close(f"{case.name}, rows {start} to {stop}", y[rows, start:stop], want, bound)


def _checked(case: LinearCase) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows of x, and from where to where rows of the weight are checked."""
    whole = case.m * case.n * case.k <= 1 << 24
    count = -(-case.n // UNIT_ROWS)
    blocks = some(count, count if whole else _CHECKED_BLOCKS)
    rows = some(case.m, case.m if whole else _CHECKED_ROWS)
    return rows, [(b * UNIT_ROWS, min(case.n, (b + 1) * UNIT_ROWS)) for b in blocks]


def _product_check(
    case: LinearCase, x: Tensor, weight: Callable[[int, int], Tensor]
) -> Callable[[str, Tensor], None]:
    """A check of y [m, n] = x [m, k] times a weight, of which weight(start, stop) are rows.

    torch sums in float32, as we do, or in int32, where nothing is rounded. Beside that it may round
    weights, activations, partial sums and the result to the float type of y: each is an error of
    `unit` of the norm of the products, or of the result.
    """

    def check(what: str, y: Tensor) -> None:
        rows, blocks = _checked(case)
        part = x[rows].double()
        for start, stop in blocks:
            w = weight(start, stop).double()
            want = part @ w.T
            if y.dtype.is_floating_point:
                norm = (part.square() @ w.square().T).sqrt()
                bound = 8 * case.k**0.5 * U32 * (part.abs() @ w.abs().T)
                bound += unit(y.dtype) * (2 * want.abs() + 4 * norm)
            else:
                bound = torch.full_like(want, 0.5)
            require_close(f"{what}, rows {start} to {stop}", y[rows, start:stop], want, bound)

    return check


def _float(dtype: torch.dtype, case: LinearCase, x: Tensor, rotation: Rotation) -> Baseline:
    x = x.to(dtype)
    copies = float_copies((case.n, case.k), dtype, rotation)
    check = _product_check(case, x, lambda start, stop: copies[0][start:stop])
    return Baseline(turns([(x, w) for w in copies], F.linear), check)


def _bfloat16_scales(count: int) -> Tensor:
    """From 0.005 to 0.015, all kinds: one that is mixed up shows in a check."""
    return (0.01 + 0.005 * random_floats((count,), torch.float32).clamp(-1, 1)).bfloat16()


def _byte_copies(rows: int, columns: int, rotation: Rotation) -> tuple[Tensor, ...]:
    count = rotation.copies(rows * columns)
    return random_bytes(count * rows * columns).view(count, rows, columns).unbind()


def _int4_misfit(case: LinearCase) -> str | None:
    """Why torch's int4 product cannot have this shape."""
    if case.spec.group_size not in (32, 64, 128, 256):
        return f"has groups of 32, 64, 128 and 256, not {case.spec.group_size}"
    if case.k % case.spec.group_size or case.n % 16:
        return f"needs whole groups and N a multiple of 16, not [{case.n}, {case.k}]"
    return None


def _int4(case: LinearCase, x: Tensor, rotation: Rotation) -> Baseline:
    """Activations are bfloat16; two codes lie in a byte, so that any bytes are a weight. Only the
    first copy is packed from codes, which its check needs. Scales and offsets: [K / group, N, 2];
    w = scale (q - 8) + offset."""
    group = case.spec.group_size
    scales = _bfloat16_scales(case.k // group * case.n * 2).view(-1, case.n, 2)
    copies = _byte_copies(case.n, case.k // 2, rotation)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    checked: dict[tuple[int, int], Tensor] = {}
    for start, stop in _row_blocks(case.n):  # the codes of all rows at once would be 4 bytes each
        codes = random_bytes((stop - start) * case.k, seed=start).view(-1, case.k) & 15
        copies[0][start:stop] = pack(codes.int(), 1)
        for block in _checked(case)[1]:
            if start <= block[0] < stop:
                checked[block] = codes[block[0] - start : block[1] - start].clone()

    def weight(start: int, stop: int) -> Tensor:
        scale, offset = scales[:, start:stop].float().repeat_interleave(group, 0).unbind(2)
        return (checked[start, stop].float() - 8) * scale.T + offset.T

    x = x.bfloat16()
    return Baseline(
        turns(
            [(x, w, group, scales.clone()) for w in copies],
            torch.ops.aten._weight_int4pack_mm_for_cpu,
        ),
        _product_check(case, x, weight),
    )


def _row_blocks(n: int) -> list[tuple[int, int]]:
    """Multiples of the 64 rows that torch packs together."""
    step = 64 * UNIT_ROWS
    return [(start, min(n, start + step)) for start in range(0, n, step)]


def _int8(case: LinearCase, x: Tensor, rotation: Rotation) -> Baseline:
    """A bfloat16 scale per row; activations are bfloat16."""
    scales = _bfloat16_scales(case.n)
    x = x.bfloat16()
    copies = [w.view(torch.int8) for w in _byte_copies(case.n, case.k, rotation)]
    return Baseline(
        turns([(x, w, scales) for w in copies], torch.ops.aten._weight_int8pack_mm),
        _product_check(case, x, lambda a, b: copies[0][a:b].float() * scales[a:b, None].float()),
    )


def _int_mm(case: LinearCase, x: Tensor, rotation: Rotation) -> Baseline:
    """int8 times int8 to int32 alone: neither quantizing activations nor scaling is in it."""
    codes = x.clamp(-127, 127).to(torch.int8)
    copies = [w.view(torch.int8) for w in _byte_copies(case.n, case.k, rotation)]
    return Baseline(
        turns([(codes, w.t()) for w in copies], torch._int_mm),
        _product_check(case, codes, lambda start, stop: copies[0][start:stop]),
    )


_BASELINES: dict[str, Callable[[LinearCase, Tensor, Rotation], Baseline]] = {
    BFLOAT16: partial(_float, torch.bfloat16),
    FLOAT32: partial(_float, torch.float32),
    INT4: _int4,
    INT8: _int8,
    INT_MM: _int_mm,
}
