"""quantize_act's CUDA kernels: bitwise the reference, whichever launch_quantize picks."""

from __future__ import annotations

import pytest
import torch
from gpus import Gpu
from test_quantize_act import DTYPES, REFERENCE, assert_same

# (M, K, group). In turn: whole groups in a warp (lanes a power of two, and not), a block per group
# of 1, 2 and 32 warps, and a warp per group where rows are not aligned or groups longer still.
SHAPES = [
    (0, 64, 32),
    (1, 16, 16),
    (3, 576, 32),
    (9, 640, 16),
    (70, 264, 128),
    (5, 416, 256),
    (7, 528, 48),
    (2, 480, 240),
    (3, 504, 512),
    (2, 4096, 1024),
    (1, 4096, 4096),
    (2, 1056, 528),
    (1, 16320, 16384),
    (1, 17000, 32768),
    (1, 1, 16),
    (3, 100, 48),
    (5, 1023, 16),
    (2, 999, 1008),
    (1, 40, 32784),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(
    gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    m, k, group = shape
    x = (torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator)).to(dtype)
    got = [t.cpu() for t in gpu.ops.quantize_act(gpu.to(x), group)]
    assert_same(got, REFERENCE.quantize_act(x, group))
    assert not got[0][:, k:].any()


def test_the_largest_may_be_anywhere_in_its_group(gpu: Gpu) -> None:
    """Each row has another largest value per group, which every lane of the group must hear of."""
    for group, k in ((48, 192), (64, 128), (1024, 1024), (48, 191)):
        places = range(0, group, 1 if group < 100 else 37)
        x = torch.ones(len(places), k)
        for row, place in enumerate(places):
            x[row, place::group] = -7.0
        got = [t.cpu() for t in gpu.ops.quantize_act(gpu.to(x), group)]
        assert_same(got, REFERENCE.quantize_act(x, group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [48, 272, 4112])
def test_a_group_does_not_see_the_next_one(gpu: Gpu, group: int, dtype: torch.dtype) -> None:
    """Whose values are larger, also where threads are left over."""
    x = torch.linspace(-1, 1, group).repeat(2, 3)
    x[:, group : 2 * group] *= 100
    x[:, 2 * group :] *= 3000
    want = REFERENCE.quantize_act(x.to(dtype), group)
    for one, other in zip(gpu.ops.quantize_act(gpu.to(x.to(dtype)), group), want, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("group", [32, 48, 1024])
def test_zero_tiny_huge_and_not_finite(gpu: Gpu, group: int) -> None:
    x = torch.zeros(8, group)
    x[1, 3] = 2.0**-101
    x[2, 3] = 2.0**-100
    x[3] = 3.4e38
    x[4, 5] = torch.inf
    x[5, 31] = torch.nan
    x[6, 0], x[6, 1:] = torch.nan, 1.0
    x[7] = -1.0
    got = [t.cpu() for t in gpu.ops.quantize_act(gpu.to(x), group)]
    assert_same(got, REFERENCE.quantize_act(x, group))


def test_ties_round_to_even(gpu: Gpu) -> None:
    values = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.4999998, 3.5000002, -127]
    x = torch.tensor([values + [0.0] * 4])
    codes, scale, _ = gpu.ops.quantize_act(gpu.to(x), 16)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 3, 4, -127, 0, 0, 0, 0]]
    assert scale.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_any_stride_apart(
    gpu: Gpu, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(8, 336, generator=generator).to(dtype)
    device = gpu.to(x)
    views = [
        (slice(None, None, 2), slice(16, 272)),  # aligned
        (slice(None, None, 2), slice(3, 259)),  # only the rows' starts are not
        (slice(None), slice(0, 255)),
    ]
    for group in (32, 256, 512):
        for rows, columns in views:
            got = [t.cpu() for t in gpu.ops.quantize_act(device[rows, columns], group)]
            assert_same(got, REFERENCE.quantize_act(x[rows, columns], group))
    got = [t.cpu() for t in gpu.ops.quantize_act(device[:1].expand(4, 336), 48)]
    assert_same(got, REFERENCE.quantize_act(x[:1].repeat(4, 1), 48))
    odd = torch.randn(4, 65, generator=generator).to(dtype)  # an odd stride of aligned columns
    got = [t.cpu() for t in gpu.ops.quantize_act(gpu.to(odd)[:, :64], 32)]
    assert_same(got, REFERENCE.quantize_act(odd[:, :64], 32))


def test_bad_arguments(gpu: Gpu) -> None:
    x = gpu.to(torch.randn(4, 64))
    with pytest.raises(RuntimeError, match="quantize_act: x must be dense in its last dimension"):
        gpu.ops.quantize_act(x.T, 32)
    with pytest.raises(RuntimeError, match="group must be a positive multiple of 16, got 24"):
        gpu.ops.quantize_act(x, 24)
