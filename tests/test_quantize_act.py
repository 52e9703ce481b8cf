"""quantize_act on every instruction set: bitwise the reference."""

from __future__ import annotations

import pytest
import torch

import qkernels as qk

REFERENCE = torch.ops.qkernels_reference
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(got, want):
    codes, scale, sums = got
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and sums.dtype == torch.int16
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert torch.equal(g.nan_to_num(-1.0), w.nan_to_num(-1.0)) if g.is_floating_point() else torch.equal(g, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64, 32), (1, 1, 16), (1, 576, 32), (3, 100, 48), (5, 1023, 16), (2, 5000, 5008), (65, 300, 128)])
def test_equals_the_reference(isa, dtype, shape, generator):
    m, k, group = shape
    x = (torch.randn(m, k, generator=generator) * 3).to(dtype)
    got = isa.ops.quantize_act(x, group)
    assert_same(got, REFERENCE.quantize_act(x, group))
    codes, _, sums = got
    kx = -(-k // group) * group
    assert codes.shape == (m, kx) and not codes[:, k:].any()
    assert torch.equal(sums.int(), codes.int().view(m, kx // 16, 16).sum(-1))


def test_ties_round_to_even(isa):
    """amax 127 makes the codes the rounded values themselves."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.4999998, 3.5000002, -127, 0, 0, 0, 0]])
    codes, scale, _ = isa.ops.quantize_act(x, 16)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, 3, 4, -127, 0, 0, 0, 0]]
    assert scale.item() == 1.0


def test_zero_tiny_huge_and_not_finite(isa):
    x = torch.zeros(8, 32)
    x[1, 3] = 2.0**-101
    x[2, 3] = 2.0**-100
    x[3] = 3.4e38
    x[4, 5] = torch.inf
    x[5, 31] = torch.nan
    x[6, 0], x[6, 1:] = torch.nan, 1.0  # the maximum of what follows must not hide it
    x[7] = -1.0
    codes, scale, sums = isa.ops.quantize_act(x, 32)
    assert_same((codes, scale, sums), REFERENCE.quantize_act(x, 32))
    assert scale[:2].tolist() == [[0.0], [0.0]] and scale[4:7].isnan().all()
    assert codes[2, 3] == 127 and (codes[3] == 127).all() and (codes[7] == -127).all()
    assert not codes[[0, 1, 4, 5, 6]].any() and not sums[[0, 1, 4, 5, 6]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_any_stride_apart(isa, dtype, generator):
    x = torch.randn(7, 200, generator=generator).to(dtype)
    assert_same(isa.ops.quantize_act(x[::2, 3:100], 32), isa.ops.quantize_act(x[::2, 3:100].contiguous(), 32))
    assert_same(isa.ops.quantize_act(x[:1].expand(4, 200), 32), isa.ops.quantize_act(x[:1].repeat(4, 1), 32))


def test_teams_agree(isa, with_threads, generator):
    x = torch.randn(33, 1000, generator=generator)
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        results.append(isa.ops.quantize_act(x, 32))
    for other in results[1:]:
        assert_same(other, results[0])


def test_bad_arguments_raise_alike():
    x = torch.randn(4, 64)
    cases = [
        ((x.double(), 32), "x must be float32, float16 or bfloat16, got float64"),
        ((x[0], 32), "x must have 2 dimensions"),
        ((x.T, 32), "x must be dense in its last dimension"),
        ((x[:, :0], 32), "x needs at least one column"),
        ((x, 24), "group must be a positive multiple of 16, got 24"),
        ((x, 0), "group must be a positive multiple of 16, got 0"),
    ]
    for (tensor, group), message in cases:
        for op in (torch.ops.qkernels.quantize_act, REFERENCE.quantize_act):
            with pytest.raises(RuntimeError, match=message):
                op(tensor, group)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qkernels.quantize_act(tensor.to("meta"), group)


def test_opcheck_and_compile(generator):
    x = torch.randn(5, 100, generator=generator)
    torch.library.opcheck(torch.ops.qkernels.quantize_act.default, (x, 48))
    compiled = torch.compile(lambda t: tuple(qk.ops.quantize_act(t, 32)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), qk.ops.quantize_act(x, 32))
