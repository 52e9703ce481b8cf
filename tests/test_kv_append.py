"""kv_append: rotation, quantization and placement, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels.cache import KV_DTYPES
from qkernels.ops.attention import attention, kv_append
from qkernels.ops.rope import rope_table
from qkernels.reference.attention import pack_nibbles, unpack_nibbles

EPS = torch.finfo(torch.float32).eps
KINDS = list(KV_DTYPES)
REFERENCE = torch.ops.qkernels_reference
# (query heads, KV heads, head dim, page size, rotary dim)
SHAPES = [
    (9, 3, 64, 64, 64),
    (4, 4, 80, 16, 20),
    (2, 1, 128, 48, 128),
    (2, 2, 16, 16, 6),
    (1, 1, 512, 32, 256),
]
RAGGED = [(1, 1), (1, 100), (70, 70), (9, 33), (0, 20)]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_case(
    kind: str,
    shape: tuple[int, ...],
    ragged: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    *,
    rope: bool = True,
    seed: int = 0,
) -> list[Any]:
    """The arguments of kv_append; pages and scales hold a pattern, so that a stray write shows."""
    g = torch.Generator().manual_seed(seed)
    q_heads, kv_heads, dim, page, rotary = shape
    kv = KV_DTYPES[kind]
    used = [-(-length // page) for _, length in ragged]
    pages = sum(used) + 2
    order = torch.randperm(pages, generator=g).tolist()
    table = torch.full((len(ragged), max([*used, 1])), -7, dtype=torch.int32)
    for b, count in enumerate(used):
        for i in range(count):
            table[b, i] = order.pop()
    stored = dim // 2 if kind == "int4" else dim
    pattern = torch.randint(1, 200, (2, pages, kv_heads, page, stored), generator=g).to(
        kv.torch_dtype
    )
    scales = torch.randint(1, 200, (2, pages, kv_heads, 2, page), generator=g).half()
    counts = torch.tensor([0, *(count for count, _ in ragged)])
    tokens = int(counts.sum())
    q, k, v = (
        torch.randn(tokens, h, dim, generator=g).to(dtype) for h in (q_heads, kv_heads, kv_heads)
    )
    return [
        q,
        k,
        v * 3,
        rope_table(rotary, 128) if rope else None,
        None,
        counts.cumsum(0).int(),
        ints(*(length for _, length in ragged)),
        table,
        *pattern.clone(),
        *(scales.clone() if kv.scaled else (None, None)),
    ]


def clone(args: list[Any]) -> list[Any]:
    return [a.clone() if torch.is_tensor(a) else a for a in args]


def places(args: list[Any]) -> tuple[Tensor, Tensor]:
    """(page, slot) of every new token."""
    start, lengths, table, page = args[5].tolist(), args[6].tolist(), args[7], args[8].shape[2]
    where = []
    for b, length in enumerate(lengths):
        new = start[b + 1] - start[b]
        where += [(int(table[b, t // page]), t % page) for t in range(length - new, length)]
    both = torch.tensor(where, dtype=torch.long).view(-1, 2)
    return both[:, 0], both[:, 1]


def stored(args: list[Any], which: int) -> tuple[Tensor, Tensor]:
    """What pages `which` (0: k, 1: v) hold of the new tokens, [T, Hkv, D] float64, and the step [T,
    Hkv, 1] (0: floats)."""
    page, slot = places(args)
    pages, scales, dim = args[8 + which], args[10 + which], args[0].shape[2]
    rows = pages[page, :, slot]
    if scales is None:
        return rows.double(), torch.zeros(*rows.shape[:2], 1, dtype=torch.float64)
    if rows.shape[-1] != dim:
        byte = rows.reshape(*rows.shape[:2], dim // 16, 1, 8)
        rows = torch.cat((byte & 15, byte >> 4), dim=3).flatten(2)
    step, zero = scales[page, :, :, slot].double().unbind(-1)
    return step[..., None] * (rows.double() - zero[..., None]), step[..., None]


def rotated(x: Tensor, args: list[Any], positions: Tensor) -> Tensor:
    """As complex numbers, in float64."""
    table = args[3].double()[positions.long()]
    half = table.shape[1] // 2
    turn = torch.complex(table[:, :half], table[:, half:])[:, None]
    x = x.double()
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), dim=-1)


def positions_of(args: list[Any]) -> Tensor:
    start, lengths = args[5].tolist(), args[6].tolist()
    return torch.cat(
        [
            torch.arange(length - (start[b + 1] - start[b]), length)
            for b, length in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rotates_and_stores(isa: Any, kind: str, shape: tuple[int, ...]) -> None:
    args = make_case(kind, shape, RAGGED)
    out = isa.ops.kv_append(*args)
    where = positions_of(args)
    assert out.is_contiguous()
    for got, x in ((out, args[0]), (stored(args, 0)[0], args[1]), (stored(args, 1)[0], args[2])):
        truth = x.double() if x is args[2] else rotated(x, args, where)
        error = (got.double() - truth).abs()
        bound = 2 * EPS * x.abs().amax(-1, keepdim=True).double()
        if got is not out:
            kv = KV_DTYPES[kind]
            if kv.scaled:  # half a step from the code, as much from the zero point
                bound = bound + stored(args, 0 if x is args[1] else 1)[1] * (1 + 1e-3)
            else:
                bound = bound + torch.finfo(kv.torch_dtype).eps / 2 * truth.abs()
        assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_rotation_equals_the_reference_bitwise(
    isa: Any, kind: str, dtype: torch.dtype
) -> None:
    args = make_case(kind, SHAPES[0], RAGGED, dtype, rope=False)
    expected = clone(args)
    out, reference_out = isa.ops.kv_append(*args), REFERENCE.kv_append(*expected)
    assert torch.equal(out, reference_out) and torch.equal(out, args[0])
    for ours, theirs in zip(args[8:], expected[8:], strict=True):
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_nothing_else(isa: Any, kind: str) -> None:
    args = make_case(kind, SHAPES[1], RAGGED)
    before = clone(args)
    isa.ops.kv_append(*args)
    page, slot = places(args)
    for i in range(8, 12):
        if args[i] is None:
            continue
        new = torch.zeros(args[i].shape, dtype=torch.bool)
        if i < 10:
            new[page, :, slot] = True
        else:
            new[page, :, :, slot] = True
        assert torch.equal(args[i][~new], before[i][~new])
        assert not torch.equal(args[i][new], before[i][new])
    for i in range(8):
        assert args[i] is None or torch.equal(args[i], before[i])


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_is_all_at_once(isa: Any, kind: str) -> None:
    args = make_case(kind, SHAPES[0], [(40, 40)])
    pieces = clone(args)
    whole = isa.ops.kv_append(*args)
    for t in range(40):
        one = [x[t : t + 1] for x in pieces[:3]]
        out = isa.ops.kv_append(*one, pieces[3], None, ints(0, 1), ints(t + 1), *pieces[7:])
        assert torch.equal(out[0], whole[t])
    for ours, theirs in zip(args[8:], pieces[8:], strict=True):
        assert ours is None or torch.equal(ours, theirs)


def test_positions(isa: Any) -> None:
    args = make_case("float32", SHAPES[1], RAGGED)
    args[4] = torch.randint(0, 128, (args[0].shape[0],), dtype=torch.int32)
    out = isa.ops.kv_append(*args)
    for got, x in ((out, args[0]), (stored(args, 0)[0], args[1])):
        bound = 2 * EPS * x.abs().amax(-1, keepdim=True)
        assert ((got.double() - rotated(x, args, args[4])).abs() <= bound).all()


def test_strided_inputs_and_layers(isa: Any) -> None:
    args = make_case("int4", SHAPES[0], RAGGED)
    plain = clone(args)
    expected = isa.ops.kv_append(*plain)
    fused = torch.cat(args[:3], dim=1)
    args[:3] = fused.split([9, 3, 3], dim=1)
    pools = [torch.stack((t, t), dim=1) for t in args[8:]]
    args[8:] = [pool[:, 1] for pool in pools]
    assert not args[1].is_contiguous() and not args[8].is_contiguous()
    assert torch.equal(isa.ops.kv_append(*args), expected)
    for ours, theirs in zip(args[8:], plain[8:], strict=True):
        assert torch.equal(ours, theirs)


def test_bits_do_not_depend_on_threads(isa: Any, with_threads: Callable[[int], None]) -> None:
    args = make_case("int8", SHAPES[0], RAGGED)
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        mine = clone(args)
        results.append([isa.ops.kv_append(*mine), *mine[8:]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- quantization ----

ROWS = {
    "zeros": torch.zeros(64),
    "all equal": torch.full((64,), 3.7),
    "all equal, negative": torch.full((64,), -1e-3),
    "positive": torch.linspace(2, 3, 64),
    "negative": torch.linspace(-9, -8, 64),
    "one large": torch.cat((torch.tensor([1000.0]), torch.linspace(-1, 1, 63))),
    "tiny": torch.linspace(-1e-6, 1e-6, 64),
    "below the smallest scale": torch.linspace(-1e-30, 1e-30, 64),
    "wide": torch.linspace(-4e5, 4e5, 64),
}


def append_rows(namespace: Any, kind: str, v: Tensor) -> list[Any]:
    args = make_case(kind, (1, 1, v.shape[1], 16, 2), [(len(v), len(v))], rope=False)
    args[1], args[2] = v[:, None].clone(), v[:, None].clone()
    namespace.kv_append(*args)
    return args


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_hard_rows(isa: Any, kind: str) -> None:
    v = torch.stack(list(ROWS.values()))
    args, expected = append_rows(isa.ops, kind, v), append_rows(REFERENCE, kind, v)
    assert all(torch.equal(a, b) for a, b in zip(args[8:], expected[8:], strict=True))
    back, step = stored(args, 1)
    levels = 2 ** KV_DTYPES[kind].bits - 1
    for i, name in enumerate(ROWS):
        exact_step = (v[i].max().clamp(min=0) - v[i].min().clamp(max=0)).item() / levels
        # fp16 rounds up by at most a part in 1024, or by one smallest subnormal.
        assert exact_step <= step[i] <= exact_step * (1 + 2**-10) + 2**-24, name
        assert ((back[i, 0] - v[i].double()).abs() <= step[i, 0] * (1 + 1e-6)).all(), name
    assert (back[0] == 0).all() and step[0] == 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_rows_that_cannot_be_held_read_back_as_nan(isa: Any, kind: str, bad: float) -> None:
    v = torch.randn(3, 64)
    v[1, 37] = bad
    args, expected = append_rows(isa.ops, kind, v), append_rows(REFERENCE, kind, v)
    back, _ = stored(args, 1)
    assert back[1].isnan().all() and not back[[0, 2]].isnan().any()
    for ours, theirs in zip(args[8:], expected[8:], strict=True):
        assert torch.equal(ours.float().nan_to_num(-1), theirs.float().nan_to_num(-1))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=32, max_size=32),
    st.sampled_from(["int8", "int4"]),
)
def test_quantization_property(values: list[float], kind: str) -> None:
    v = torch.tensor([values])
    args, expected = append_rows(torch.ops.qkernels, kind, v), append_rows(REFERENCE, kind, v)
    assert all(torch.equal(a, b) for a, b in zip(args[8:], expected[8:], strict=True))
    back, step = stored(args, 1)
    assert ((back[0, 0] - v[0].double()).abs() <= step[0, 0] * (1 + 1e-6)).all()


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_nibbles_round_trip(raw: bytes) -> None:
    packed = torch.tensor(list(raw), dtype=torch.uint8)
    codes = unpack_nibbles(packed)
    assert torch.equal(pack_nibbles(codes), packed)
    for c in range(4):
        for i in range(8):
            assert int(codes[16 * c + i]) == raw[8 * c + i] & 15
            assert int(codes[16 * c + 8 + i]) == raw[8 * c + i] >> 4


# ---- as a torch op ----


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_opcheck(kind: str) -> None:
    torch.library.opcheck(
        torch.ops.qkernels.kv_append.default, tuple(make_case(kind, SHAPES[0], RAGGED))
    )


def test_compiles() -> None:
    args = make_case("int8", SHAPES[0], RAGGED)
    eager = clone(args)

    def step(*a: Any) -> Tensor:
        q = kv_append(*a)
        return attention(q, *a[5:])

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(out, step(*eager))
    assert all(torch.equal(a, b) for a, b in zip(args[8:], eager[8:], strict=True))


def test_nothing_to_do(isa: Any) -> None:
    for ragged in ([], [(0, 0)], [(0, 5)]):
        args = make_case("int8", SHAPES[0], ragged)
        before = clone(args)
        assert isa.ops.kv_append(*args).shape == (0, 9, 64)
        assert all(torch.equal(a, b) for a, b in zip(args[8:], before[8:], strict=True))


# ---- bad input ----

NAMES = [
    "q",
    "k",
    "v",
    "rope",
    "positions",
    "query_start",
    "kv_len",
    "page_table",
    "k_pages",
    "v_pages",
]
NAMES += ["k_scale", "v_scale"]
BAD: list[tuple[dict[str, Any], str, bool]] = [
    ({"k": torch.zeros(4, 2, 16)}, r"k must be \[4, 2, 32\], got \[4, 2, 16\]", True),
    ({"v": torch.zeros(3, 2, 32)}, r"v must be \[4, 2, 32\], got \[3, 2, 32\]", True),
    ({"k": torch.zeros(4, 2, 32).half()}, "k must be .* like q", True),
    (
        {"v": torch.zeros(4, 32, 2).transpose(1, 2)},
        "v must be dense in its last 2 dimensions",
        True,
    ),
    ({"q": torch.zeros(4, 5, 32)}, "heads of q .5. must be a multiple", True),
    ({"rope": torch.zeros(40, 31)}, "rope must have an even number of columns up to 32, got", True),
    ({"rope": torch.zeros(40, 34)}, "rope must have an even number of columns up to 32, got", True),
    ({"rope": torch.zeros(40, 0)}, "rope must have an even number of columns up to 32, got", True),
    ({"rope": torch.zeros(40, 32).half()}, "rope must be", True),
    ({"rope": None, "positions": ints(0, 0, 0, 0)}, "positions need rope", True),
    ({"positions": ints(0, 0, 0)}, r"positions must be \[4\], got \[3\]", True),
    (
        {"positions": ints(0, 40, 0, 0)},
        r"positions\[1\] must be in \[0, 40\), the rows of rope, got 40",
        False,
    ),
    ({"positions": ints(0, 0, -1, 0)}, r"positions\[2\] must be in \[0, 40\)", False),
    ({"rope": torch.zeros(19, 32)}, r"kv_len\[0\] = 20 passes the 19 rows of rope", False),
    ({"kv_len": ints(20, 2)}, r"kv_len\[1\] must count the 3 new tokens too, got 2", False),
    (
        {"page_table": ints(0, 9, 1, 0).view(2, 2)},
        r"page_table\[0, 1\] must be a page in \[0, 6\), got 9",
        False,
    ),
    ({"query_start": ints(0, 5, 4)}, "query_start must not fall", False),
]


def fine_arguments() -> dict[str, Any]:
    """What kv_append takes, for BAD to change."""
    tensors = [torch.ones(4, 4, 32), *(torch.ones(4, 2, 32) for _ in range(2)), torch.ones(40, 32)]
    tensors += [None, ints(0, 1, 4), ints(20, 3), ints(0, 1, 2, 3).view(2, 2)]
    pages = [torch.zeros(6, 2, 16, 32) for _ in range(2)]
    return dict(zip(NAMES, [*tensors, *pages, None, None], strict=True))


def check_refusal(
    op: str, fine: dict[str, Any], change: dict[str, Any], message: str, metadata: bool
) -> None:
    """Both implementations take `fine` and refuse the change, before anything is written; that of
    metadata without any contents too."""
    args = list((fine | change).values())
    for namespace in (torch.ops.qkernels, REFERENCE):
        with pytest.raises(RuntimeError, match=f"qkernels::{op}: .*{message}"):
            getattr(namespace, op)(*args)
        assert (fine["k_pages"] == 0).all() and (fine["v_pages"] == 0).all()
    if metadata:
        empty = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
            if torch.is_tensor(a)
            else a
            for a in args
        ]
        with pytest.raises(RuntimeError, match=f"qkernels::{op}: .*{message}"):
            getattr(torch.ops.qkernels, op)(*empty)
    for namespace in (torch.ops.qkernels, REFERENCE):
        getattr(namespace, op)(*clone(list(fine.values())))


@pytest.mark.parametrize("change, message, metadata", BAD, ids=[m for _, m, _ in BAD])
def test_bad_input(change: dict[str, Any], message: str, metadata: bool) -> None:
    check_refusal("kv_append", fine_arguments(), change, message, metadata)
