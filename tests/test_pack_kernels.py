"""pack, unpack and dequantize on every instruction set: bitwise, for every kind of weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FORMATS, SHAPES, random_plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qkernels as qk
from qkernels.quant import QuantSpec, layout
from qkernels.quant.spec import BITS

REFERENCE = torch.ops.qkernels_reference
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_codes(n, k, bits, generator):
    return torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)


def zero_scales(n, k, group, two_level):
    """Scales that unpack wants to see and does not use: scale, and block_scale or None."""
    blocks, kp = layout.padded_n(n) // 64, layout.padded_k(k, group, two_level)
    scale = torch.zeros(blocks, kp // group, 64, dtype=torch.int8 if two_level else torch.float32)
    block_scale = torch.zeros(blocks, kp // 256, 64, dtype=torch.float16) if two_level else None
    return scale, block_scale


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_the_layout_and_unpack_its_inverse(isa, bits, generator):
    shapes = [
        (64, 16, 16, False),
        (1, 1, 32, False),
        (77, 100, 48, False),
        (130, 700, 32, True),
        (65, 1030, 1040, False),
        (300, 257, 16, True),
    ]
    for n, k, group, two_level in shapes:
        codes = random_codes(n, k, bits, generator)
        packed = isa.ops.pack(codes, bits, group, two_level)
        assert torch.equal(packed, layout.pack(codes, bits, group, two_level))
        scale, block_scale = zero_scales(n, k, group, two_level)
        weight = (packed, scale, None, block_scale, None, None, bits, group, n, k)
        assert torch.equal(isa.ops.unpack(*weight), codes)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 600),
    units=st.integers(1, 20),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 99),
)
def test_pack_of_any_shape(isa, n, k, units, bits, seed):
    codes = random_codes(n, k, bits, torch.Generator().manual_seed(seed))
    packed = isa.ops.pack(codes, bits, 16 * units, False)
    assert torch.equal(packed, layout.pack(codes, bits, 16 * units, False))


# IEEE says which NaN a conversion gives only up to its payload: compare values, and where they are
# NaN.
def assert_same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    integers = {2: torch.int16, 4: torch.int32}[got.element_size()]
    same = (got.view(integers) == want.view(integers)) | (got.isnan() & want.isnan())
    assert same.all(), f"{int((~same).sum())} of {same.numel()} values differ"


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_bitwise_the_definition(isa, name, generator):
    spec = replace(FORMATS[name].spec, act_order=False)
    for n, k in SHAPES:
        plain = random_plain(spec, n, k, generator)
        weight = plain.pack()
        for dtype in DTYPES:
            assert_same_bits(isa.ops.dequantize(*weight.op_args(), dtype), plain.dequantize(dtype))


@pytest.mark.parametrize("scale", ["float32", "float16", "bfloat16", "e8m0", "e4m3"])
def test_every_bit_pattern_of_a_scale(isa, scale, generator):
    """Subnormals, infinities and NaN too, as scales and as minima."""
    spec = QuantSpec(4, 16, scale, "minimum" if scale not in ("e8m0", "e4m3") else "symmetric")
    dtype, n, k = spec.scale_dtype, 64, 256 * 16 if spec.scale_dtype.itemsize > 1 else 64
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    patterns = torch.randint(
        -(2**31), 2**31, (2, n, k // 16), generator=generator, dtype=torch.int64
    )
    if dtype.itemsize == 1:
        patterns[0] = torch.arange(256).view(n, k // 16)
    elif dtype.itemsize == 2:
        patterns %= 1 << 16
        patterns[0] = torch.arange(1 << 14).view(n, -1) * 4 + 3
        patterns = patterns - (1 << 15)
    scales, zeros = (p.to(size).view(dtype) for p in patterns)
    groups = k // 16
    codes = random_codes(n, k, 4, generator)
    zero = layout.pack_groups(zeros, groups) if spec.zero == "minimum" else None
    weight = (
        layout.pack(codes, 4, 16, False),
        layout.pack_groups(scales, groups),
        zero,
        None,
        None,
        None,
        4,
        16,
        n,
        k,
    )
    for out in DTYPES:
        assert_same_bits(isa.ops.dequantize(*weight, out), REFERENCE.dequantize(*weight, out))


def test_products_are_not_fused(isa):
    """scale * code - minimum rounds twice: with one rounding the difference below would not be
    0."""
    third = torch.tensor(1 / 3)
    codes = torch.full((64, 16), 3, dtype=torch.uint8)
    scale, zero = torch.full((1, 1, 64), third.item()), torch.full((1, 1, 64), (third * 3).item())
    weight = (layout.pack(codes, 8, 16, False), scale, zero, None, None, None, 8, 16, 64, 16)
    assert float(third.double() * 3 - (third * 3).double()) != 0
    assert isa.ops.dequantize(*weight, torch.float32).abs().max() == 0


def test_teams_agree(isa, with_threads, generator):
    plain = random_plain(FORMATS["Q4_K"].spec, 200, 1023, generator)
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        packed = isa.ops.pack(plain.codes, 4, 32, True)
        weight = (packed, *plain.pack().op_args()[1:])
        results.append(
            (packed, isa.ops.unpack(*weight), isa.ops.dequantize(*weight, torch.float16))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_codes_beyond_the_bits_are_refused(isa):
    codes = torch.zeros(70, 40, dtype=torch.uint8)
    codes[69, 39] = 16
    with pytest.raises(RuntimeError, match=r"pack: codes must be below 2\^bits = 16"):
        isa.ops.pack(codes, 4, 16, False)


def test_bad_arguments_raise_alike():
    good = QuantSpec(4, 32)
    weight = random_plain(good, 64, 64, torch.Generator().manual_seed(0)).pack().op_args()

    def but(**changes):
        names = (
            "codes",
            "scale",
            "zero",
            "block_scale",
            "block_zero",
            "table",
            "bits",
            "group",
            "n",
            "k",
        )
        return tuple(changes.get(name, value) for name, value in zip(names, weight, strict=True))

    codes = torch.zeros(64, 64, dtype=torch.uint8)
    table = torch.zeros(16, dtype=torch.int8)
    zero = torch.zeros_like(weight[1])
    cases = [
        ("pack", (codes.int(), 4, 32, False), "codes must be uint8, got int32"),
        ("pack", (codes.T[:, ::2], 4, 32, False), "codes must be contiguous"),
        ("pack", (codes[0], 4, 32, False), "codes must be"),
        ("pack", (codes[:0], 4, 32, False), "n > 0 and k > 0"),
        ("pack", (codes, 7, 32, False), "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ("pack", (codes, 4, 24, False), "group_size must be a positive multiple of 16, got 24"),
        ("pack", (codes, 4, 2**31, False), "group_size must be at most 1073741824"),
        ("pack", (codes, 4, 48, True), "divides 256, got 48"),
        # Products that pass 2^63 must not come out as the small numbers they leave over.
        ("unpack", but(n=2**63 - 1), "a weight has at most 2147483647 rows and columns"),
        ("unpack", but(k=2**61 + 16), "a weight has at most 2147483647 rows and columns"),
        ("unpack", but(group=2**61 + 16), "group_size must be at most 1073741824"),
        ("unpack", but(bits=2**32 + 4), "bits must be 2, 3, 4, 5, 6 or 8, got 4294967300"),
        ("unpack", but(n=65), "codes must be"),
        ("unpack", but(scale=weight[1][:, :1].contiguous()), "scale must be"),
        ("dequantize", (*but(table=table, zero=zero), torch.float32), "a table has its own zero"),
        ("dequantize", (*but(table=table[:8]), torch.float32), "table must be"),
        ("dequantize", (*weight, torch.float64), "dtype must be float32, float16 or bfloat16"),
    ]
    for name, args, message in cases:
        for namespace in ("qkernels", "qkernels_reference"):
            with pytest.raises(RuntimeError, match=message):
                getattr(getattr(torch.ops, namespace), name)(*args)
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.qkernels, name)(*meta)


def test_opcheck_and_compile(generator):
    plain = random_plain(FORMATS["Q6_K"].spec, 70, 300, generator)
    weight = plain.pack()
    torch.library.opcheck(torch.ops.qkernels.pack.default, (plain.codes, 6, 16, True))
    torch.library.opcheck(torch.ops.qkernels.unpack.default, weight.op_args())
    torch.library.opcheck(torch.ops.qkernels.dequantize.default, (*weight.op_args(), torch.float16))

    def round_trip(codes):
        packed = qk.ops.pack(codes, 6, 16, True)
        return torch.ops.qkernels.dequantize(packed, *weight.op_args()[1:], torch.float32)

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(plain.codes), plain.dequantize())
