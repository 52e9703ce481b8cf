"""linear_quant's CUDA kernels: every weight, every kernel that launch_linear_int8 picks by the
number of tokens, the scales and the device, against the exact result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import LINEAR_SPECS, SHAPES, STEEP, random_plain, random_x
from gpus import Gpu
from numerics import assert_within, linear_exact
from torch import Tensor

from qkernels import reference
from qkernels.quant import PackedWeight, PlainWeight, QuantSpec
from qkernels.quant.spec import BITS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [1, 2, 8, 9, 16, 17, 33, 70, 130]
# Bulk copies or cp.async, much or little shared memory, blocks that split the columns or do not.
DEVICES = [(90, 132), (80, 4), (86, 132), (90, 1)]
MIN = QuantSpec(4, 32, zero="minimum")

Act = tuple[Tensor, Tensor, Tensor]


def in_group_order(plain: PlainWeight, packed: PackedWeight) -> PlainWeight:
    """What the kernels see of an act-order weight: its columns sorted by group."""
    if packed.perm is None:
        return plain
    spec = QuantSpec(**{**plain.spec.to_dict(), "act_order": False})
    codes = plain.codes[:, packed.perm].contiguous()
    return PlainWeight(spec, codes, plain.scale, plain.zero)


def value(act: Act, k: int) -> Tensor:
    """[M, K] float64."""
    codes, scale, _ = act
    m, groups = scale.shape
    values = codes.double().view(m, groups, -1) * scale.double()[..., None]
    return values.view(m, -1)[:, :k]


def run(
    gpu: Gpu,
    act: Act,
    packed: PackedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    args = gpu.to([*act, *packed.op_args(), bias])
    return gpu.ops.linear_quant(*args, dtype, gpu.to(residual)).cpu()


def check(
    gpu: Gpu,
    plain: PlainWeight,
    m: int,
    act_group: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> None:
    packed = plain.pack()
    n, k = plain.codes.shape
    act = reference.quantize_act(random_x(m, k, torch.float32, generator), act_group)
    b = torch.randn(n, generator=generator) if bias else None
    exact, bound = linear_exact(value(act, k), in_group_order(plain, packed), b, dtype)
    got = run(gpu, act, packed, b, dtype)
    assert got.dtype == dtype
    assert_within(got, exact, bound)


def whole_row(k: int) -> int:
    return -(-k // 16) * 16


def act_groups(spec: QuantSpec, k: int) -> list[int]:
    """The weight's own, the smallest, more columns than the weight's, and all of the row."""
    group = spec.group(k) if spec.group_size > 0 else whole_row(k)
    candidates = (group, 16, 32, 256, whole_row(k))
    fits = [g for g in candidates if group % g == 0 or g % group == 0]
    return list(dict.fromkeys(fits))


@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_every_weight(gpu: Gpu, name: str, generator: torch.Generator) -> None:
    spec = LINEAR_SPECS[name]
    for i, (n, k) in enumerate(SHAPES[:4]):
        plain = random_plain(spec, n, k, generator)
        groups = act_groups(spec, k)
        for j, m in enumerate((1, 9, 33)):
            act_group = groups[(i + j) % len(groups)]
            with gpu.playing(*DEVICES[(i + j) % 2]):
                check(gpu, plain, m, act_group, generator, DTYPES[j], bias=i % 2 == 0)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", [str(MIN), "W8 row bfloat16", "W4 row float32"])
def test_every_number_of_tokens(
    gpu: Gpu, name: str, device: tuple[int, int], generator: torch.Generator
) -> None:
    plain = random_plain(LINEAR_SPECS[name], 150, 304, generator)
    for m in TOKENS:
        dtype = DTYPES[m % 3]
        with gpu.playing(*device):
            check(gpu, plain, m, 304 if name != str(MIN) else 32, generator, dtype, bias=m % 2 == 0)


def test_no_tokens(gpu: Gpu, generator: torch.Generator) -> None:
    packed = random_plain(MIN, 150, 304, generator).pack()
    empty = run(gpu, reference.quantize_act(torch.zeros(0, 304), 32), packed, None, torch.float16)
    assert empty.shape == (0, 150) and empty.dtype == torch.float16


@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 144, 256, -1])
def test_groups_of_activations_and_weights_may_differ(
    gpu: Gpu, group: int, generator: torch.Generator
) -> None:
    """Rows of activations may also be padded further than the weight's, or less."""
    k = 300
    spec = QuantSpec(4, group, zero="integer")
    plain = random_plain(spec, 70, k, generator)
    wide = spec.group(k) if group > 0 else whole_row(k)
    for act_group in (16, 32, 48, 96, 128, 144, 256, 288, whole_row(k), 512):
        if wide % act_group and act_group % wide:
            continue
        for m in (3, 20):
            with gpu.playing(*DEVICES[m % 2]):
                check(gpu, plain, m, act_group, generator)


