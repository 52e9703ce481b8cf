"""embedding in Triton: bitwise the rows of the dequantized table; NaN where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import LINEAR_SPECS, random_plain
from gpus import Gpu, triton_gpu
from test_cuda_embedding import (  # noqa: F401
    test_an_id_out_of_range_is_a_row_of_nan,
    test_every_row,
)

from qkernels.quant import QuantSpec


@pytest.fixture
def gpu() -> Gpu:
    return triton_gpu()


@pytest.mark.parametrize("name", LINEAR_SPECS)
def test_rows_of_the_table(gpu: Gpu, name: str, generator: torch.Generator) -> None:
    plain = random_plain(replace(LINEAR_SPECS[name], act_order=False), 150, 530, generator)
    args = gpu.to(plain.pack().op_args())
    ids = torch.tensor([0, 149, 64])
    got = gpu.ops.embedding(gpu.to(ids), *args, torch.bfloat16, 0.3)
    assert torch.equal(got.cpu(), (plain.dequantize()[ids] * 0.3).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("k", [16, 1100, 2048])
def test_number_of_columns_and_ids(
    gpu: Gpu, k: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    plain = random_plain(QuantSpec(4, 32, "int8", "minimum"), 70, k, generator)
    for count in (0, 1, 5):
        ids = torch.randint(0, 70, (count,), generator=generator)
        got = gpu.ops.embedding(gpu.to(ids), *gpu.to(plain.pack().op_args()), dtype, 1.0)
        assert torch.equal(got.cpu(), plain.dequantize()[ids].to(dtype))


def test_opcheck_and_compile(gpu: Gpu, generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(5, 32, zero="minimum"), 70, 48, generator)
    weight, ids = gpu.to(plain.pack().op_args()), gpu.to(torch.tensor([1, 69]))
    op = gpu.ops.embedding
    torch.library.opcheck(op.default, (ids, *weight, torch.bfloat16, 2.0))

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return op(ids, *weight, torch.float32, 1.0)

    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids).cpu(), plain.dequantize()[ids.cpu()])
