"""attention and attention_dense refuse what they cannot compute, and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.ops.attention import attention, attention_dense

ARGUMENTS = ["q", "query_start", "kv_len", "page_table", "k_pages", "v_pages", "k_scale", "v_scale"]
SCORES = ["scale", "causal", "window", "softcap", "sinks", "alibi_slopes", "distance_bias"]
ARGUMENTS += SCORES
DENSE = ["q", "k", "v", "query_start", "kv_start", *SCORES]
PLAIN = [0.125, True, 0, 0.0, None, None, None]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Of both ops, with 4 heads of q.
BAD_BIAS: list[tuple[dict[str, Any], str]] = [
    ({"sinks": torch.zeros(4).half()}, "sinks must be float32, got float16"),
    ({"sinks": torch.zeros(2)}, r"sinks must be \[4\], got \[2\]"),
    ({"sinks": torch.zeros(8)[::2]}, "sinks must be contiguous"),
    ({"alibi_slopes": torch.zeros(4).double()}, "alibi_slopes must be float32, got float64"),
    ({"alibi_slopes": torch.zeros(1, 4)}, r"alibi_slopes must be \[4\], got \[1, 4\]"),
    ({"distance_bias": torch.zeros(4, 3).bfloat16()}, "distance_bias must be float32, got bfloat"),
    ({"distance_bias": torch.zeros(2, 3)}, r"distance_bias must be \[4, \*\], got \[2, 3\]"),
    ({"distance_bias": torch.zeros(4)}, r"distance_bias must be \[4, \*\], got \[4\]"),
    ({"distance_bias": torch.zeros(3, 4).t()}, "distance_bias must be contiguous"),
    (
        {"distance_bias": torch.zeros(4, 6)},
        r"distance_bias must have an odd number of columns, 2 reach \+ 1, got \[4, 6\]",
    ),
    (
        {"distance_bias": torch.zeros(4, 0)},
        r"distance_bias must have an odd number of columns, 2 reach \+ 1, got \[4, 0\]",
    ),
]
BAD_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(4, 64)}, "q must be .tokens, heads, head dim., got .4, 64."),
    ({"q": torch.zeros(4, 4, 24)}, "head dim must be a multiple of 16 up to 512, got 24"),
    ({"q": torch.zeros(4, 4, 1024)}, "head dim must be a multiple of 16 up to 512, got 1024"),
    ({"q": torch.zeros(4, 4, 0)}, "head dim must be"),
    (
        {"q": torch.zeros(4, 4, 32, dtype=torch.float64)},
        "q must be float32, float16 or bfloat16, got",
    ),
    ({"q": torch.zeros(4, 3, 32)}, r"heads of q \(3\) must be a multiple of the KV heads \(2\)"),
    ({"q": torch.zeros(4, 32, 4).transpose(1, 2)}, "q must be dense in its last 2 dimensions"),
    ({"k_pages": torch.zeros(6, 2, 24, 32)}, "page size must be a multiple of 16, got 24"),
    ({"k_pages": torch.zeros(6, 2, 0, 32)}, "page size must be a multiple of 16, got 0"),
    ({"k_pages": torch.zeros(6, 2, 16, 48)}, "k_pages must have 32 in the last dimension"),
    ({"k_pages": torch.zeros(6, 2, 16)}, "k_pages must be .pages, KV heads, page size, head dim."),
    (
        {"k_pages": torch.zeros(6, 2, 16, 32, dtype=torch.int8)},
        "k_pages must be float32, float16, bfloat16 or uint8",
    ),
    ({"k_pages": torch.zeros(6, 2, 32, 16).transpose(2, 3)}, "k_pages must be dense in its last 3"),
    ({"v_pages": torch.zeros(6, 2, 16, 32).half()}, "v_pages must be"),
    ({"v_pages": torch.zeros(5, 2, 16, 32)}, "v_pages must be .6, 2, 16, 32., got .5, 2, 16, 32."),
    ({"v_pages": torch.zeros(12, 2, 16, 32)[::2]}, "same stride between pages"),
    ({"k_scale": torch.zeros(6, 2, 2, 16).half()}, "k_scale and v_scale belong to uint8 pages"),
    ({"query_start": torch.tensor([0, 1, 4])}, "query_start must be int32|query_start must be Int"),
    ({"query_start": torch.zeros(0, dtype=torch.int32)}, "query_start must be .sequences . 1."),
    ({"kv_len": ints(3)}, r"kv_len must be \[2\], got \[1\]"),
    ({"page_table": ints(1, 2)}, "page_table must be"),
    ({"page_table": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}, "page_table must be contiguous"),
    ({"window": -1}, "window must be 0 .off. or positive, got -1"),
    ({"softcap": -1.0}, "softcap must be 0 .off. or positive, got -1"),
    ({"softcap": float("nan")}, "softcap must be"),
    ({"scale": float("nan")}, "scale must be a number"),
    *BAD_BIAS,
]
BAD_CONTENTS: list[tuple[dict[str, Any], str]] = [
    ({"query_start": ints(0, 5, 4)}, "query_start must not fall"),
    ({"query_start": ints(0, -1, 4)}, "query_start must not fall"),
    ({"query_start": ints(0, 1, 3)}, "query_start must run from 0 to 4, got 0 to 3"),
    ({"query_start": ints(1, 1, 4)}, "query_start must run from 0 to 4, got 1 to 4"),
    ({"kv_len": ints(20, 2)}, r"kv_len\[1\] must count the 3 new tokens too, got 2"),
    ({"kv_len": ints(-1, 3)}, r"kv_len\[0\] must count the 1 new tokens too, got -1"),
    ({"kv_len": ints(33, 3)}, r"page_table has 2 pages per sequence, but kv_len\[0\] = 33 needs 3"),
    ({"kv_len": ints(2**31 - 1, 3)}, "page_table has 2 pages per sequence"),
    (
        {"page_table": ints(0, 6, 1, 0).view(2, 2)},
        r"page_table\[0, 1\] must be a page in \[0, 6\), got 6",
    ),
    (
        {"page_table": ints(0, 1, -1, 0).view(2, 2)},
        r"page_table\[1, 0\] must be a page in \[0, 6\), got -1",
    ),
]


def good() -> dict[str, Any]:
    pages = torch.zeros(6, 2, 16, 32)
    values = [
        torch.zeros(4, 4, 32),
        ints(0, 1, 4),
        ints(20, 3),
        ints(0, 1, 2, 3).view(2, 2),
        pages,
        pages.clone(),
    ]
    return dict(zip(ARGUMENTS, [*values, None, None, *PLAIN], strict=True))


def meta(value: Any) -> Any:
    return (
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if torch.is_tensor(value)
        else value
    )


@pytest.mark.parametrize("change, message", BAD_METADATA, ids=[m for _, m in BAD_METADATA])
def test_bad_metadata(change: dict[str, Any], message: str) -> None:
    args = list((good() | change).values())
    for namespace in (torch.ops.qkernels, torch.ops.qkernels_reference):
        with pytest.raises(RuntimeError, match="qkernels::attention: .*(" + message + ")"):
            namespace.attention(*args)
    with pytest.raises(RuntimeError, match="qkernels::attention: .*(" + message + ")"):
        torch.ops.qkernels.attention(*map(meta, args))


@pytest.mark.parametrize("change, message", BAD_CONTENTS, ids=[m for _, m in BAD_CONTENTS])
def test_bad_contents(change: dict[str, Any], message: str) -> None:
    args = list((good() | change).values())
    for namespace in (torch.ops.qkernels, torch.ops.qkernels_reference):
        with pytest.raises(RuntimeError, match="qkernels::attention: " + message):
            namespace.attention(*args)


def test_good_is_good() -> None:
    """The cases above fail for what they change."""
    args = list(good().values())
    for namespace in (torch.ops.qkernels, torch.ops.qkernels_reference):
        assert (namespace.attention(*args) == 0).all()
    assert torch.ops.qkernels.attention(*map(meta, args)).shape == (4, 4, 32)


def test_bad_scales() -> None:
    codes = torch.zeros(6, 2, 16, 32, dtype=torch.uint8)
    scale = torch.zeros(6, 2, 2, 16, dtype=torch.float16)
    for change, message in (
        ({}, "uint8 pages need k_scale and v_scale"),
        ({"k_scale": scale}, "uint8 pages need k_scale and v_scale"),
        ({"k_scale": scale.float(), "v_scale": scale}, "k_scale must be float16, got float32"),
        (
            {"k_scale": scale, "v_scale": scale[:, :, :1]},
            r"v_scale must be \[6, 2, 2, 16\], got \[6, 2, 1, 16\]",
        ),
        ({"k_scale": scale, "v_scale": scale.repeat(2, 1, 1, 1)[::2]}, "same stride between pages"),
    ):
        args = list((good() | {"k_pages": codes, "v_pages": codes.clone()} | change).values())
        for call in (torch.ops.qkernels.attention, torch.ops.qkernels_reference.attention):
            with pytest.raises(RuntimeError, match=message):
                call(*args)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.qkernels.attention(*map(meta, args))


BAD_DENSE: list[tuple[dict[str, Any], str, bool]] = [
    ({"k": torch.zeros(9, 2, 16)}, r"k must be \[9, 2, 32\], got \[9, 2, 16\]", True),
    ({"v": torch.zeros(8, 2, 32)}, r"v must be \[9, 2, 32\], got \[8, 2, 32\]", True),
    ({"v": torch.zeros(9, 2, 32).half()}, "v must be .* like q", True),
    (
        {"k": torch.zeros(9, 32, 2).transpose(1, 2)},
        "k must be dense in its last 2 dimensions",
        True,
    ),
    ({"kv_start": ints(0, 9)}, r"kv_start must be \[3\] like query_start, got \[2\]", True),
    ({"window": -3}, "window must be", True),
    ({"kv_start": ints(0, 5, 8)}, "kv_start must run from 0 to 9, got 0 to 8", False),
    ({"kv_start": ints(0, 10, 9)}, "kv_start must not fall", False),
    *((change, message, True) for change, message in BAD_BIAS),
]


@pytest.mark.parametrize("change, message, metadata", BAD_DENSE, ids=[m for _, m, _ in BAD_DENSE])
def test_bad_dense(change: dict[str, Any], message: str, metadata: bool) -> None:
    tensors = [
        torch.zeros(4, 4, 32),
        torch.zeros(9, 2, 32),
        torch.zeros(9, 2, 32),
        ints(0, 1, 4),
        ints(0, 5, 9),
    ]
    fine = dict(zip(DENSE, [*tensors, *PLAIN], strict=True))
    args = list((fine | change).values())
    for namespace in (torch.ops.qkernels, torch.ops.qkernels_reference):
        namespace.attention_dense(*fine.values())
        with pytest.raises(RuntimeError, match="qkernels::attention_dense: " + message):
            namespace.attention_dense(*args)
    if metadata:
        with pytest.raises(RuntimeError, match="qkernels::attention_dense: " + message):
            torch.ops.qkernels.attention_dense(*map(meta, args))


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "distance_bias"])
def test_biases_are_where_q_is(name: str) -> None:
    """Also where q is on a device, whose index tensors are not read."""
    bias = {name: torch.zeros(4, 1) if name == "distance_bias" else torch.zeros(4)}
    paged = list((good() | bias).values())
    dense = [torch.zeros(4, 4, 32), *[torch.zeros(9, 2, 32)] * 2, ints(0, 1, 4), ints(0, 5, 9)]
    at = ARGUMENTS.index(name)
    for op, args in (
        ("attention", [*map(meta, paged[:at]), bias[name]]),
        ("attention_dense", [*map(meta, [*dense, *paged[8:at]]), bias[name]]),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: {name} is on cpu, but q is on meta"):
            getattr(torch.ops.qkernels, op)(*args)


def test_a_gradient_is_refused() -> None:
    """Also where only a residual beside it would have one: half a gradient is a wrong one."""
    q, start = torch.randn(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    for which in range(3):
        qkv = [q.clone().requires_grad_(i == which) for i in range(3)]
        with pytest.raises(RuntimeError, match="qkernels::attention_dense: has no backward"):
            attention_dense(*qkv, start, start)
        with torch.no_grad():
            attention_dense(*qkv, start, start)
    for name, shape in (("sinks", (2,)), ("alibi_slopes", (2,)), ("distance_bias", (2, 3))):
        bias = {name: torch.zeros(shape, requires_grad=True)}
        with pytest.raises(RuntimeError, match="qkernels::attention_dense: has no backward"):
            attention_dense(q, q, q, start, start, **bias)
        paged = list(good().values())[:8]
        with pytest.raises(RuntimeError, match="qkernels::attention: has no backward"):
            attention(*paged, **bias)


@pytest.mark.parametrize("shape", [(), (4, 2, 0)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_queries_without_columns(shape: tuple[int, ...], device: str) -> None:
    q = torch.zeros(shape, device=device)
    start = torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="qkernels::attention_dense: "):
        attention_dense(q, q, q, start, start)
