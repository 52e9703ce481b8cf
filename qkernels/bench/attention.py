"""Attention over the paged KV cache, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import select
from ..cache import KV_DTYPES, LayerCache, token_bytes
from ..reference.attention import attend, read_pages
from .cases import AttentionCase
from .check import U32, require_close, some, unit
from .inputs import Baseline, Problem, Rotation, random_bytes, random_floats, turns
from .shapes import MODELS

SDPA, SDPA_FLOAT32 = "torch_sdpa", "torch_sdpa_float32"
PAGE = 64
_CHECKED_TOKENS = 3


def build(case: AttentionCase, rotation: Rotation) -> Problem:
    """One sequence; each copy is pages of its own in one pool."""
    model, kind = MODELS[case.model], KV_DTYPES[case.kv_dtype]
    heads, dim = model.kv_heads, model.head_dim
    pages = -(-case.context // PAGE)
    per_token = token_bytes(case.kv_dtype, heads, dim)
    count = rotation.copies(pages * PAGE * per_token)
    pool = _pool(case.kv_dtype, count * pages, heads, dim)
    q = random_floats((case.m, model.q_heads, dim), torch.float32)
    ints = torch.int32
    start = torch.tensor([0, case.m], dtype=ints)
    length = torch.tensor([case.context], dtype=ints)
    tables = torch.arange(count * pages, dtype=ints).view(count, 1, pages)
    scale = dim**-0.5
    op = select("attention", q.device)
    args = [(q, start, length, table, *pool, scale, True, 0, 0.0) for table in tables]
    earlier = case.context - case.m
    pairs = case.m * earlier + case.m * (case.m + 1) // 2
    problem = Problem(
        turns(args, op),
        lambda: _check(case, op(*args[-1]), q, tables[-1, 0], pool),
        nbytes=per_token * case.context,
        ops=4.0 * pairs * model.q_heads * dim,
        peak="int8" if kind.scaled and torch.ops.qkernels.cpu_isa() == "avx512" else "float32",
        rotated=count * pages * PAGE * per_token,
    )
    for name in baseline_names(case):
        problem.add_baseline(name, partial(_sdpa, case, q, rotation, _sdpa_dtype(case, name)))
    return problem


def _pool(kv_dtype: str, pages: int, heads: int, dim: int) -> LayerCache:
    kind = KV_DTYPES[kv_dtype]
    if not kind.scaled:
        shape = (2, pages, heads, PAGE, dim)
        k, v = random_floats(shape, kind.torch_dtype)
        return LayerCache(k, v, None, None)
    shape = (2, pages, heads, PAGE, dim * kind.bits // 8)
    k, v = random_bytes(2 * pages * heads * PAGE * shape[-1]).view(shape)
    levels = 2**kind.bits
    scales = torch.empty(2, pages, heads, 2, PAGE, dtype=torch.float16)
    # Values from about -2 to 2; each token has its own, so that a mixed-up one shows in the check.
    spread = random_floats((2, pages, heads, PAGE), torch.float32).clamp(-1, 1)
    scales[..., 0, :] = (3.0 + spread) / levels
    scales[..., 1, :] = (levels * (4 + spread) / 8).round()
    return LayerCache(k, v, *scales)


def _check(case: AttentionCase, out: Tensor, q: Tensor, table: Tensor, pool: LayerCache) -> None:
    """Some tokens against the reference, all heads. Integer pages sum codes and zero points apart,
    each twice as large as the values."""
    dim = q.shape[2]
    k = read_pages(pool.k_pages, pool.k_scale, table, case.context, dim)
    v = read_pages(pool.v_pages, pool.v_scale, table, case.context, dim)
    wide = 1.0 if pool.k_scale is None else 2.0
    for token, want, bound in _expected(q, k, v, wide):
        require_close(f"{case.name}, token {token}", out[token], want, bound)


def _expected(q: Tensor, k: Tensor, v: Tensor, wide: float) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some tokens of q, which are the last ones of k and v: (token, the reference's result
    [Hq, D], how far float32 may be from it).

    A score is a sum of D products, whose partial sums stay far below the sum of their magnitudes:
    four u of that are allowed. An error d of the scores moves an output by up to 2 d max|v|. An
    output sums `context` terms, whose rounding errors grow like a random walk, with sqrt(context).
    wide: what is summed, relative to the values.
    """
    dim = q.shape[2]
    for token in some(q.shape[0], _CHECKED_TOKENS):
        seen = k.shape[0] - q.shape[0] + token + 1
        one = q[token : token + 1]
        want = attend(one, k[:seen], v[:seen], dim**-0.5, True, 0, 0.0)
        terms = dim**-0.5 * one.abs().sum(-1).max() * wide * k.abs().max()
        score = 4 * U32 * terms
        yield token, want[0], (2 * score + 4 * U32 * (4 + seen**0.5)) * wide * v.abs().max()


def baseline_names(case: AttentionCase) -> list[str]:
    """SDPA of the cache's float dtype, and of float32: without AVX-512 it is the fastest."""
    return [SDPA] if case.kv_dtype == "float32" else [SDPA, SDPA_FLOAT32]


def _sdpa_dtype(case: AttentionCase, name: str) -> torch.dtype:
    kind = KV_DTYPES[case.kv_dtype]
    if name == SDPA_FLOAT32:
        return torch.float32
    return torch.bfloat16 if kind.scaled else kind.torch_dtype


def _sdpa(case: AttentionCase, q: Tensor, rotation: Rotation, dtype: torch.dtype) -> Baseline:
    """Dense keys and values of one sequence."""
    model = MODELS[case.model]
    shape = (2, 1, model.kv_heads, case.context, model.head_dim)
    nbytes = 2 * case.context * model.kv_heads * model.head_dim * dtype.itemsize
    copies = random_floats((rotation.copies(nbytes), *shape), dtype).unbind()
    query = q.to(dtype).transpose(0, 1)[None].contiguous()
    causal = case.m == case.context
    mask = None
    if 1 < case.m < case.context:  # is_causal would align the corner of the first query and key
        mask = torch.ones(case.m, case.context, dtype=torch.bool)
        mask = mask.tril(case.context - case.m)
    grouped = model.q_heads != model.kv_heads

    def attention(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )

    def check(what: str, out: Tensor) -> None:
        """out [1, Hq, m, D]. Scores, probabilities and results are rounded to the type, each an
        error of about `unit` of a result's size; the norm over D is sqrt(D) times that."""
        one, (k, v) = query[0].transpose(0, 1).float(), copies[0][:, 0].transpose(1, 2).float()
        for token, want, bound in _expected(one, k, v, 1.0):
            rounding = unit(dtype) * want.norm(dim=-1, keepdim=True)
            require_close(f"{what}, token {token}", out[0, :, token], want, bound + rounding)

    return Baseline(turns([tuple(kv.unbind()) for kv in copies], attention), check)