@pytest.mark.parametrize(
    "name", [str(MIN), "W8 row bfloat16", "W4 row float32", "W6 g16 int8", "W8 g32 float16 zero"]
)
@pytest.mark.parametrize("m", [2, 16, 20, 70])
def test_blocks_that_split_the_columns(
    gpu: Gpu, name: str, m: int, generator: torch.Generator
) -> None:
    """Long rows, of which a device with many multiprocessors gives parts to several blocks; the
    same bits whatever the order in which they come to an end."""
    k = 4400 if m <= 16 else 1072  # of which every part has at least 2 x 8 or 4 stages
    plain = random_plain(LINEAR_SPECS[name], 70, k, generator)
    act_group = whole_row(k) if "row" in name else 16 if "g16" in name else 32
    act = reference.quantize_act(random_x(m, k, torch.float32, generator), act_group)
    exact, bound = linear_exact(value(act, k), plain, None, torch.float32)
    for device in ((90, 132), (80, 132), (90, 1)):
        with gpu.playing(*device):
            results = [run(gpu, act, plain.pack(), None, torch.float32) for _ in range(2)]
        assert torch.equal(*results)
        assert_within(results[0], exact, bound)


def test_large_stages_on_little_shared_memory(gpu: Gpu, generator: torch.Generator) -> None:
    """float32 scales and minima of every 16 columns: fewer warps, fewer rows per block."""
    for bits in (4, 8):
        plain = random_plain(QuantSpec(bits, 16, "float32", "minimum"), 150, 304, generator)
        for m in (8, 16, 32, 70):
            for architecture in (80, 86):
                with gpu.playing(architecture):
                    check(gpu, plain, m, 16, generator)


@pytest.mark.parametrize("m", [8, 16, 96])
@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(bits, 32, zero=zero) for bits in BITS for zero in ("symmetric", "integer")),
        *(QuantSpec(bits, 16, "int8") for bits in (2, 4)),
        *(QuantSpec(bits, -1, "float32") for bits in (4, 8)),
        MIN,
        QuantSpec(2, 16, "uint4", "minimum"),
        QuantSpec(4, 32, "int8", "minimum"),
        QuantSpec(4, 32, "e4m3"),
        QuantSpec(4, 32, "e8m0", table=STEEP),
    ],
    ids=str,
)
def test_one_hot_activations_read_single_weights(
    gpu: Gpu, spec: QuantSpec, m: int, generator: torch.Generator
) -> None:
    """Bit for bit what dequantize has: a misplaced code or scale shows as itself."""
    k = 96
    packed = random_plain(spec, 70, k, generator).pack()
    want = torch.ops.qkernels_reference.dequantize(*packed.op_args(), torch.float32).T
    codes = torch.eye(k, dtype=torch.int8)
    for start in range(0, k, m):
        part = codes[start : start + m]
        sums = part.view(m, -1, 16).sum(2).short()
        act = (part.contiguous(), torch.ones(m, 1), sums)
        assert torch.equal(run(gpu, act, packed, None, torch.float32), want[start : start + m])


