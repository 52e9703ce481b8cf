"""Sinks, ALiBi and biases by distance: what attention's scores take beyond scale * q . k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    EPS,
    KINDS,
    MASKS,
    RAGGED,
    SHAPES,
    bias_size,
    dense_case,
    exact,
    exact_dense,
    make_bias,
    make_case,
    options,
    run,
)
from torch import Tensor

import qkernels
from qkernels.ops.attention import attention, attention_dense
from qkernels.reference.attention import attend

REFERENCE = torch.ops.qkernels_reference
ALL = "sinks alibi_slopes distance_bias"
# (names, reach): tables shorter than a vector of any instruction set, than a tile, than no case; a
# single entry moves all keys alike, so that it takes a sink to see it
BIASES = [
    ("sinks", 0),
    ("alibi_slopes", 0),
    ("sinks distance_bias", 0),
    ("distance_bias", 3),
    ("distance_bias", 29),
    ("distance_bias", 500),
    (ALL, 29),
]


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Threads change nothing but the time, as the test of that shows."""
    with_threads(1)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, mask: dict[str, Any], bias: dict[str, Tensor]
) -> Tensor:
    """`attend` in another way: torch's attention over one key more, whose value is 0, with an
    additive mask that is written entry by entry. Without softcap."""
    n, m, heads = q.shape[0], k.shape[0], q.shape[1]
    window = mask.get("window", 0)
    add = torch.full((heads, n, m + 1), -torch.inf, dtype=torch.float64)
    for h in range(heads):
        for i in range(n):
            at = m - n + i
            if "sinks" in bias:
                add[h, i, m] = bias["sinks"][h]
            for j in range(m):
                if (mask["causal"] and j > at) or (window and j <= at - window):
                    continue
                add[h, i, j] = 0
                if "alibi_slopes" in bias:
                    add[h, i, j] -= bias["alibi_slopes"][h].double() * abs(at - j)
                if "distance_bias" in bias:
                    row = bias["distance_bias"][h].tolist()
                    middle = len(row) // 2
                    add[h, i, j] += row[min(max(j - at + middle, 0), len(row) - 1)]
    k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)).transpose(0, 1)[None] for t in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, add[None], scale=q.shape[2] ** -0.5, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("names, reach", BIASES)
