"""The kinds of weights that the formats of the world need, random weights of each, and the shapes
that ops run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels.quant import E2M1, IQ4_NL, PlainWeight, QuantSpec
from qkernels.quant.spec import BITS, BLOCK


@dataclass(frozen=True)
class Format:
    """A format of checkpoints: its spec, and the bits per weight that it takes on disk."""

    spec: QuantSpec
    disk_bits: float


def _gguf(block: int, size: int) -> float:
    return 8 * size / block


def _gptq(bits: int, group: int) -> float:
    return bits + (16 + bits) / group


# GGUF: bytes per block. GPTQ, AWQ: float16 scales and zeros as wide as the codes.
FORMATS: dict[str, Format] = {
    "Q4_0": Format(QuantSpec(4, 32), _gguf(32, 18)),
    "Q4_1": Format(QuantSpec(4, 32, zero="minimum"), _gguf(32, 20)),
    "Q5_0": Format(QuantSpec(5, 32), _gguf(32, 22)),
    "Q5_1": Format(QuantSpec(5, 32, zero="minimum"), _gguf(32, 24)),
    "Q8_0": Format(QuantSpec(8, 32), _gguf(32, 34)),
    "Q2_K": Format(QuantSpec(2, 16, "uint4", "minimum"), _gguf(256, 84)),
    "Q3_K": Format(QuantSpec(3, 16, "int8"), _gguf(256, 110)),
    "Q4_K": Format(QuantSpec(4, 32, "int8", "minimum"), _gguf(256, 144)),
    "Q5_K": Format(QuantSpec(5, 32, "int8", "minimum"), _gguf(256, 176)),
    "Q6_K": Format(QuantSpec(6, 16, "int8"), _gguf(256, 210)),
    "IQ4_NL": Format(QuantSpec(4, 32, table=IQ4_NL), _gguf(32, 18)),
    "IQ4_XS": Format(QuantSpec(4, 32, "int8", table=IQ4_NL), _gguf(256, 136)),
    "MXFP4": Format(QuantSpec(4, 32, "e8m0", table=E2M1), _gguf(32, 17)),
    "NVFP4": Format(QuantSpec(4, 16, "e4m3", table=E2M1), 4 + 8 / 16),
    "GPTQ W4 g128": Format(QuantSpec(4, 128, zero="integer"), _gptq(4, 128)),
    "GPTQ W4 g32": Format(QuantSpec(4, 32, zero="integer"), _gptq(4, 32)),
    "GPTQ W4 g128 act-order": Format(
        QuantSpec(4, 128, zero="integer", act_order=True), _gptq(4, 128)
    ),
    "GPTQ W8 g128": Format(QuantSpec(8, 128, zero="integer"), _gptq(8, 128)),
    "GPTQ W3 g128": Format(QuantSpec(3, 128, zero="integer"), _gptq(3, 128)),
    "GPTQ W2 g64": Format(QuantSpec(2, 64, zero="integer"), _gptq(2, 64)),
    "AWQ W4 g64": Format(QuantSpec(4, 64, zero="integer"), _gptq(4, 64)),
    "compressed-tensors W4 g128": Format(QuantSpec(4, 128, "bfloat16"), 4 + 16 / 128),
    "compressed-tensors W8 g32": Format(QuantSpec(8, 32, "bfloat16"), 8 + 16 / 32),
    "compressed-tensors W8 row": Format(QuantSpec(8, -1, "bfloat16"), 8.0),
    "compressed-tensors W4 row": Format(QuantSpec(4, -1, "float32"), 4.0),
}

# The other kinds of weights that there are: every width with every zero, every scale, smallest and
# largest groups, tables that reach both ends of int8.
STEEP = (-128, -127, -90, -60, -33, -17, -16, -1, 0, 1, 15, 16, 31, 64, 126, 127)
LINEAR_SPECS: dict[str, QuantSpec] = {
    str(spec): spec
    for spec in (
        *(form.spec for form in FORMATS.values()),
        *(
            QuantSpec(bits, 32, zero=zero)
            for bits in BITS
            for zero in ("symmetric", "integer", "minimum")
        ),
        *(QuantSpec(bits, 64, "float32", "integer") for bits in BITS),
        *(QuantSpec(bits, 128, "bfloat16", "minimum") for bits in (4, 5, 8)),
        *(QuantSpec(bits, 16) for bits in BITS),
        *(
            QuantSpec(bits, -1, zero=zero)
            for bits in (3, 4, 8)
            for zero in ("symmetric", "integer")
        ),
        *(QuantSpec(bits, 32, "e8m0") for bits in (4, 6)),
        *(QuantSpec(bits, 48, "e4m3", "integer") for bits in (4, 8)),
        QuantSpec(6, 64, zero="integer", act_order=True),
        QuantSpec(4, 32, "int8"),
        QuantSpec(8, 16, "int8", "minimum"),
        QuantSpec(4, 256, "int8", "minimum"),
        QuantSpec(4, 16, "uint4", "minimum"),
        QuantSpec(8, 64, "uint4", "minimum"),
        QuantSpec(4, 16, "bfloat16", table=STEEP),
        QuantSpec(4, -1, "float32", table=STEEP),
        QuantSpec(4, 64, "int8", table=STEEP),
    )
}

# (N, K): one unit, ragged everywhere, K of one group, several blocks and groups.
SHAPES = [(64, 32), (1, 16), (77, 100), (130, 576), (200, 1023)]
TOKENS = [1, 2, 3, 5, 8, 17, 33]


def random_plain(spec: QuantSpec, n: int, k: int, generator: torch.Generator) -> PlainWeight:
    """Random codes over all values, and scales over an octave or more; every kind of scale, zero
    and order."""
    groups, blocks = spec.groups(k), -(-k // BLOCK)

    def integers(low: int, high: int, *size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=torch.int64).to(dtype)

    def floats(dtype: torch.dtype, count: int, low: float = 0.005, high: float = 0.02) -> Tensor:
        return (torch.rand(n, count, generator=generator) * (high - low) + low).to(dtype)

    codes = integers(0, 1 << spec.bits, n, k)
    zero = block_scale = block_zero = None
    minimum = spec.zero == "minimum"
    if spec.two_level:
        scale = (
            integers(0, 256, n, groups)
            if spec.scale == "uint4"
            else integers(-127, 128, n, groups, dtype=torch.int8)
        )
        if minimum and spec.scale == "int8":
            zero = integers(-127, 128, n, groups, dtype=torch.int8)
        block_scale = floats(torch.float16, blocks, 1e-4, 3e-4)
        block_zero = floats(torch.float16, blocks, 1e-3, 2e-3) if minimum else None
    else:
        if spec.scale == "e8m0":
            scale = integers(117, 122, n, groups).view(torch.float8_e8m0fnu)
        else:
            scale = floats(spec.scale_dtype, groups)
        if minimum:
            zero = floats(spec.scale_dtype, groups, -0.05, 0.15)
        elif spec.zero == "integer":
            zero = integers(0, (1 << spec.bits) + (spec.bits < 8), n, groups)  # GPTQ reaches 2^bits
    g_idx = None
    if spec.act_order:
        order = torch.randperm(k, generator=generator)
        g_idx = torch.empty(k, dtype=torch.int32)
        g_idx[order] = (torch.arange(k) // spec.group(k)).int()
    return PlainWeight(spec, codes, scale, zero, block_scale, block_zero, g_idx)


def random_x(m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[m, k] with outliers, as activations have them."""
    x = torch.randn(m, k, generator=generator)
    x[:, ::37] *= 8
    return x.to(dtype)
