"""embedding on CUDA: bitwise the rows of the dequantized table; NaN where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FORMATS, random_plain
from gpus import Gpu
from test_embedding import DTYPES

from qkernels.quant import QuantSpec


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [528, 530])
def test_rows_of_the_table(gpu: Gpu, name: str, k: int, generator: torch.Generator) -> None:
    plain = random_plain(replace(FORMATS[name].spec, act_order=False), 150, k, generator)
    args = gpu.to(plain.pack().op_args())
    ids = torch.tensor([0, 149, 63, 64, 64, 17, 128, 35])
    for dtype in DTYPES:
        for multiplier in (1.0, 0.3):
            got = gpu.ops.embedding(gpu.to(ids), *args, dtype, multiplier)
            assert torch.equal(got.cpu(), (plain.dequantize()[ids] * multiplier).to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_row(gpu: Gpu, bits: int, generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(bits, 16), 64, 32, generator)
    ids = torch.randperm(64, generator=generator)
    got = gpu.ops.embedding(gpu.to(ids), *gpu.to(plain.pack().op_args()), torch.float32, 1.0)
    assert torch.equal(got.cpu(), plain.dequantize()[ids])


@pytest.mark.parametrize("count", [0, 1, 3, 700])
def test_number_of_ids(gpu: Gpu, count: int, generator: torch.Generator) -> None:
    plain = random_plain(QuantSpec(4, 32), 70, 48, generator)
    ids = torch.randint(0, 70, (count,), generator=generator)
    got = gpu.ops.embedding(gpu.to(ids), *gpu.to(plain.pack().op_args()), torch.float32, 1.0)
    assert torch.equal(got.cpu(), plain.dequantize()[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_id_out_of_range_is_a_row_of_nan(
    gpu: Gpu, dtype: torch.dtype, generator: torch.Generator
) -> None:
    plain = random_plain(QuantSpec(4, 32), 70, 50, generator)
    ids = torch.tensor([3, -1, 69, 70, 2**62, -(2**62), 127, 5])
    got = gpu.ops.embedding(gpu.to(ids), *gpu.to(plain.pack().op_args()), dtype, 2.0).cpu()
    inside = (ids >= 0) & (ids < 70)
    assert got[~inside].isnan().all()
    assert torch.equal(got[inside], (plain.dequantize()[ids[inside]] * 2).to(dtype))
