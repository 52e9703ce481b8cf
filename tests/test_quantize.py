"""Round to nearest: every spec, its error, and codes that survive decoding and rounding again."""

import sys

import pytest
import torch
from cases import FORMATS, random_plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels.quant import E2M1, IQ4_NL, PlainWeight, QuantSpec, quantize, quantize_packed
from qkernels.quant.quantize import block_rows
from qkernels.quant.spec import BITS, BLOCK

EVERY = [
    *(
        QuantSpec(bits, 32, scale, zero)
        for bits in BITS
        for scale in ("float32", "float16", "bfloat16")
        for zero in ("symmetric", "integer", "minimum")
    ),
    *(QuantSpec(bits, 16, "int8", zero) for bits in BITS for zero in ("symmetric", "minimum")),
    *(QuantSpec(bits, 32, "uint4", "minimum") for bits in BITS),
    *(
        QuantSpec(bits, 32, scale, zero)
        for bits in (4, 8)
        for scale in ("e8m0", "e4m3")
        for zero in ("symmetric", "integer")
    ),
    *(
        QuantSpec(4, 32, scale, table=table)
        for scale in ("float16", "e8m0", "e4m3", "int8")
        for table in (E2M1, IQ4_NL)
    ),
    *(QuantSpec(bits, -1, zero="minimum") for bits in (4, 8)),
]  # fmt: skip


def error(weight: Tensor, plain: PlainWeight) -> float:
    return float(
        (plain.dequantize().double() - weight.double()).square().mean().sqrt()
        / weight.double().std()
    )


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_error_of_every_spec(spec: QuantSpec, generator: torch.Generator) -> None:
    """A step of range / (2^bits - 1) leaves an error of at most half of it; the searched clip is no
    worse in sum."""
    weight = torch.randn(70, 500, generator=generator)
    plain = quantize(weight, spec)
    plain.validate()
    searched, whole = error(weight, plain), error(weight, quantize(weight, spec, search=False))
    # The clip is searched before scales are rounded to two levels, which may cost what it gained.
    assert searched <= whole * (1.05 if spec.two_level else 1 + 1e-6)
    # The range of a group of normal values is below 6.5 of their deviations at 32 columns, 7.5 in a
    # row of 500;
    # symmetric codes may have twice the largest value to cover. Uniform rounding errs by step /
    # sqrt(12).
    spread = 8.0 if spec.group_size == -1 else 7.0
    # Coarse scales and minima miss the ends of the range, whatever the bits; tables are finest in
    # the middle.
    coarse = (2.0 if spec.scale == "e8m0" else 1.0) * (1.6 if spec.table else 1.0)
    missed = {"uint4": 0.05, "e4m3": 0.015}.get(spec.scale, 0.0)
    assert searched <= coarse * spread / ((1 << spec.bits) - 1) / 12**0.5 + missed


def with_extremes(spec: QuantSpec, n: int, k: int, generator: torch.Generator) -> PlainWeight:
    """Random weights whose scales and zeros can be read off their values: the ends of the codes are
    in every group, the
    ends of two-level integers in every block, and scales are positive."""
    plain = random_plain(spec, n, k, generator)
    group, top = spec.group(k), (1 << spec.bits) - 1
    first = torch.arange(spec.groups(k)) * group
    last = torch.minimum(first + 1, torch.tensor(k - 1))
    if spec.table is not None:
        plain.codes[plain.codes == 8] = 7 if spec.table == E2M1 else 8  # -0 rounds to 0
        # type: ignore[index]
        plain.codes[:, first] = max(range(16), key=lambda i: abs(spec.table[i]))
    else:
        plain.codes[:, first] = 0
        plain.codes[:, last] = top if spec.zero != "symmetric" else plain.codes[:, last]
    if spec.zero == "integer":
        plain.zero.clamp_(0, top)
    if spec.two_level:
        per_block = BLOCK // group
        ends = torch.arange(0, spec.groups(k), per_block)
        if spec.scale == "uint4":
            low = (plain.scale & 15).clamp(min=1)
            high = plain.scale >> 4
            low[:, ends], high[:, ends] = 15, 15
            plain.scale.copy_(low | high << 4)
        else:
            plain.scale.copy_(plain.scale.abs().clamp(min=8))
            plain.scale[:, ends] = 127
            if plain.zero is not None:
                plain.zero[:, ends] = 127
    return plain