@pytest.mark.parametrize("m, k", [(3, 2048), (11, 2048), (20, 512)])
def test_sums_of_a_span_stay_integers(gpu: Gpu, m: int, k: int, generator: torch.Generator) -> None:
    """All of a row is one span: of what a warp multiplies, every second 128 columns take away what
    the 128 before them gave, and nothing is left. Scaled one by one they would leave roundings."""
    few = random_plain(LINEAR_SPECS["W4 row float32"], 70, 128, generator)
    plain = dataclasses.replace(few, codes=few.codes.repeat(1, k // 128))
    codes = torch.randint(-127, 128, (m, 128), generator=generator)
    codes = torch.cat([codes, -codes], 1).repeat(1, k // 256)
    act = (
        codes.to(torch.int8),
        torch.rand(m, 1, generator=generator),
        codes.view(m, -1, 16).sum(2).short(),
    )
    with gpu.playing(multiprocessors=1):
        assert torch.equal(run(gpu, act, plain.pack(), None, torch.float32), torch.zeros(m, 70))


@pytest.mark.parametrize("bits", BITS)
def test_largest_codes_do_not_overflow(gpu: Gpu, bits: int) -> None:
    """All codes and activations at their ends, over the longest span that there is
    (8 bits)."""
    k = 32768 if bits == 8 else 4096
    specs = [QuantSpec(bits, -1), QuantSpec(bits, -1, zero="integer")]
    if bits == 4:
        specs.append(QuantSpec(4, -1, table=STEEP))
    for spec in specs:
        for code in (0, (1 << bits) - 1):
            codes = torch.full((1, k), code, dtype=torch.uint8)
            zero = torch.zeros(1, 1, dtype=torch.uint8) if spec.zero == "integer" else None
            plain = PlainWeight(spec, codes, torch.ones(1, 1).half(), zero)
            for m in (1, 17):
                act = reference.quantize_act(torch.full((m, k), -1.0), k)
                exact, bound = linear_exact(value(act, k), plain, None, torch.float32)
                with gpu.playing(multiprocessors=1):
                    assert_within(run(gpu, act, plain.pack(), None, torch.float32), exact, bound)


def test_largest_codes_of_rows_of_many_tokens(gpu: Gpu) -> None:
    plain = PlainWeight(
        QuantSpec(8, -1),
        torch.full((1, 32768), 0, dtype=torch.uint8),
        torch.ones(1, 1).half(),
    )
    act = reference.quantize_act(torch.full((65, 32768), -1.0), 32768)
    exact, bound = linear_exact(value(act, 32768), plain, None, torch.float32)
    with gpu.playing(multiprocessors=1):
        assert_within(run(gpu, act, plain.pack(), None, torch.float32), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(gpu: Gpu, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Added in float32 before the one rounding, like the bias; rows may be a stride apart."""
    for n, k in ((64, 32), (77, 100), (72, 1040)):
        packed = random_plain(MIN, n, k, generator).pack()
        for m in (1, 9, 33):
            act = reference.quantize_act(random_x(m, k, torch.float32, generator), 32)
            bias = torch.randn(n, generator=generator)
            without = run(gpu, act, packed, None, torch.float32)
            before = run(gpu, act, packed, bias, torch.float32)
            assert torch.equal(before, without + bias)
            assert torch.equal(run(gpu, act, packed, None, dtype), without.to(dtype))
            wide = torch.randn(m, n + 3, generator=generator).to(dtype)
            for residual in (
                wide[:, 1 : n + 1],
                wide[:, :n].contiguous(),
                wide[:1, :n].expand(m, n),
            ):
                got = run(gpu, act, packed, bias, dtype, residual)
                assert torch.equal(got, (before + residual.float()).to(dtype))


@pytest.mark.parametrize("m", [0, 1, 20])
def test_linear_quantizes_first(gpu: Gpu, m: int, generator: torch.Generator) -> None:
    packed = random_plain(MIN, 70, 100, generator).pack()
    x = random_x(m, 100, torch.bfloat16, generator)
    for act_group in (32, 128):
        args = gpu.to([x, *packed.op_args(), None])
        got = gpu.ops.linear(*args, "int8", act_group, None).cpu()
        act = reference.quantize_act(x, act_group)
        assert torch.equal(got, run(gpu, act, packed, None, torch.bfloat16))


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_minima_of_8_bit_floats(gpu: Gpu, scale: str, generator: torch.Generator) -> None:
    """No QuantSpec has them, but the ops take them."""
    packed = random_plain(QuantSpec(4, 32, scale), 70, 96, generator).pack()
    weight = list(packed.op_args())
    weight[2] = weight[1].view(torch.uint8).flip(2).view(weight[1].dtype)  # of another row
    dense = torch.ops.qkernels_reference.dequantize(*weight, torch.float32).double()
    for m in (3, 20):
        act = reference.quantize_act(random_x(m, 96, torch.float32, generator), 32)
        args = gpu.to([*act, *weight, None])
        got = gpu.ops.linear_quant(*args, torch.float32, None).cpu()
        seen, width = value(act, 96), dense.abs() + 2 * weight[2].float().abs().max().double()
        assert_within(got, seen @ dense.T, 96 * 2.0**-23 * (seen.abs() @ width.T))


def test_misaligned_codes_are_refused(gpu: Gpu, generator: torch.Generator) -> None:
    packed = random_plain(MIN, 64, 32, generator).pack()
    _, scale, sums = reference.quantize_act(torch.ones(1, 32), 32)
    odd = torch.zeros(33, dtype=torch.int8)[1:].view(1, 32)
    with pytest.raises(RuntimeError, match=r"linear_quant: the tensors .* multiples of 16 bytes"):
        run(gpu, (odd, scale, sums), packed, None, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("m", [4, 40])
def test_a_graph_captures_it(m: int, generator: torch.Generator) -> None:
    packed = random_plain(MIN, 256, 8192, generator).pack()
    act = reference.quantize_act(random_x(m, 8192, torch.float32, generator), 32)
    args = [*(t.cuda() for t in act), *packed.to("cuda").op_args(), None, torch.bfloat16]
    want = torch.ops.qkernels.linear_quant(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.qkernels.linear_quant(*args)
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, want)
