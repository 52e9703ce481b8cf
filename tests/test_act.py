import pytest
import torch
from cases import random_x
from conftest import Isa
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(
            a.nan_to_num(7.0) if a.is_floating_point() else a,
            b.nan_to_num(7.0) if b.is_floating_point() else b,
        )
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, k, group",
    [
        (0, 64, 32),
        (1, 16, 16),
        (1, 1, 32),
        (3, 100, 32),
        (5, 576, 256),
        (33, 1000, 1008),
        (4, 4100, 4112),
    ],
)
def test_kernels_are_the_reference_bitwise(
    isa: Isa, m: int, k: int, group: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = random_x(m, k, dtype, generator)
    same(isa.ops.quantize_act(x, group), reference.quantize_act(x, group))


def test_values_at_the_edges(isa: Isa) -> None:
    """Ties go to even; the largest value gets 127; tiny, infinite and NaN groups are codes of 0."""
    x = torch.zeros(8, 32)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -127.0])
    x[1, 3] = torch.inf
    x[2, 5] = torch.nan
    x[3, 0] = 2.0**-101
    x[4, 0] = 2.0**-100
    x[5, :2] = torch.tensor([3.4028235e38, -3.4028235e38])
    x[6, 0], x[6, 31] = torch.nan, torch.inf
    x[7, :] = -0.0
    codes, scale, sums = isa.ops.quantize_act(x, 32)
    same((codes, scale, sums), reference.quantize_act(x, 32))
    assert codes[0, :6].tolist() == [127, 0, 2, 2, 0, -127] and scale[0] == 1
    assert scale[1].isnan() and scale[2].isnan() and scale[6].isnan() and not codes[[1, 2, 6]].any()
    assert scale[3] == 0 and codes[4, 0] == 127 and codes[5, 1] == -127
    assert sums[0].tolist() == [4, 0]


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(1, 5),
    k=st.integers(1, 300),
    group=st.sampled_from([16, 32, 80, 256]),
    seed=st.integers(0, 2**31),
)
def test_the_definition(m: int, k: int, group: int, seed: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    codes, scale, sums = reference.quantize_act(x, group)
    kx = codes.shape[1]
    assert kx % group == 0 and 0 <= kx - k < group and not codes[:, k:].any()
    assert torch.equal(sums.int(), codes.view(m, -1, 16).sum(2, dtype=torch.int32))
    assert int(codes.abs().max()) == 127
    back = codes.double().view(m, -1, group) * scale.double()[..., None]
    error = (back.view(m, kx)[:, :k] - x.double()).abs()
    assert (error <= scale.double().repeat_interleave(group, 1)[:, :k] * (0.5 + 1e-5)).all()


def test_rows_a_stride_apart(isa: Isa, generator: torch.Generator) -> None:
    x = random_x(6, 200, torch.float32, generator)[::2, 40:140]
    same(isa.ops.quantize_act(x, 32), reference.quantize_act(x.contiguous(), 32))


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference", "fake"])
def test_errors(namespace: str) -> None:
    op = getattr(torch.ops, "qkernels" if namespace == "fake" else namespace).quantize_act
    device = "meta" if namespace == "fake" else "cpu"
    for x, group, said in (
        (
            torch.zeros(4, 32, dtype=torch.float64),
            32,
            "x must be float32, float16 or bfloat16, got float64",
        ),
        (torch.zeros(32), 32, r"x must have 2 dimensions, got \[32\]"),
        (torch.zeros(4, 32), 24, "group must be a positive multiple of 16, got 24"),
        (torch.zeros(4, 32), 0, "group must be a positive multiple of 16, got 0"),
        (torch.zeros(4, 0), 32, "at least one column"),
        (torch.zeros(32, 4).t(), 32, "dense in its last dimension"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(x.to(device), group)


def test_a_gradient_is_refused() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="qkernels::quantize_act: has no backward"):
        ops.quantize_act(x, 32)
    with torch.no_grad():
        ops.quantize_act(x, 32)


@pytest.mark.parametrize("namespace", ["qkernels", "qkernels_reference"])
def test_opcheck(namespace: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops, namespace).quantize_act.default, (torch.randn(3, 100), 32)
    )


def test_compiles() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return ops.quantize_act(x, 32).codes

    x = torch.randn(3, 100)
    assert torch.equal(run(x), ops.quantize_act(x, 32).codes)
