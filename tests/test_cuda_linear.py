"""linear's CUDA kernels for float activations: every kind of weight in every kernel, bit for bit
where sums are exact and within the bound of rounding where they are not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import LINEAR_SPECS, random_plain, random_x
from gpus import Gpu
from numerics import assert_within, exact_weight, linear_exact
from torch import Tensor

from qkernels.quant import PackedWeight, PlainWeight, QuantSpec
from qkernels.quant.spec import BITS

HALVES = [torch.float16, torch.bfloat16]
# Tokens: one, and the ends of each shape of a block: 64 x 8 warps of K, 128 x 4, 256 x 2 for few;
# 32 or 64 tokens in a tile, and several tiles.
FEW, MANY = [1, 3, 4, 5, 8, 9, 16], [17, 32, 33, 64, 70]
DENSE = 385  # as csrc/cuda/linear.cu has it: from here torch multiplies


def exact_plain(spec: QuantSpec, n: int, k: int, generator: torch.Generator) -> PlainWeight:
    """Random codes, and scales and minima with so few bits that float32 sums are exact."""
    plain = random_plain(spec, n, k, generator)

    def powers(like: Tensor, low: int, high: int) -> Tensor:
        exponent = torch.randint(low, high + 1, like.shape, generator=generator)
        return (2.0**exponent).to(like.dtype)

    def small(like: Tensor, size: int) -> Tensor:
        return torch.randint(-size, size + 1, like.shape, generator=generator).to(like.dtype)

    changed: dict[str, Any] = {}
    if spec.scale == "int8":
        changed["scale"] = small(plain.scale, 3)
    elif spec.scale == "e8m0":
        exponent = torch.randint(124, 128, plain.scale.shape, generator=generator)
        changed["scale"] = exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    elif spec.scale != "uint4":
        changed["scale"] = powers(plain.scale, -3, 0)
    if plain.block_scale is not None:
        changed["block_scale"] = powers(plain.block_scale, -5, -4)
    if plain.block_zero is not None:
        changed["block_zero"] = powers(plain.block_zero, -5, -4)
    if spec.zero == "minimum" and plain.zero is not None:
        integers = small(torch.empty(plain.zero.shape), 8)
        eighths = integers if spec.two_level else integers / 8
        changed["zero"] = eighths.to(plain.zero.dtype)
    return dataclasses.replace(plain, **changed)


def small_x(m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Integers up to 3: with exact_plain and up to 1,024 columns no sum needs more than 24 bits."""
    return torch.randint(-3, 4, (m, k), generator=generator).to(dtype)


def sorted_plain(plain: PlainWeight, packed: PackedWeight) -> PlainWeight:
    """What kernels see of an act-order weight: its columns sorted by group."""
    if packed.perm is None:
        return plain
    spec = dataclasses.replace(plain.spec, act_order=False)
    codes = plain.codes[:, packed.perm].contiguous()
    return PlainWeight(spec, codes, plain.scale, plain.zero)


def run(gpu: Gpu, x: Tensor, packed: PackedWeight, *addends: Tensor | None) -> Tensor:
    bias, residual = (*addends, None, None)[:2]
    device = gpu.to([x, *packed.op_args(), bias])
    return gpu.ops.linear(*device, "float", 0, gpu.to(residual)).cpu()


