"""pack, unpack and dequantize in Triton: bitwise, for every kind of weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FORMATS, LINEAR_SPECS, random_plain
from gpus import Gpu, triton_gpu
from test_cuda_pack import (  # noqa: F401
    test_codes_at_any_address,
    test_codes_that_are_not_aligned_are_refused,
    test_every_kind_of_scale,
    test_rows_of_a_weight_are_a_weight,
)
from test_pack_kernels import assert_same_bits, random_codes, zero_scales

from qkernels.quant import layout
from qkernels.quant.spec import BITS

# Interpreted, they are numpy's warnings of scales that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_the_layout_and_unpack_its_inverse(
    gpu: Gpu, bits: int, generator: torch.Generator
) -> None:
    for n, k, group, two_level in [(1, 1, 32, False), (77, 100, 48, False), (65, 150, 16, True)]:
        codes = random_codes(n, k, bits, generator)
        packed = gpu.ops.pack(gpu.to(codes), bits, group, two_level)
        assert torch.equal(packed.cpu(), layout.pack(codes, bits, group, two_level))
        scale, block_scale = zero_scales(n, k, group, two_level)
        weight = (gpu.to(scale), None, gpu.to(block_scale), None, None, bits, group, n, k)
        assert torch.equal(gpu.ops.unpack(packed, *weight).cpu(), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_codes_beyond_the_bits_are_refused(gpu: Gpu, bits: int) -> None:
    n, k = 70, 41
    for row, column in ((0, 0), (n - 1, k - 1), (n // 2, k // 2)):
        codes = torch.zeros(n, k, dtype=torch.uint8)
        codes[row, column] = 1 << bits
        message = rf"pack: codes must be below 2\^bits = {1 << bits},"
        with pytest.raises(RuntimeError, match=message):
            gpu.ops.pack(gpu.to(codes), bits, 16, False)


@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_dequantize_is_bitwise_the_definition(
    gpu: Gpu, name: str, generator: torch.Generator
) -> None:
    plain = random_plain(replace(LINEAR_SPECS[name], act_order=False), 67, 83, generator)
    args = gpu.to(plain.pack().op_args())
    assert torch.equal(gpu.ops.unpack(*args).cpu(), plain.codes)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(gpu.ops.dequantize(*args, dtype).cpu(), plain.dequantize(dtype))


def test_opcheck_and_compile(gpu: Gpu, generator: torch.Generator) -> None:
    plain = random_plain(FORMATS["Q6_K"].spec, 3, 40, generator)
    weight = gpu.to(plain.pack().op_args())
    torch.library.opcheck(gpu.ops.pack.default, (gpu.to(plain.codes), 6, 16, True))
    torch.library.opcheck(gpu.ops.unpack.default, weight)
    torch.library.opcheck(gpu.ops.dequantize.default, (*weight, torch.float16))

    def round_trip(codes: torch.Tensor) -> torch.Tensor:
        packed = gpu.ops.pack(codes, 6, 16, True)
        return gpu.ops.dequantize(packed, *weight[1:], torch.float32)

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gpu.to(plain.codes)).cpu(), plain.dequantize())