def shapes_where_extremes_fit(spec: QuantSpec, n: int, k: int) -> bool:
    return k % spec.group(k) != 1  # a group of one column has no two ends


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from(EVERY),
    n=st.integers(1, 80),
    k=st.integers(2, 700),
    seed=st.integers(0, 2**31),
    search=st.booleans(),
)
def test_codes_survive_decoding_and_rounding(
    spec: QuantSpec, n: int, k: int, seed: int, search: bool
) -> None:
    if not shapes_where_extremes_fit(spec, n, k):
        k += 1
    plain = with_extremes(spec, n, k, torch.Generator().manual_seed(seed))
    again = quantize(plain.dequantize(), spec, search=search)
    wrong = (again.codes != plain.codes).nonzero()
    assert len(wrong) == 0, (
        f"{len(wrong)} of {plain.codes.numel()} codes differ, first at {wrong[0].tolist()}"
    )


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_degenerate_groups(spec: QuantSpec) -> None:
    """Zeros decode to zeros, and constants to about themselves."""
    zeros = quantize(torch.zeros(3, 64), spec)
    zeros.validate()
    assert (
        zeros.dequantize().abs().max() <= 2.0**-126
    )  # e8m0 has no scale of 0, nor IQ4_NL a value of 0
    constant = quantize(torch.full((3, 64), 0.75), spec)
    tolerance = (
        {"e8m0": 0.26, "e4m3": 0.07, "uint4": 0.25}.get(spec.scale, 0.01)
        + (0.35 if spec.bits < 4 else 0.0)
        + (0.15 if spec.table else 0.0)
    )
    assert (constant.dequantize() - 0.75).abs().max() <= tolerance * 0.75


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "MXFP4", "Q6_K"])
def test_row_blocks_change_nothing(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = FORMATS[name].spec
    weight = torch.randn(200, 512, generator=generator).bfloat16()
    whole = quantize(weight, spec)
    monkeypatch.setattr(sys.modules[block_rows.__module__], "_BLOCK_VALUES", 1)
    assert block_rows(512) == 64
    assert torch.equal(quantize(weight, spec).dequantize(), whole.dequantize())
    packed = quantize_packed(weight, spec)
    assert torch.equal(packed.dequantize(), whole.dequantize())


def test_act_order(generator: torch.Generator) -> None:
    spec = QuantSpec(4, 64, zero="integer", act_order=True)
    order = torch.randperm(256, generator=generator)
    g_idx = torch.empty(256, dtype=torch.int32)
    g_idx[order] = (torch.arange(256) // 64).int()
    weight = torch.randn(64, 256, generator=generator)
    plain = quantize(weight, spec, g_idx=g_idx)
    sorted_columns = torch.argsort(g_idx, stable=True)
    by_position = quantize(weight[:, sorted_columns], QuantSpec(4, 64, zero="integer"))
    assert torch.equal(plain.dequantize()[:, sorted_columns], by_position.dequantize())
    assert torch.equal(plain.pack().dequantize(), plain.dequantize())
    for bad, said in (
        (None, "needs a g_idx"),
        (g_idx.long(), "int32"),
        (g_idx[1:], r"\[256\]"),
        (g_idx * 0, "puts 256"),
    ):
        with pytest.raises(ValueError, match=said):
            quantize(weight, spec, g_idx=bad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = torch.randn(3000, 256)
    weight[2017, 33] = value
    for quantizer in (quantize, quantize_packed):
        with pytest.raises(
            ValueError, match=rf"model.mlp.down holds {value} at row 2017, column 33"
        ):
            quantizer(weight, QuantSpec(4, 32), name="model.mlp.down")


def test_large_finite_values_are_not_taken_for_infinite() -> None:
    weight = torch.full((64, 64), 3e38)
    plain = quantize(weight, QuantSpec(4, 32, "float32"))
    torch.testing.assert_close(plain.dequantize(), weight)


def test_scales_that_overflow_are_refused_by_place() -> None:
    weight = torch.zeros(70, 64)
    weight[68, 40] = 1e7
    with pytest.raises(
        ValueError, match=r"w: the scale of row 68, group 1 overflows torch\.float16"
    ):
        quantize(weight, QuantSpec(4, 32), name="w")
    with pytest.raises(
        ValueError, match=r"w: the scale of row 68, group 1 overflows torch\.float8_e4m3fn"
    ):
        quantize(weight, QuantSpec(4, 32, "e4m3"), name="w")


def test_wrong_weights_are_refused() -> None:
    for weight in (torch.zeros(4), torch.zeros(4, 0), torch.zeros(4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"w must be \[N, K\] of a float dtype"):
            quantize(weight, QuantSpec(4), name="w")
