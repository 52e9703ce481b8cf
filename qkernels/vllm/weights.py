"""From the tensors in which vLLM holds one rank's part of a quantized matrix to our packed layout.

A part is a matrix of its own, [n, k]: the rows of the heads or features that the rank has, or the
columns; fused layers (q, k and v, or gate and up) are their rows one after the other. Nothing here
imports vLLM.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import backends
from ..checkpoints.bits import unpack_bits
from ..checkpoints.quantized import SCALE_NAMES, StoredMatrix
from ..ops.linear import default_act_group
from ..quant import PackedWeight, PlainWeight, QuantSpec
from ..quant.spec import BITS, UNIT_COLS, round_up

_BLOCK_CODES = 4 << 20  # unpacked at a time


class NoKernel(ValueError):
    """A layer that no kernel can compute as it was split."""


def check_split(what: str, k: int, group_size: int, full_k: int) -> None:
    """Raises NoKernel, with the numbers, where a rank's k columns of full_k are not whole groups.

    group_size: columns per scale, -1 for a scale per row, which any k has.
    """
    if group_size == -1 or k % group_size == 0:
        return
    split = f" ({full_k} of the layer over {full_k // k} ranks)" if full_k != k else ""
    more = "lower tensor_parallel_size, or " if full_k != k else ""
    raise NoKernel(
        f"qkernels: {what} has {k} input columns on this rank{split}, expected a multiple of the "
        f"group size {group_size}: {more}take a checkpoint whose group size divides {k}"
    )


def reason_against(bits: int, bias: int, zero_points: bool, group_size: int) -> str | None:
    """Why weights of a type of vLLM cannot be packed: integers of `bits` bits that stand for
    code - bias, or code - zero point. None if they can."""
    if bits not in BITS:
        return f"has weights of {', '.join(map(str, BITS))} bits, not of {bits}"
    if group_size != -1 and (group_size < UNIT_COLS or group_size % UNIT_COLS):
        return f"has groups of a multiple of {UNIT_COLS} columns, not of {group_size}"
    half = 1 << (bits - 1)
    if bias != (0 if zero_points else half):
        zero = "zero points" if zero_points else "no zero points"
        return f"has codes less {half}, or less a zero point, not less {bias} with {zero}"
    return None


def reason_on(device: str, spec: QuantSpec, k: int, act: str) -> str | None:
    """Why a weight of k columns would be computed by no kernel of this package on a device type;
    None if one does it. act: "int8" or "float"."""
    weight = PackedWeight.empty(spec, 64, k, device="meta")
    group = default_act_group(weight) if act == "int8" else 0
    case = {"weight": weight.kind, "act": act, "group": weight.group, "act_group": group}
    facts = backends.facts_of(torch.device(device))
    try:
        choice = backends.choose("linear", device, {**case, **facts})
    except RuntimeError as error:  # QKERNELS_BACKEND names one that does not stand for the device
        return f"has no kernel of {weight.kind}: {error}"
    if choice.row.name != "reference":
        return None
    told = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons) or "none stands for it"
    return f"has no kernel of {weight.kind} with act={act} on {device} ({told})"


def narrowest(scale: Tensor) -> Tensor:
    """Scales in 16 bits where nothing is lost: vLLM may hold them in float32."""
    if scale.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(scale.to(dtype).float(), scale):
                return scale.to(dtype)
    return scale


def _spec(bits: int, group_size: int, k: int, scale: Tensor, zero: Tensor | None) -> QuantSpec:
    group = group_size if group_size < k else -1
    return QuantSpec(
        bits, group, SCALE_NAMES[scale.dtype], "symmetric" if zero is None else "integer"
    )


def words_matrix(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    k: int,
    bits: int,
    group_size: int,
) -> StoredMatrix:
    """A matrix whose codes lie in words along its columns, as GPTQ and compressed-tensors have it.

    codes int32 [N, ceil(K bits / 32)]; scale [N, G] float; zero int32 [G, ceil(N bits / 32)],
    words along the rows, or None (less 2^(bits-1)). Transposed views serve. Values are exactly
    scale * (code - zero).
    """
    n = codes.shape[0]
    scale = narrowest(scale.cpu())
    codes, points = codes.cpu(), None
    if zero is not None:
        points = unpack_bits(zero.cpu(), bits, n).T
        if bool((points == 1 << (bits - 1)).all()):
            points = None
    spec = _spec(bits, group_size, k, scale, points)

    def read(start: int, stop: int) -> PlainWeight:
        return PlainWeight(
            spec,
            unpack_bits(codes[start:stop], bits, k).contiguous(),
            scale[start:stop].contiguous(),
            None if points is None else points[start:stop].contiguous(),
        )

    return StoredMatrix(spec, n, k, read)


def int8_matrix(weight: Tensor, scale: Tensor, widths: list[int]) -> StoredMatrix:
    """A matrix of int8 values: weight int8 [N, K]; scale float [N, 1], one per row, or [P], one per
    fused part, whose rows are `widths` [P]."""
    n, k = weight.shape
    weight, scale = weight.cpu(), scale.cpu()
    if scale.numel() != n:
        scale = scale.reshape(-1).repeat_interleave(torch.tensor(widths))
    scale = narrowest(scale.reshape(n, 1))
    spec = _spec(8, -1, k, scale, None)

    def read(start: int, stop: int) -> PlainWeight:
        codes = (weight[start:stop].to(torch.int16) + 128).to(torch.uint8)
        return PlainWeight(spec, codes.contiguous(), scale[start:stop].contiguous())

    return StoredMatrix(spec, n, k, read)


def packed(matrix: StoredMatrix, device: torch.device | str = "cpu") -> PackedWeight:
    """The packed weight, a block of rows at a time on the CPU. Raises ValueError for values that a
    weight cannot have, such as scales that are not finite."""
    with torch.device("cpu"):
        weight = PackedWeight.empty(matrix.spec, matrix.n, matrix.k)
        step = max(64, _BLOCK_CODES // matrix.k // 64 * 64)
        for start in range(0, matrix.n, step):
            weight.write_rows(start, matrix.read(start, min(start + step, matrix.n)))
    return weight.to(device)


def columns_by_position(plain: PlainWeight, start: int, stop: int) -> tuple[PlainWeight, Tensor]:
    """Columns start..stop of an act-order weight, whose groups they do not fill, as groups of 16 by
    position.

    -> a weight [N, K'] and columns [K'] int64: with x the activations of start..stop, it computes
    from x[:, columns]. Every group that has columns there takes whole sixteens; what is missing are
    columns of zeros (the code is the zero point), for which x's column 0 stands in. Values are
    exactly those of `plain`.
    """
    spec, scale, zero = plain.spec, plain.scale, plain.zero
    assert plain.g_idx is not None and not spec.two_level and spec.table is None
    g_idx, codes = plain.g_idx[start:stop].long(), plain.codes[:, start:stop]
    order = torch.argsort(g_idx, stable=True)
    columns, groups, done = [], [], 0
    for group, count in enumerate(torch.bincount(g_idx).tolist()):
        if count:
            whole = round_up(count, UNIT_COLS)
            columns.append(
                torch.nn.functional.pad(order[done : done + count], (0, whole - count), value=-1)
            )
            groups += [group] * (whole // UNIT_COLS)
            done += count
    index, of = torch.cat(columns), torch.tensor(groups)
    out = codes[:, index.clamp(min=0)]
    empty = (index < 0).nonzero()[:, 0]
    out[:, empty] = (
        torch.full_like(out[:, empty], spec.zero_point)
        if zero is None
        else zero[:, of[empty // UNIT_COLS]]
    )
    return PlainWeight(
        replace(spec, group_size=UNIT_COLS, act_order=False),
        out.contiguous(),
        scale[:, of].contiguous(),
        None if zero is None else zero[:, of].contiguous(),
    ), index.clamp(min=0)
