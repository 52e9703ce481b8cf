"""pack, unpack and dequantize on CUDA: bitwise, for every kind of weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FORMATS, LINEAR_SPECS, random_plain
from gpus import Gpu
from test_pack_kernels import DTYPES, REFERENCE, assert_same_bits, random_codes, zero_scales

from qkernels.quant import QuantSpec, layout
from qkernels.quant.spec import BITS

# One unit, ragged everywhere, rows that are no multiples of 16 bytes, of 8 columns and of 64; more
# warps than a block has.
SHAPES = [(64, 32), (1, 16), (77, 100), (130, 584), (67, 1023)]


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_the_layout_and_unpack_its_inverse(
    gpu: Gpu, bits: int, generator: torch.Generator
) -> None:
    shapes = [
        (64, 16, 16, False),
        (1, 1, 32, False),
        (77, 100, 48, False),
        (130, 704, 32, True),
        (65, 1030, 1040, False),
        (200, 257, 16, True),
    ]
    for n, k, group, two_level in shapes:
        codes = random_codes(n, k, bits, generator)
        packed = gpu.ops.pack(gpu.to(codes), bits, group, two_level)
        assert torch.equal(packed.cpu(), layout.pack(codes, bits, group, two_level))
        scale, block_scale = zero_scales(n, k, group, two_level)
        weight = (gpu.to(scale), None, gpu.to(block_scale), None, None, bits, group, n, k)
        assert torch.equal(gpu.ops.unpack(packed, *weight).cpu(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_at_any_address(gpu: Gpu, bits: int, generator: torch.Generator) -> None:
    whole = random_codes(1, 1 + 3 * 64, bits, generator)
    codes = whole[:, 1:].view(3, 64)
    packed = gpu.ops.pack(gpu.to(whole)[:, 1:].view(3, 64), bits, 16, False)
    assert torch.equal(packed.cpu(), layout.pack(codes, bits, 16, False))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_codes_beyond_the_bits_are_refused(gpu: Gpu, bits: int) -> None:
    for n, k in ((70, 48), (70, 41), (3, 300)):
        for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 2)):
            codes = torch.zeros(n, k, dtype=torch.uint8)
            codes[row, column] = 1 << bits
            message = rf"pack: codes must be below 2\^bits = {1 << bits},"
            with pytest.raises(RuntimeError, match=message):
                gpu.ops.pack(gpu.to(codes), bits, 16, False)


def check_dequantize(gpu: Gpu, spec: QuantSpec, n: int, k: int, generator: torch.Generator) -> None:
    plain = random_plain(replace(spec, act_order=False), n, k, generator)
    args = gpu.to(plain.pack().op_args())
    assert torch.equal(gpu.ops.unpack(*args).cpu(), plain.codes)
    for dtype in DTYPES:
        assert_same_bits(gpu.ops.dequantize(*args, dtype).cpu(), plain.dequantize(dtype))


@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_dequantize_is_bitwise_the_definition(
    gpu: Gpu, name: str, generator: torch.Generator
) -> None:
    check_dequantize(gpu, LINEAR_SPECS[name], 69, 328, generator)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "GPTQ W3 g128", "GPTQ W2 g64", "MXFP4", "Q8_0"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_of_every_shape(
    gpu: Gpu, name: str, shape: tuple[int, int], generator: torch.Generator
) -> None:
    check_dequantize(gpu, FORMATS[name].spec, *shape, generator)


@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16", "e8m0", "e4m3"])
def test_every_kind_of_scale(gpu: Gpu, scale: str, generator: torch.Generator) -> None:
    """Any bits: subnormals, infinities and NaN too, as scales and as minima."""
    spec = QuantSpec(4, 16, scale, "minimum" if scale not in ("e8m0", "e4m3") else "symmetric")
    dtype, n, groups = spec.scale_dtype, 64, 16
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    raw = torch.randint(-(2**31), 2**31, (2, n, groups), generator=generator, dtype=torch.int64)
    if dtype.itemsize == 1:
        raw[0] = torch.arange(256).repeat(4).view(n, groups)
    if dtype.itemsize == 2:
        raw = raw % (1 << 16) - (1 << 15)
    scales, zeros = (p.to(size).view(dtype) for p in raw)
    codes = random_codes(n, 16 * groups, 4, generator)
    weight: tuple[Any, ...] = (
        layout.pack(codes, 4, 16, False),
        layout.pack_groups(scales, groups),
        layout.pack_groups(zeros, groups) if spec.zero == "minimum" else None,
        *(None, None, None, 4, 16, n, 16 * groups),
    )
    for out in DTYPES:
        got = gpu.ops.dequantize(*gpu.to(weight), out).cpu()
        assert_same_bits(got, REFERENCE.dequantize(*weight, out))


def test_rows_of_a_weight_are_a_weight(gpu: Gpu, generator: torch.Generator) -> None:
    """From a multiple of 64 on, as the dense path takes them."""
    plain = random_plain(QuantSpec(5, 32, "int8", "minimum"), 200, 96, generator)
    codes, scale, zero, block_scale, block_zero, table, *numbers = gpu.to(plain.pack().op_args())
    bits, group, _, k = numbers
    rows = codes[64:192], scale[1:3], zero[1:3], block_scale[1:3], block_zero[1:3], table
    got = gpu.ops.dequantize(*rows, bits, group, 101, k, torch.float16)
    assert torch.equal(got.cpu(), plain.dequantize(torch.float16)[64:165])


def test_codes_that_are_not_aligned_are_refused(gpu: Gpu, generator: torch.Generator) -> None:
    codes, *rest = random_plain(QuantSpec(4, 32), 64, 64, generator).pack().op_args()
    moved = torch.zeros(codes.numel() + 8, dtype=torch.int8)[8:].view(codes.shape).copy_(codes)
    if not gpu.emulated:
        moved = torch.zeros(codes.numel() + 8, dtype=torch.int8, device=gpu.device)[8:]
        moved = moved.view(codes.shape)
    for call in (
        lambda: gpu.ops.unpack(moved, *gpu.to(rest)),
        lambda: gpu.ops.dequantize(moved, *gpu.to(rest), torch.float32),
    ):
        with pytest.raises(RuntimeError, match="codes must start at a multiple of 16 bytes"):
            call()