def exact_result(x: Tensor, plain: PlainWeight) -> Tensor:
    y = x.double() @ exact_weight(plain)[0].T
    assert torch.equal(y, y.float().double()), "the case is not exact in float32"
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_every_weight_exactly(
    gpu: Gpu, name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    for n, k, tokens in ((77, 100, [2, 6, 11, 20, 40]), (70, 576, [4]), (130, 304, [17])):
        plain = exact_plain(LINEAR_SPECS[name], n, k, generator)
        packed = plain.pack()
        seen = sorted_plain(plain, packed)
        for m in tokens:
            x = small_x(m, k, dtype, generator)
            assert torch.equal(run(gpu, x, packed), exact_result(x, seen)), (n, k, m)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_one_hot_activations_read_single_weights(
    gpu: Gpu, name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Bit for bit what dequantize has, rounded to the type, for any scale."""
    packed = random_plain(LINEAR_SPECS[name], 70, 48, generator).pack()
    dense = torch.ops.qkernels_reference.dequantize(*packed.op_args(), torch.float32)
    x = torch.eye(48, dtype=dtype)
    few = torch.cat([run(gpu, part, packed) for part in x.split([16, 8, 24])])
    many = run(gpu, x, packed)
    assert torch.equal(few, dense.T.to(dtype)) and torch.equal(many, dense.T.to(dtype))


def added(spec: QuantSpec, dtype: torch.dtype) -> float:
    """What codes are added to on their way to tensor cores (linear_units.cuh)."""
    if dtype == torch.float16:
        return 1024
    return 2176 if spec.bits == 8 or spec.table is not None else 128


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["W4 g32 float16", "W4 g128 float16 zero", "W8 g32 bfloat16", "W6 g16 int8", "W4 row float32"],
)
def test_within_the_bound_of_rounding(
    gpu: Gpu, name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = LINEAR_SPECS[name]
    for n, k, tokens in ((130, 288, (7, 33)), (40, 1023, (1, 16))):
        plain = random_plain(spec, n, k, generator)
        for m in tokens:
            x = random_x(m, k, dtype, generator)
            bias, residual = torch.randn(n, generator=generator), x[:, :n].contiguous()
            got = run(gpu, x, plain.pack(), bias, residual)
            exact, bound = linear_exact(x, plain, bias, dtype, residual, added(spec, dtype))
            assert_within(got, exact, bound)


@pytest.mark.parametrize("m", [*FEW, *MANY])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_of_tokens(gpu: Gpu, bits: int, m: int, generator: torch.Generator) -> None:
    plain = exact_plain(QuantSpec(bits, 32, zero="minimum"), 320, 208, generator)
    x = small_x(m, 208, HALVES[m % 2], generator)
    assert torch.equal(run(gpu, x, plain.pack()), exact_result(x, plain))


@pytest.mark.parametrize("group", [16, 48, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_last_stage_of_one_unit(
    gpu: Gpu, bits: int, group: int, generator: torch.Generator
) -> None:
    """9 units of 16 columns: stages have 8 or 4."""
    plain = exact_plain(QuantSpec(bits, group, zero="integer"), 70, 144, generator)
    for m in (3, 12, 20, 40):
        x = small_x(m, 144, HALVES[m % 8 // 4], generator)
        assert torch.equal(run(gpu, x, plain.pack()), exact_result(x, plain)), m


def test_no_tokens(gpu: Gpu, generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 70, 96, generator).pack()
    y = run(gpu, torch.zeros(0, 96).half(), packed)
    assert y.shape == (0, 70) and y.dtype == torch.float16


# Where K is split between blocks, and x goes through shared memory in segments.
@pytest.mark.parametrize("architecture, multiprocessors", [(80, 132), (86, 7), (90, 1), (90, 132)])
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 60, 8200),  # 64 rows x 8 warps of K, several blocks along K
        (8, 130, 4100),
        (16, 260, 2304),  # with one multiprocessor: whole rows, in segments
        (20, 70, 1100),  # a tile whose warps halve K
        (35, 70, 700),
        (70, 260, 512),
    ],
)
def test_every_way_to_cut(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    multiprocessors: int,
    architecture: int,
    generator: torch.Generator,
) -> None:
    with gpu.playing(architecture, multiprocessors):
        plain = exact_plain(QuantSpec(4, 64, zero="integer"), n, k, generator)
        x = torch.randint(-1, 2, (m, k), generator=generator).half()
        packed, want = plain.pack(), exact_result(x, plain)
        # Counters are back at zero after each, and the order of blocks changes.
        for _ in range(2):
            assert torch.equal(run(gpu, x, packed), want)


@pytest.mark.parametrize("m, k", [(1, 4160), (12, 1600), (40, 1000)])
def test_the_same_bits_in_any_order_of_blocks(
    gpu: Gpu, m: int, k: int, generator: torch.Generator
) -> None:
    packed = random_plain(QuantSpec(4, 32), 60, k, generator).pack()
    x = random_x(m, k, torch.bfloat16, generator)
    first = run(gpu, x, packed)
    for _ in range(3):
        assert torch.equal(run(gpu, x, packed), first)


def test_a_block_too_large_for_shared_memory(gpu: Gpu, generator: torch.Generator) -> None:
    """Large scales on a GPU with 99 KB: few tokens go through the kernel for many."""
    plain = exact_plain(QuantSpec(4, 16, "float32", "integer"), 70, 320, generator)
    x = small_x(3, 320, torch.float16, generator)
    with gpu.playing(architecture=86):
        assert torch.equal(run(gpu, x, plain.pack()), exact_result(x, plain))


# ---- where activations lie, and what is added ----


@pytest.mark.parametrize("m", [1, 5, 16, 21, 50])
@pytest.mark.parametrize("k", [104, 100, 97])
@pytest.mark.parametrize("start, width", [(0, 128), (8, 128), (1, 128), (0, 131)])
def test_rows_of_a_wider_tensor(
    gpu: Gpu, m: int, k: int, start: int, width: int, generator: torch.Generator
) -> None:
    """Aligned or not, and NaN behind K: it belongs to another tensor."""
    plain = exact_plain(QuantSpec(4, 32), 66, k, generator)
    wide = torch.full((m, width), torch.nan, dtype=torch.float16)
    wide[:, start : start + k] = small_x(m, k, torch.float16, generator)
    x = gpu.to(wide)[:, start : start + k]
    assert x.stride(0) == width
    got = gpu.ops.linear(x, *gpu.to(plain.pack().op_args()), None, "float", 0).cpu()
    assert torch.equal(got, exact_result(x.cpu(), plain))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("m", [1, 16, 40, DENSE])
def test_bias_and_residual(
    gpu: Gpu, m: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    n, k = 77, 100
    plain = exact_plain(QuantSpec(4, 32), n, k, generator)
    packed, x = plain.pack(), small_x(m, k, dtype, generator)
    bias = torch.randint(-8, 9, (n,), generator=generator) / 4
    residual = (torch.randint(-8, 9, (m, 2 * n), generator=generator) / 4).to(dtype)[:, n:]
    product = x.double() @ exact_weight(plain)[0].T
    before = product.to(dtype).double() if m == DENSE else product  # torch rounds the product
    for b, r in ((bias, None), (None, residual), (bias, residual)):
        want = before + (0 if b is None else b.double()) + (0 if r is None else r.double())
        assert torch.equal(run(gpu, x, packed, b, r), want.to(dtype))


@pytest.mark.parametrize("zero", ["symmetric", "integer", "minimum"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_dense(gpu: Gpu, dtype: torch.dtype, zero: str, generator: torch.Generator) -> None:
    """By the dequantized matrix, rounded to the activations' type: 16-bit ones of many tokens,
    float32 ones of any number. A large matrix goes in several parts; emulated, at 64 KB."""
    two_level = [QuantSpec(4, 32, "int8", zero)] if zero != "integer" else []
    specs = [QuantSpec(4, 32, zero=zero), QuantSpec(8, 16, zero=zero), *two_level]
    for spec in specs:
        for n, k in ((70, 96), (330, 256)):
            plain = exact_plain(spec, n, k, generator)
            packed = plain.pack()
            for m in (DENSE, DENSE + 1) if dtype in HALVES else (1, 40):
                x = small_x(m, k, dtype, generator)
                dense = torch.ops.qkernels_reference.dequantize(*packed.op_args(), dtype)
                want = (x.double() @ dense.double().T).to(dtype)
                assert torch.equal(run(gpu, x, packed), want), (n, k, m)


@pytest.mark.parametrize("bits", BITS)
def test_largest_codes_and_activations(gpu: Gpu, bits: int) -> None:
    """Sums stay finite, and cancel: 65504 is float16's greatest."""
    k = 512
    for code in (0, (1 << bits) - 1):
        plain = PlainWeight(
            QuantSpec(bits, 128),
            torch.full((64, k), code, dtype=torch.uint8),
            torch.full((64, k // 128), 2.0**-16).half(),
        )
        x = torch.full((3, k), 65504.0).half()
        x[:, 1::2] *= -1
        assert torch.equal(run(gpu, x, plain.pack()), torch.zeros(3, 64).half())
        exact, bound = linear_exact(x.abs(), plain, None, torch.float16, None, 1024)
        assert_within(run(gpu, x.abs(), plain.pack()), exact, bound)


def test_a_weight_that_is_not_aligned(gpu: Gpu, generator: torch.Generator) -> None:
    weight = list(random_plain(QuantSpec(4, 32), 64, 64, generator).pack().op_args())
    odd = torch.zeros(weight[0].numel() + 1, dtype=torch.int8)[1:].view(weight[0].shape)
    odd.copy_(weight[0])
    x = torch.zeros(1, 64).half()
    with pytest.raises(RuntimeError, match="must start at multiples of 16 bytes"):
        gpu.ops.linear(*gpu.to([x, odd, *weight[1:], None]), "float", 0)


# ---- streams and graphs ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("m", [1, 40])
def test_graphs_and_streams_side_by_side(m: int, generator: torch.Generator) -> None:
    """Blocks of launches that run at the same time must not count each other's arrivals."""
    packed = random_plain(QuantSpec(4, 128), 512, 8192, generator).pack()
    weight = [t.cuda() if isinstance(t, Tensor) else t for t in packed.op_args()]
    x = random_x(m, 8192, torch.float16, generator).cuda()

    def once() -> Tensor:
        return torch.ops.qkernels.linear(x, *weight, None, "float", 0)

    want = once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [once() for _ in range(8)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    eager: list[Tensor] = []
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                eager += [once(), once()]
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in [*captured, *eager])
