"""One layout, defined twice: csrc/layout.h (through the op `pack`) and quant/layout.py are held equal."""

import pytest
import torch
from conftest import Isa
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.quant import layout
from qkernels.quant.spec import BITS


def place(width: int, row: int, col: int) -> tuple[int, int]:
    """The formulas of csrc/layout.h: byte within the plane, shift within the byte."""
    q, h, p = row // 32, row // 16 % 2, row % 16
    c, e, t, j = p // 4, p % 4, col // 4, col % 4
    return {
        8: (512 * h + 256 * q + 64 * t + 4 * p + j, 0),
        4: (256 * q + 64 * t + 4 * p + j, 4 * h),
        2: (128 * q + 32 * t + 8 * c + 4 * (e // 2) + j, 4 * (e % 2) + 2 * h),
        1: (64 * q + 16 * t + 4 * c + j, 2 * e + h),
    }[width]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_formulas_say(bits: int, generator: torch.Generator) -> None:
    n, k = 128, 32
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    units = layout.pack(codes, bits, 16, False).view(torch.uint8).reshape(n // 64, k // 16, 128 * bits).tolist()
    for row in range(n):
        for col in range(k):
            unit, offset, code = units[row // 64][col // 16], 0, 0
            for width, shift in layout.PLANES[bits]:
                byte, at = place(width, row % 64, col % 16)
                code |= (unit[offset + byte] >> at & ((1 << width) - 1)) << shift
                offset += 128 * width
            assert code == codes[row, col], (row, col)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    bits=st.sampled_from(BITS),
    group=st.sampled_from([16, 32, 48, 64, 256]),
    two_level=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_unpack_is_the_inverse(n: int, k: int, bits: int, group: int, two_level: bool, seed: int) -> None:
    if two_level and 256 % group:
        group = 32
    codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = layout.pack(codes, bits, group, two_level)
    np, kp = layout.padded_n(n), layout.padded_k(k, group, two_level)
    assert packed.shape == (np, kp * bits // 8) and packed.dtype == torch.int8
    assert torch.equal(layout.unpack(packed, bits, n, k), codes)
    whole = layout.unpack(packed, bits, np, kp)
    assert not whole[n:].any() and not whole[:, k:].any()  # the padding is zero


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, k, group, two_level", [(64, 16, 16, False), (1, 1, 32, False), (150, 700, 32, True), (257, 333, 112, False)])
def test_the_kernels_pack_the_same_bytes(
    isa: Isa, bits: int, n: int, k: int, group: int, two_level: bool, generator: torch.Generator
) -> None:
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    packed = isa.ops.pack(codes, bits, group, two_level)
    assert torch.equal(packed, layout.pack(codes, bits, group, two_level))
    groups = layout.padded_k(k, group, two_level) // group
    scale = torch.ones(layout.padded_n(n) // 64, groups, 64, dtype=torch.int8 if two_level else torch.float16)
    block = torch.ones(scale.shape[0], groups * group // 256, 64, dtype=torch.float16) if two_level else None
    assert torch.equal(isa.ops.unpack(packed, scale, None, block, None, None, bits, group, n, k), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_groups(dtype: torch.dtype, generator: torch.Generator) -> None:
    values = torch.randint(1, 100, (70, 5), generator=generator).to(torch.uint8)
    values = values.view(dtype) if dtype.itemsize == 1 else values.to(dtype)
    packed = layout.pack_groups(values, 8)
    assert packed.shape == (2, 8, 64) and packed.dtype == dtype
    plain = packed.float()
    for row, group in ((0, 0), (63, 4), (64, 0), (69, 3)):  # csrc/layout.h: group_index
        assert plain.flatten()[(row // 64 * 8 + group) * 64 + row % 64] == values[row, group].float()
    raw = packed.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
    assert not raw[:, 5:].any() and not raw[1, :, 6:].any()  # zero bytes
    assert torch.equal(layout.unpack_groups(packed, 70, 5).float(), values.float())
