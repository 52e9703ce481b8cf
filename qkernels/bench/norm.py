"""RMSNorm and LayerNorm, beside torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select
from ..reference import norm as reference_norm
from ..reference import quantize_act
from .cases import NormCase
from .check import U32, CheckError, require_close
from .inputs import Baseline, Problem, Rotation, random_floats, turns

EPS = 1e-6
ACT_GROUP = 32
_MOST_COPIES = 1 << 16  # of one row: as many as 64 MB of the shortest rows hold


def build(case: NormCase, rotation: Rotation) -> Problem:
    nbytes = 4 * case.m * case.k
    count = min(rotation.copies(nbytes), _MOST_COPIES)
    rows = random_floats((count, case.m, case.k), torch.float32)
    rows[:, :, ::37] *= 8
    copies = rows.unbind()
    weight = random_floats((case.k,), torch.float32) + 1
    bias = random_floats((case.k,), torch.float32) if case.center else None
    tail: tuple[Any, ...] = (weight, bias, EPS, case.center)
    stem = "norm"
    if case.quantized:
        stem, tail = "norm_quant", (*tail, ACT_GROUP)
    op = select(stem, rows.device)
    problem = Problem(
        turns([(x, *tail) for x in copies], op),
        lambda: _check(case, op(copies[-1], *tail), copies[-1], weight, bias),
        nbytes=nbytes,  # what is written stays in a cache: it is the same memory every time
        ops=(8.0 if case.center else 4.0) * case.m * case.k,
        peak="float32",
        rotated=count * nbytes,
    )
    (name,) = baseline_names(case)
    rest = ([case.k], weight, bias, EPS) if case.center else ([case.k], weight, EPS)
    theirs = F.layer_norm if case.center else F.rms_norm

    def check(what: str, got: Tensor) -> None:
        want = reference_norm(copies[0], weight, bias, EPS, case.center)
        require_close(what, got, want, _bound(copies[0], want, weight, bias))

    problem.baselines[name] = Baseline(turns([(x, *rest) for x in copies], theirs), check)
    return problem


def baseline_names(case: NormCase) -> list[str]:
    """The norm of torch.nn.functional."""
    return [f"torch_{case.kernel}"]


def _bound(x: Tensor, want: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The statistics are sums of K terms in float32, each off by at most (K + 8) u, in the kernel
    and in the reference."""
    size = want.abs()
    if bias is not None:
        centred = x - x.mean(dim=1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + EPS)
        size = size + 2 * bias.abs() + rstd * weight.abs() * x.abs().mean(dim=1, keepdim=True)
    return 2 * (x.shape[1] + 8) * U32 * size


def _check(case: NormCase, got: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Codes of int8 may differ by one where a value lies at a tie."""
    want = reference_norm(x, weight, bias, EPS, case.center)
    bound = _bound(x, want, weight, bias)
    if not case.quantized:
        require_close(case.name, got, want, bound)
        return
    codes, scale, sums = got
    _, expected, _ = quantize_act(want, ACT_GROUP)
    width = ACT_GROUP
    widest = F.pad(bound, (0, codes.shape[1] - case.k)).view(case.m, -1, width).amax(dim=2)
    require_close(f"{case.name}, scales", scale, expected, widest / 127 + 4 * U32 * expected)
    value = (codes.view(case.m, -1, width).float() * scale[..., None]).flatten(1)[:, : case.k]
    half = 0.5 * expected.repeat_interleave(width, dim=1)[:, : case.k]
    require_close(case.name, value, want, 1.001 * half + bound)
    if not torch.equal(codes.view(case.m, -1, 16).sum(dim=2, dtype=torch.int16), sums):
        raise CheckError(f"{case.name}: the sums of 16 codes are not those of the codes")
