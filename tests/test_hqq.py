"""Half-quadratic quantization: its objective does not rise, and it keeps to its formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.quant import IQ4_NL, QuantSpec, quantize, quantize_packed

SPECS = [
    *(QuantSpec(b, 32, zero=z) for b in (2, 4) for z in ("symmetric", "integer", "minimum")),
    QuantSpec(4, 32, table=IQ4_NL),
    QuantSpec(4, 32, "int8", "minimum"),
    QuantSpec(2, 16, "uint4", "minimum"),
    QuantSpec(8, -1),
]


def norm(weight: Tensor, spec: QuantSpec, p: float, **how) -> float:
    return float((quantize(weight, spec, **how).dequantize() - weight).abs().double().pow(p).sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_objective_is_no_worse_than_where_it_starts(
    spec: QuantSpec, generator: torch.Generator
) -> None:
    weight = torch.randn(70, 500, generator=generator) * 0.02
    started = norm(weight, spec, 0.7, search=False)
    # Rounding scales to two levels, and zeros to integers, comes after the search.
    slack = 1.02 if spec.two_level or spec.zero == "integer" else 1.001
    assert norm(weight, spec, 0.7, algo="hqq") <= started * slack
    packed = quantize_packed(weight, spec, algo="hqq")
    assert torch.equal(packed.dequantize(), quantize(weight, spec, algo="hqq").dequantize())


def test_size_does_not_matter(generator: torch.Generator) -> None:
    """Errors count in steps: a power of two moves nothing but the scale."""
    weight = torch.randn(64, 128, generator=generator)
    spec = QuantSpec(4, 32, "float32", "minimum")
    one, small = (quantize(w, spec, algo="hqq") for w in (weight, weight / 1024))
    assert torch.equal(one.codes, small.codes)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        quantize(torch.randn(64, 64), QuantSpec(8, 32, "e8m0"), algo="hqq")
    with pytest.raises(ValueError, match="search=False"):
        quantize(torch.randn(64, 64), QuantSpec(4), algo="hqq", search=False)
    with pytest.raises(ValueError, match="algo must be one of"):
        quantize(torch.randn(64, 64), QuantSpec(4), algo="awq")
    assert not quantize(torch.zeros(3, 64), QuantSpec(4), algo="hqq").dequantize().any()
