"""append_attention is kv_append and attention, bit for bit, whoever computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import make_bias
from gpus import Gpu, triton_gpu
from test_kv_append import (
    BAD,
    KINDS,
    RAGGED,
    SHAPES,
    check_refusal,
    clone,
    fine_arguments,
    make_case,
)

from qkernels.ops.attention import append_attention, attention, kv_append

REFERENCE = torch.ops.qkernels_reference
PLAIN: tuple[Any, ...] = (0.125, True, 0, 0.0)
# scale, causal, window, softcap
OPTIONS = [PLAIN, (0.3, False, 0, 0.0), (0.125, True, 7, 20.0)]
BIASES = ["sinks", "alibi_slopes", "distance_bias"]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


def check(
    ops: Any, args: list[Any], options: tuple[Any, ...], bias: tuple[Any, ...] = ()
) -> torch.Tensor:
    """Runs the one and the two on copies of the same pages; whole pages are compared."""
    ours, theirs = clone(args), clone(args)
    out = ops.append_attention(*ours, *options, *bias)
    rotated = ops.kv_append(*theirs)
    assert torch.equal(out, ops.attention(rotated, *theirs[5:], *options, *bias))
    assert out.is_contiguous()
    for a, b, before in zip(ours, theirs, args, strict=True):
        assert a is None or torch.equal(a, b)
        assert a is None or a.dim() == 4 or torch.equal(a, before)
    assert any(not torch.equal(a, b) for a, b in zip(ours[8:10], args[8:10], strict=True))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_two_ops(isa: Any, kind: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rope in (True, False):
            check(isa.ops, make_case(kind, shape, RAGGED, dtype, rope=rope), PLAIN)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", ["none", *BIASES])
def test_with_the_options_of_attention(isa: Any, options: tuple[Any, ...], bias: str) -> None:
    made = {} if bias == "none" else make_bias(bias, 9, 5)
    args = make_case("int8", SHAPES[0], RAGGED)
    plain = check(isa.ops, args, options)
    if made:
        out = check(isa.ops, args, options, tuple(made.get(name) for name in BIASES))
        assert not torch.equal(out, plain)


def test_is_near_the_reference() -> None:
    args = make_case("int8", SHAPES[0], RAGGED)
    args[4] = torch.arange(args[0].shape[0], dtype=torch.int32)
    theirs = clone(args)
    out = append_attention(*args, scale=0.125)
    torch.testing.assert_close(out, REFERENCE.append_attention(*theirs, *PLAIN))
    assert torch.equal(args[8], theirs[8])


def test_the_scale_is_that_of_attention() -> None:
    args = make_case("float16", SHAPES[1], RAGGED)
    theirs = clone(args)
    expected = attention(kv_append(*theirs), *theirs[5:])
    assert torch.equal(append_attention(*args), expected)


def test_strided_inputs(isa: Any) -> None:
    args = make_case("int4", SHAPES[0], RAGGED)
    expected = check(isa.ops, args, PLAIN)
    args[:3] = torch.cat(args[:3], dim=1).split([9, 3, 3], dim=1)
    assert torch.equal(isa.ops.append_attention(*args, *PLAIN), expected)


# ---- other backends ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:2]:
        for rope in (True, False):
            args = make_case(kind, shape, [(1, 1), (1, 100), (9, 33)], dtype, rope=rope)
            check(gpu.ops, gpu.to(args), PLAIN)


def test_on_a_gpu_with_options(gpu: Gpu) -> None:
    bias = gpu.to(make_bias("sinks", 9, 0)["sinks"])
    args = gpu.to(make_case("int8", SHAPES[0], [(1, 30)], torch.float16))
    check(gpu.ops, args, (0.125, True, 7, 20.0), (bias,))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_in_triton(kind: str) -> None:
    gpu = triton_gpu()
    args = gpu.to(make_case(kind, SHAPES[1], [(1, 1), (2, 20)], torch.bfloat16))
    check(gpu.ops, args, (0.125, True, 7, 0.0))
    torch.library.opcheck(gpu.ops.append_attention.default, (*args, *PLAIN))


# ---- as a torch op ----


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_opcheck(kind: str) -> None:
    args = make_case(kind, SHAPES[0], RAGGED)
    torch.library.opcheck(torch.ops.qkernels.append_attention.default, (*args, *PLAIN))


def test_compiles() -> None:
    args = make_case("int8", SHAPES[0], RAGGED)
    eager = clone(args)
    out = torch.compile(append_attention, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(out, append_attention(*eager))
    assert all(torch.equal(a, b) for a, b in zip(args[8:], eager[8:], strict=True))


def test_nothing_to_do(isa: Any) -> None:
    for ragged in ([], [(0, 0)], [(0, 5)]):
        args = make_case("int8", SHAPES[0], ragged)
        before = clone(args)
        assert isa.ops.append_attention(*args, *PLAIN).shape == (0, 9, 64)
        assert all(torch.equal(a, b) for a, b in zip(args[8:], before[8:], strict=True))


def test_has_no_backward() -> None:
    args = make_case("float32", SHAPES[0], RAGGED)
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="append_attention: "):
        append_attention(*args)


# ---- bad input ----

SCORES = ["scale", "causal", "window", "softcap", *BIASES]
ITS_OWN: list[tuple[dict[str, Any], str, bool]] = [
    ({"scale": float("nan")}, "scale must be a number", True),
    ({"window": -1}, "window must be 0 .off. or positive, got -1", True),
    ({"softcap": -1.0}, "softcap must be 0 .off. or positive", True),
    ({"sinks": torch.zeros(3)}, r"sinks must be \[4\], got \[3\]", True),
    ({"distance_bias": torch.zeros(4, 4)}, "distance_bias must have an odd number", True),
]


@pytest.mark.parametrize("change, message, metadata", [*BAD, *ITS_OWN], ids=str)
def test_bad_input(change: dict[str, Any], message: str, metadata: bool) -> None:
    """Refused before anything is written, whichever of the two it is about."""
    fine = fine_arguments() | dict(zip(SCORES, [*PLAIN, None, None, None], strict=True))
    check_refusal("append_attention", fine, change, message, metadata)
