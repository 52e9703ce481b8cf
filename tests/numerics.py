"""Tolerances that are computed: what rounding alone can do to a result, from the exact one in
float64."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.quant import PlainWeight
from qkernels.quant.spec import BLOCK

U32 = 2.0**-24  # half a unit in the last place of float32
UNIT = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def groups_of_columns(plain: PlainWeight) -> Tensor:
    """[K]: the group of each column."""
    if plain.g_idx is not None:
        return plain.g_idx.long()
    return torch.arange(plain.k) // plain.spec.group(plain.k)


def exact_scale(plain: PlainWeight) -> Tensor:
    """[N, groups] float64: what multiplies the codes."""
    spec = plain.spec
    scale = (plain.scale & 15 if spec.scale == "uint4" else plain.scale.float()).double()
    if plain.block_scale is not None:
        block_of = torch.arange(scale.shape[1]) * spec.group(plain.k) // BLOCK
        scale = scale * plain.block_scale.double()[:, block_of]
    return scale


def exact_weight(plain: PlainWeight) -> tuple[Tensor, Tensor]:
    """The values [N, K] in float64, where all products are exact, and the sum of the magnitudes
    they are made of.

    Kernels may sum scale * code and the zero's part separately, so rounding errors are relative to
    the latter.
    """
    spec = plain.spec
    of, scale = groups_of_columns(plain), exact_scale(plain)
    minimum = (plain.scale >> 4).double() if spec.scale == "uint4" else None
    if spec.zero == "minimum" and plain.zero is not None:
        minimum = plain.zero.float().double()
    if minimum is not None and plain.block_zero is not None:
        block_of = torch.arange(scale.shape[1]) * spec.group(plain.k) // BLOCK
        minimum = minimum * plain.block_zero.double()[:, block_of]
    code = plain.codes.double()
    if spec.table is not None:
        code = torch.tensor(spec.table, dtype=torch.float64)[plain.codes.long()]
    scale = scale[:, of]
    if minimum is not None:
        minimum = minimum[:, of]
        return scale * code - minimum, (scale * code).abs() + minimum.abs()
    zero = torch.full_like(code, float(spec.zero_point))
    if plain.zero is not None:
        zero = plain.zero.double()[:, of]
    return scale * (code - zero), scale.abs() * (code.abs() + zero.abs())


def linear_exact(
    x: Tensor,
    plain: PlainWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    added: float = 0,
) -> tuple[Tensor, Tensor]:
    """x [M, K] (exact in float64) -> y [M, N] float64, and the bound of a float32 kernel's error
    that stores dtype.

    Any order of summing K products in float32 errs by at most (K - 1) u of the sum of their
    magnitudes; each product
    adds a few roundings of its own (scales, the product, the zero's part), bias and residual one
    each, the store half a unit.

    Tensor cores of a GPU take code + `added`, and sums of 32 columns start from -added * sum x,
    which they compute in the same way. They add 8 products at a time and cut the sum off, which
    errs by 2 u of it at most: 4 times for each of the two, so by 16 u of added * scale * sum |x|.
    """
    x = x.double()
    weight, magnitude = exact_weight(plain)
    y = x @ weight.T
    size = x.abs() @ magnitude.T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    if residual is not None:
        y, size = y + residual.double(), size + residual.double().abs()
    error = (x.shape[1] + 8) * U32 * size
    if added:
        shift = added * exact_scale(plain).abs()[:, groups_of_columns(plain)]
        error += 16 * U32 * (x.abs() @ shift.T)
    return y, error + UNIT[dtype] * (y.abs() + error) + SMALLEST[dtype]


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|got - exact| <= bound everywhere, with the worst place in the message."""
    assert got.shape == exact.shape, f"shape {list(got.shape)}, expected {list(exact.shape)}"
    error = (got.double() - exact).abs()
    wrong = ~(error <= bound)  # NaN counts as wrong
    if wrong.any():
        at = tuple(((error / bound).nan_to_num(torch.inf)).flatten().argmax().reshape(1).tolist())
        index = torch.unravel_index(torch.tensor(at[0]), error.shape)
        place = [int(i) for i in index]
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are off; worst at {place}: "
            f"got {got[index].item()}, exact {exact[index].item()}, bound {bound[index].item():.3g}"
        )
