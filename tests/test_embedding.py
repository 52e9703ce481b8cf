"""embedding on every instruction set: bitwise the rows of the dequantized table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FORMATS, random_plain

import qkernels as qk
from qkernels.quant import QuantSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_the_table(isa, name, generator):
    plain = random_plain(replace(FORMATS[name].spec, act_order=False), 150, 530, generator)
    weight = plain.pack()
    ids = torch.tensor([0, 149, 63, 64, 64, 17, 128])
    for dtype in DTYPES:
        for multiplier in (1.0, 0.3):
            got = isa.ops.embedding(ids, *weight.op_args(), dtype, multiplier)
            assert torch.equal(got, (plain.dequantize()[ids] * multiplier).to(dtype))


@pytest.mark.parametrize("count", [0, 1, 3, 700])
def test_number_of_ids(isa, count, with_threads, generator):
    plain = random_plain(QuantSpec(4, 32), 70, 48, generator)
    ids = torch.randint(0, 70, (count,), generator=generator)
    for threads in (1, 3):
        with_threads(threads)
        got = isa.ops.embedding(ids, *plain.pack().op_args(), torch.float32, 1.0)
        assert torch.equal(got, plain.dequantize()[ids])


@pytest.mark.parametrize("bad", [-1, 70, 2**62, -(2**62)])
def test_an_id_out_of_range_is_named(isa, bad, generator):
    weight = random_plain(QuantSpec(4, 32), 70, 48, generator).pack()
    ids = torch.tensor([3, bad, 5])
    for ops in (isa.ops, torch.ops.qkernels_reference):
        with pytest.raises(RuntimeError, match=f"embedding: ids must be from 0 to 69, got {bad}$"):
            ops.embedding(ids, *weight.op_args(), torch.float32, 1.0)


def test_bad_arguments_raise_alike(generator):
    weight = random_plain(QuantSpec(4, 32), 70, 48, generator).pack().op_args()
    ids = torch.tensor([1, 2, 3, 4])
    cases = [
        ((ids.int(), *weight, torch.float32, 1.0), "ids must be int64, got int32"),
        ((ids[None], *weight, torch.float32, 1.0), "ids must be"),
        ((ids[::2], *weight, torch.float32, 1.0), "ids must be contiguous"),
        ((ids, *weight, torch.int8, 1.0), "dtype must be float32, float16 or bfloat16"),
    ]
    for args, message in cases:
        for namespace in ("qkernels", "qkernels_reference"):
            with pytest.raises(RuntimeError, match=message):
                getattr(torch.ops, namespace).embedding(*args)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qkernels.embedding(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))


def test_opcheck_and_compile(generator):
    plain = random_plain(QuantSpec(5, 32, zero="minimum"), 70, 48, generator)
    weight = plain.pack()
    ids = torch.tensor([[1, 69], [0, 1]])
    torch.library.opcheck(torch.ops.qkernels.embedding.default, (ids[0], *weight.op_args(), torch.bfloat16, 2.0))
    compiled = torch.compile(lambda i: qk.ops.embedding(i, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), plain.dequantize()[ids])
