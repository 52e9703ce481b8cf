"""Problems of attention and attention_dense, the exact result, and how far float32 may be from
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.cache import KV_DTYPES
from qkernels.reference.attention import attend, pack_nibbles, quantize_rows

EPS = torch.finfo(torch.float32).eps
KINDS = list(KV_DTYPES)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# (query heads, KV heads, head dim, page size)
SHAPES = [
    (9, 3, 64, 64),
    (4, 4, 80, 16),
    (8, 1, 128, 48),
    (2, 1, 16, 32),
    (4, 2, 256, 80),
    (2, 2, 512, 16),
]
# New tokens and keys of each sequence: decode short and long enough to be split, prefill, a chunk
# of one, nothing new.
RAGGED = [(1, 1), (1, 300), (70, 70), (33, 100), (0, 20), (2, 129)]
MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 37},
    {"causal": False, "window": 5, "softcap": 8.0},
    {"causal": True, "window": 1, "softcap": 20.0},
]


@dataclass
class Case:
    """A ragged batch over pages in random order. Whatever no sequence owns is NaN, or codes with
    NaN scales."""

    q: Tensor
    query_start: Tensor
    kv_len: Tensor
    page_table: Tensor
    k_pages: Tensor
    v_pages: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def args(self) -> tuple[Any, ...]:
        return (self.q, self.query_start, self.kv_len, self.page_table, *self.cache())

    def cache(self) -> tuple[Any, ...]:
        return (self.k_pages, self.v_pages, self.k_scale, self.v_scale)

    def alone(self, b: int) -> Case:
        """Sequence b in a batch of its own."""
        first, last = self.query_start[b : b + 2].tolist()
        start = self.query_start.new_tensor([0, last - first])
        kv_len, page_table = self.kv_len[b : b + 1], self.page_table[b : b + 1]
        return Case(self.q[first:last], start, kv_len, page_table, *self.cache())


def make_case(
    kind: str,
    shape: tuple[int, int, int, int],
    ragged: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    q_heads, kv_heads, dim, page = shape
    kv = KV_DTYPES[kind]
    used = [-(-length // page) for _, length in ragged]
    pages = sum(used) + 2
    order = torch.randperm(pages, generator=g).tolist()
    table = torch.full(
        (len(ragged), max([*used, 1])), -7, dtype=torch.int32
    )  # entries past the end are not read
    stored = dim // 2 if kind == "int4" else dim
    k_pages = torch.zeros(pages, kv_heads, page, stored, dtype=kv.torch_dtype)
    if kv.scaled:
        k_pages.random_(0, 256, generator=g)
    else:
        k_pages.fill_(torch.nan)
    v_pages = k_pages.clone()
    scales = (
        torch.full((2, pages, kv_heads, 2, page), torch.nan, dtype=torch.float16)
        if kv.scaled
        else None
    )
    for b, (_, length) in enumerate(ragged):
        for i in range(used[b]):
            at = order.pop()
            table[b, i] = at
            rows = min(page, length - i * page)
            for which, target in enumerate((k_pages, v_pages)):
                x = torch.randn(kv_heads, rows, dim, generator=g)
                if scales is None:
                    target[at, :, :rows] = x.to(kv.torch_dtype)
                    continue
                codes, step, zero = quantize_rows(x, kv.bits)
                target[at, :, :rows] = pack_nibbles(codes) if kind == "int4" else codes
                scales[which, at, :, 0, :rows], scales[which, at, :, 1, :rows] = step, zero
    counts = torch.tensor([0, *(count for count, _ in ragged)])
    return Case(
        torch.randn(int(counts.sum()), q_heads, dim, generator=g).to(dtype),
        counts.cumsum(0).int(),
        torch.tensor([length for _, length in ragged], dtype=torch.int32),
        table,
        k_pages,
        v_pages,
        None if scales is None else scales[0],
        None if scales is None else scales[1],
    )


def options(dim: int, mask: dict[str, Any]) -> tuple[float, bool, int, float]:
    return dim**-0.5, mask["causal"], mask.get("window", 0), mask.get("softcap", 0.0)


def rows_of(pages: Tensor, scale: Tensor | None, table: Tensor, length: int, dim: int) -> Tensor:
    """[length, Hkv, D] float64, exact."""
    page = pages.shape[2]
    t = torch.arange(length)
    at, slot = table[t // page].long(), t % page
    rows = pages[at, :, slot]
    if scale is None:
        return rows.double()
    if rows.shape[-1] != dim:  # byte i of a run of 8: dims i and 8 + i of 16
        byte = rows.view(length, rows.shape[1], dim // 16, 1, 8)
        rows = torch.cat((byte & 15, byte >> 4), dim=3).view(length, -1, dim)
    step, zero = scale[at, :, 0, slot].double(), scale[at, :, 1, slot].double()
    return step[..., None] * (rows.double() - zero[..., None])


def bias_size(bias: dict[str, Tensor], length: int) -> float:
    """The largest magnitude that biases add to a score of `length` keys."""
    size = 0.0
    for name, tensor in bias.items():
        finite = tensor.double()[tensor.isfinite()]
        most = float(finite.abs().max()) if finite.numel() else 0.0
        size += most * length if name == "alibi_slopes" else most
    return size


def exact(
    case: Case, mask: dict[str, Any], bias: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it float32 arithmetic of the same formula may be, [T,
    1, 1].

    Scores are sums of D products; integer pages compute q . k as scale * (q . code - zero *
    sum(q)), whose terms are up to the scale times 255 large. An error d of every score moves the
    result by at most 2 d max|v|; weighing codes instead of values adds the same kind of term once
    more. A bias is a product and two sums, of numbers no larger than all biases and the scores
    together, and the largest score, or the sink, is subtracted.
    """
    dim, bias = case.q.shape[2], bias or {}
    wide_bias = {name: tensor.double() for name, tensor in bias.items()}
    out, slack = [case.q[:0].double()], [torch.zeros(0, dtype=torch.float64)]
    start = case.query_start.tolist()
    for b, length in enumerate(case.kv_len.tolist()):
        q = case.q[start[b] : start[b + 1]].double()
        k = rows_of(case.k_pages, case.k_scale, case.page_table[b], length, dim)
        v = rows_of(case.v_pages, case.v_scale, case.page_table[b], length, dim)
        out.append(attend(q, k, v, *options(dim, mask), **wide_bias))
        if q.shape[0] == 0:
            continue
        # Terms of integer pages: every code may be as large as the range of its row.
        wide = 1.0 if case.k_scale is None else 2.0
        k_max, v_max = wide * k.abs().max(), wide * v.abs().max()
        terms = dim**-0.5 * q.abs().sum(-1).amax(-1) * k_max
        score = EPS * dim**0.5 * terms + (4 * EPS * mask.get("softcap", 0.0))
        score += 2 * EPS * bias_size(bias, length)
        slack.append((2 * score + 8 * EPS) * v_max)
    return torch.cat(out), torch.cat(slack)[:, None, None]