@pytest.mark.parametrize("queries, keys", [(5, 5), (1, 40), (3, 20)])
def test_the_reference_is_the_definition(queries: int, keys: int, names: str, reach: int) -> None:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(queries, 4, 16, generator=g, dtype=torch.float64)
    k, v = (torch.randn(keys, 2, 16, generator=g, dtype=torch.float64) for _ in range(2))
    bias = make_bias(names, 4, reach)
    wide = {name: tensor.double() for name, tensor in bias.items()}
    for mask in ({"causal": True}, {"causal": False}, {"causal": True, "window": 4}):
        ours = attend(q, k, v, *options(16, mask), **wide)
        torch.testing.assert_close(ours, by_definition(q, k, v, mask, bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("names, reach", BIASES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(isa: Any, kind: str, names: str, reach: int) -> None:
    """Few rows and many, split sequences and whole ones, every kind of page."""
    for shape in (SHAPES[0], SHAPES[2]):
        case = make_case(kind, shape, RAGGED)
        bias = make_bias(names, shape[0], reach)
        for mask in MASKS:
            out = run(isa.ops, case, mask, bias)
            truth, slack = exact(case, mask, bias)
            worst = ((out.double() - truth).abs() / slack).max()
            assert worst <= 1, (mask, float(worst))
            if mask.get("window") == 1:
                continue  # of one key only a sink moves the weight
            for name in bias:  # a bound that lets one go unnoticed would be none
                without, _ = exact(case, mask, {n: t for n, t in bias.items() if n != name})
                assert ((without - truth).abs() > 50 * slack).any(), (mask, name)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_against_float64(kind: str) -> None:
    case = make_case(kind, SHAPES[0], RAGGED)
    bias = make_bias(ALL, SHAPES[0][0], 29)
    for mask in MASKS:
        truth, slack = exact(case, mask, bias)
        out = run(REFERENCE, case, mask, bias)
        assert ((out.double() - truth).abs() <= slack).all(), mask


@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 12, 49])
def test_every_count_of_rows(isa: Any, group: int) -> None:
    """Each row takes the biases of its own head and position."""
    bias = make_bias(ALL, group, 9)
    for kind in ("float16", "int4"):
        case = make_case(kind, (group, 1, 32, 16), [(1, 40), (3, 17)])
        truth, slack = exact(case, MASKS[0], bias)
        assert ((run(isa.ops, case, MASKS[0], bias).double() - truth).abs() <= slack).all()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_long_context(isa: Any, kind: str) -> None:
    """Chunks get longer than 256 keys; one of them, and no other, has the sink."""
    case = make_case(kind, (2, 1, 16, 64), [(1, 16500), (2, 4100)])
    bias = make_bias(ALL, 2, 1000, slope=2e-4)
    bias["sinks"] += 8.0  # beside thousands of keys
    for mask in ({"causal": True}, {"causal": True, "window": 300}):
        truth, slack = exact(case, mask, bias)
        assert ((run(isa.ops, case, mask, bias).double() - truth).abs() <= 2 * slack).all()
        less, _ = exact(case, mask, bias | {"sinks": bias["sinks"] + 2.0**0.5})
        assert ((less - truth).abs() > 4 * slack).any(), mask


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_of_any_size(isa: Any, kind: str) -> None:
    """-inf is no sink; a large one leaves nothing for the keys; where it is NaN the result is."""
    case = make_case(kind, SHAPES[0], RAGGED)
    heads = SHAPES[0][0]
    sinks = torch.zeros(heads)
    sinks[:4] = torch.tensor([-torch.inf, -1e30, 1e30, torch.nan])
    for mask in MASKS:
        without = run(isa.ops, case, mask)
        out = run(isa.ops, case, mask, {"sinks": sinks})
        assert torch.equal(out[:, :2], without[:, :2])
        assert (out[:, 2] == 0).all() and out[:, 3].isnan().all()
        truth, slack = exact(case, mask, {"sinks": torch.zeros(heads)})
        assert ((out.double() - truth).abs() <= slack)[:, 4:].all()


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_zero_change_no_bit(isa: Any, kind: str) -> None:
    case = make_case(kind, SHAPES[0], RAGGED)
    heads = SHAPES[0][0]
    zero = {"alibi_slopes": torch.zeros(heads), "distance_bias": torch.zeros(heads, 7)}
    for mask in MASKS:
        assert torch.equal(run(isa.ops, case, mask, zero), run(isa.ops, case, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_of_minus_infinity_hides_its_keys(isa: Any, kind: str) -> None:
    """As a window does, here one of 7 keys."""
    case = make_case(kind, SHAPES[0], RAGGED)
    heads = SHAPES[0][0]
    table = torch.zeros(heads, 41)
    table[:, :14] = -torch.inf  # distances from -20 to -7
    truth, slack = exact(case, {"causal": True, "window": 7})
    out = run(isa.ops, case, {"causal": True}, {"distance_bias": table})
    assert ((out.double() - truth).abs() <= slack).all()
    for ops in (isa.ops, REFERENCE):
        nothing = run(ops, case, MASKS[0], {"distance_bias": torch.full((heads, 1), -torch.inf)})
        assert (nothing == 0).all()


def test_biases_come_after_softcap(isa: Any) -> None:
    """One key has 30 beyond a cap of 1, so that it takes all."""
    case = make_case("float32", SHAPES[0], [(1, 9)])
    table = torch.zeros(SHAPES[0][0], 17)
    table[:, 4] = 30.0  # distance -4: key 4
    out = run(isa.ops, case, {"causal": True, "softcap": 1.0}, {"distance_bias": table})
    v = case.v_pages[case.page_table[0, 0].long(), :, 4]
    assert (out[0] - v.repeat_interleave(3, 0)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_bits_depend_on_neither_threads_nor_batch(
    isa: Any, kind: str, with_threads: Callable[[int], None]
) -> None:
    ragged = [*RAGGED, (1, 1000)]
    case = make_case(kind, SHAPES[0], ragged)
    bias = make_bias(ALL, SHAPES[0][0], 29)
    results = []
    for threads in (1, 2, 3):
        with_threads(threads)
        results.append(run(isa.ops, case, MASKS[2], bias))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for b, (count, _) in enumerate(ragged):
        first = int(case.query_start[b])
        alone = case.alone(b)
        assert torch.equal(run(isa.ops, alone, MASKS[2], bias), results[0][first : first + count])


@pytest.mark.parametrize("names, reach", BIASES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_dense(isa: Any, mask: dict[str, Any], names: str, reach: int) -> None:
    """Cross attention too, with queries that stand before the first key, and no keys at all."""
    args = dense_case([5, 0, 90, 1, 3], [140, 7, 30, 0, 300], (6, 2), 32, torch.float32)
    bias = make_bias(names, 6, reach)
    out = isa.ops.attention_dense(*args, *options(32, mask), **bias)
    truth = exact_dense(args, mask, bias)
    plain = REFERENCE.attention_dense(*args, *options(32, mask), **bias)
    torchs = (plain.double() - truth).abs().max()
    size = 1 + mask.get("softcap", 0.0) + bias_size(bias, 300)
    assert (out.double() - truth).abs().max() <= 2 * torchs + 16 * EPS * size
    if mask["causal"]:
        assert (out[5:65] == 0).all()  # the first 60 of 90 queries stand before the first key
    assert (out[95] == 0).all()  # no keys at all


# ---- as torch ops ----


def test_opcheck() -> None:
    case = make_case("int4", SHAPES[0], RAGGED)
    for names in ("sinks", ALL):
        bias = make_bias(names, SHAPES[0][0], 29)
        torch.library.opcheck(
            torch.ops.qkernels.attention.default, (*case.args(), 0.125, True, 0, 0.0), bias
        )
        args = dense_case([1, 7], [20, 7], (4, 2), 32, torch.float32)
        torch.library.opcheck(
            torch.ops.qkernels.attention_dense.default,
            (*args, 0.125, True, 0, 0.0),
            make_bias(names, 4, 5),
        )


def test_compiles() -> None:
    case = make_case("int8", SHAPES[0], RAGGED)
    bias = make_bias(ALL, SHAPES[0][0], 29)
    compiled = torch.compile(
        lambda *args: attention(*args, **bias) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*case.args()), attention(*case.args(), **bias) * 2)
    args = dense_case([1, 7], [20, 7], (4, 2), 32, torch.float32)
    few = make_bias(ALL, 4, 5)
    dense = torch.compile(attention_dense, fullgraph=True, backend="aot_eager")
    assert torch.equal(dense(*args, **few), attention_dense(*args, **few))


def test_typed_functions_hand_everything_over() -> None:
    case = make_case("float32", SHAPES[0], RAGGED)
    args = dense_case([1, 7], [20, 7], (4, 2), 32, torch.float32)
    for names in ALL.split():
        bias, few = make_bias(names, SHAPES[0][0], 29), make_bias(names, 4, 5)
        for backend, ops in (("cpu", torch.ops.qkernels), ("reference", REFERENCE)):
            with qkernels.backend(backend):
                paged, dense = attention(*case.args(), **bias), attention_dense(*args, **few)
            assert torch.equal(paged, run(ops, case, MASKS[0], bias))
            assert torch.equal(dense, ops.attention_dense(*args, 32**-0.5, False, 0, 0.0, **few))