def run(
    namespace: Any, case: Case, mask: dict[str, Any], bias: dict[str, Tensor] | None = None
) -> Tensor:
    return namespace.attention(*case.args(), *options(case.q.shape[2], mask), **(bias or {}))


def make_bias(
    names: str, heads: int, reach: int, seed: int = 0, slope: float = 0.5
) -> dict[str, Tensor]:
    """names: "sinks alibi_slopes distance_bias", or some of them; all by query head.

    Entries of a distance have nothing to do with their neighbours', so that one for another, or one
    too far, is seen in the result. Sinks are about as large as the scores beside them.
    """
    g = torch.Generator().manual_seed(seed)
    every = {
        "sinks": 2 * torch.randn(heads, generator=g),
        "alibi_slopes": slope * torch.rand(heads, generator=g),
        "distance_bias": 2 * torch.randn(heads, 2 * reach + 1, generator=g),
    }
    return {name: every[name] for name in names.split()}


def dense_case(
    queries: list[int],
    keys: list[int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(queries), heads[0], dim, generator=g).to(dtype)
    k, v = (torch.randn(sum(keys), heads[1], dim, generator=g).to(dtype) for _ in range(2))
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    return (q, k, v, *starts)


def exact_dense(
    args: tuple[Tensor, ...], mask: dict[str, Any], bias: dict[str, Tensor] | None = None
) -> Tensor:
    """attention_dense in float64."""
    q, k, v, query_start, kv_start = args
    wide = {name: tensor.double() for name, tensor in (bias or {}).items()}
    out = []
    for b in range(len(query_start) - 1):
        tokens = slice(int(query_start[b]), int(query_start[b + 1]))
        keys = slice(int(kv_start[b]), int(kv_start[b + 1]))
        rows = q[tokens].double(), k[keys].double(), v[keys].double()
        out.append(attend(*rows, *options(q.shape[2], mask), **wide))
    return torch.cat(out)
