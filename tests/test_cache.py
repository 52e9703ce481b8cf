"""The paged KV cache, and the rotary tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels.cache import KV_DTYPES, PagedKVCache, rope_table
from qkernels.ops.attention import attention, attention_dense, kv_append

EPS = torch.finfo(torch.float32).eps


def cache_of(**kwargs: Any) -> PagedKVCache:
    return PagedKVCache(
        2, 2, 32, **({"dtype": "float32", "page_size": 16, "max_tokens": 160} | kwargs)
    )


def test_reserve_says_where_tokens_go() -> None:
    cache = cache_of()
    a, b = cache.add(), cache.add()
    batch = cache.reserve([a, b], [20, 3])
    assert batch.query_start.tolist() == [0, 20, 23]
    assert batch.kv_len.tolist() == [20, 3]
    assert batch.page_table.tolist() == [[0, 1], [2, 0]]
    assert all(t.dtype == torch.int32 for t in (batch.query_start, batch.kv_len, batch.page_table))
    assert cache.lengths == {a: 20, b: 3}
    batch = cache.reserve([b], [14])
    assert batch.query_start.tolist() == [0, 14] and batch.kv_len.tolist() == [17]
    assert batch.page_table.tolist() == [[2, 3]]
    assert cache.reserve([], []).page_table.shape == (0, 0)


@pytest.mark.parametrize("dtype", list(KV_DTYPES))
def test_one_tensor_per_kind(dtype: str) -> None:
    cache = cache_of(dtype=dtype)
    cache.reserve([cache.add()], [33])
    stored = 16 if dtype == "int4" else 32
    assert (
        cache.k_pages.shape == (2, 3, 2, 16, stored)
        and cache.k_pages.dtype == KV_DTYPES[dtype].torch_dtype
    )
    layer = cache.layer(1)
    assert layer.k_pages.data_ptr() == cache.k_pages[1].data_ptr() and layer.k_pages.shape == (
        3,
        2,
        16,
        stored,
    )
    held = [cache.k_pages, cache.v_pages]
    if dtype in ("int8", "int4"):
        assert layer.k_scale is not None and layer.k_scale.shape == (3, 2, 2, 16)
        held += [t for t in (cache.k_scale, cache.v_scale) if t is not None]
    else:
        assert layer.k_scale is None and layer.v_scale is None
    size = sum(t.numel() * t.element_size() for t in held)
    assert cache.nbytes == size == cache.capacity * cache.bytes_per_token


@pytest.mark.parametrize("dtype", list(KV_DTYPES))
def test_growth_keeps_what_is_there(dtype: str) -> None:
    """Short sequences take little memory; growing copies; the limit is not passed by doubling."""
    cache = cache_of(dtype=dtype)
    assert cache.nbytes == 0
    seq = cache.add()
    cache.reserve([seq], [16])
    assert cache.capacity == 16
    kinds = [
        t for t in (cache.k_pages, cache.v_pages, cache.k_scale, cache.v_scale) if t is not None
    ]
    for i, tensor in enumerate(kinds):
        tensor.fill_(7 + i)
    capacities = []
    for _ in range(9):
        cache.reserve([seq], [16])
        capacities.append(cache.capacity)
    assert capacities == [32, 64, 64, 128, 128, 128, 128, 160, 160]
    kinds = [
        t for t in (cache.k_pages, cache.v_pages, cache.k_scale, cache.v_scale) if t is not None
    ]
    assert all((tensor[:, 0] == 7 + i).all() for i, tensor in enumerate(kinds))


@pytest.mark.parametrize("allocations", [0, 1, 2, 3])
def test_out_of_memory_leaves_the_cache_as_it_was(
    allocations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(dtype="int8")
    seq = cache.add()
    cache.reserve([seq], [16])
    cache.k_pages.fill_(7)
    left, empty = allocations, torch.empty

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("out of memory")
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.reserve([seq], [16])
    assert cache.capacity == 16 and cache.lengths == {seq: 16}
    assert [t.shape[1] for t in (cache.k_pages, cache.v_pages)] == [1, 1]
    assert [t.shape[1] for t in (cache.k_scale, cache.v_scale) if t is not None] == [1, 1]
    cache.reserve([seq], [16])
    assert cache.k_pages[:, 0].eq(7).all() and cache.v_pages.shape[1] == 2


def test_limit() -> None:
    cache = cache_of(max_tokens=100)
    a, b = cache.add(), cache.add()
    cache.reserve([a], [40])
    before = cache.reserve([a], [0]).page_table.tolist()
    with pytest.raises(RuntimeError, match="needs 101 tokens of KV cache, the limit is 100"):
        cache.reserve([a, b], [60, 1])
    assert cache.lengths == {a: 40, b: 0} and cache.reserve([a], [0]).page_table.tolist() == before
    cache.reserve([a], [60])
    cache = cache_of(max_tokens=None, max_pages=4)
    seqs = [cache.add() for _ in range(5)]
    with pytest.raises(
        RuntimeError, match="needs 80 tokens of KV cache in whole pages of 16, the limit is 64"
    ):
        cache.reserve(seqs, [1] * 5)
    assert cache.nbytes == 0


def test_truncate_and_free_give_pages_back() -> None:
    cache = cache_of(max_tokens=64)
    a, b = cache.add(), cache.add()
    cache.reserve([a], [64])
    cache.truncate(a, 17)
    assert cache.lengths[a] == 17
    assert cache.reserve([a, b], [0, 32]).page_table.tolist() == [[0, 1], [2, 3]]
    cache.free(a)
    assert cache.lengths == {b: 32}
    assert cache.reserve([b], [32]).page_table.tolist() == [[2, 3, 0, 1]]
    cache.truncate(b, 0)
    c = cache.add()
    assert c not in (a, b)
    cache.reserve([c], [64])


def test_page_tables_follow_every_change_and_earlier_ones_stay() -> None:
    """One token at a time over page boundaries, cuts, and sequences that come and leave: the table
    of a cache that never reuses one, and those handed out before say what they said."""
    cache, handed_out = cache_of(), []

    def step(seqs: list[int], counts: list[int]) -> list[list[int]]:
        batch = cache.reserve(seqs, counts)
        pages = [cache._pages[seq] for seq in seqs]
        width = max(map(len, pages))
        assert batch.page_table.tolist() == [row + [0] * (width - len(row)) for row in pages]
        assert batch.kv_len.tolist() == [cache.lengths[seq] for seq in seqs]
        assert batch.query_start.tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
        handed_out.append((batch, [t.tolist() for t in vars(batch).values()]))
        return batch.page_table.tolist()

    a, b = cache.add(), cache.add()
    step([a, b], [15, 30])
    for _ in range(4):
        step([a, b], [1, 1])
    assert step([b, a], [1, 1]) == [[1, 2, 4], [0, 3, 0]]
    cache.truncate(b, 16)
    assert step([b, a], [0, 1]) == [[1, 0], [0, 3]]
    c = cache.add()
    step([c, a], [17, 1])  # the pages that b gave back
    assert step([b, a, c], [17, 1, 1]) == [[1, 5, 6], [0, 3, 0], [2, 4, 0]]
    cache.free(a)
    assert step([b, c], [1, 1]) == [[1, 5, 6], [2, 4, 0]]
    with pytest.raises(KeyError):
        cache.page_table([a])
    for batch, said in handed_out:
        assert [t.tolist() for t in vars(batch).values()] == said


def test_bad_arguments() -> None:
    for kwargs, message in (
        (
            {"dtype": "int2"},
            "dtype must be one of float32, float16, bfloat16, int8, int4, got 'int2'",
        ),
        ({"page_size": 20}, "page_size must be a multiple of 16, got 20"),
        ({"page_size": 0}, "page_size must be"),
        ({"max_tokens": 0}, "at least one token"),
        ({"max_tokens": None}, "give either max_tokens or max_pages"),
        ({"max_pages": 3}, "give either max_tokens or max_pages"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_of(**kwargs)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 up to 512, got 40"):
        PagedKVCache(1, 1, 40, max_tokens=16)
    cache = cache_of()
    seq = cache.add()
    cache.reserve([seq], [5])
    with pytest.raises(KeyError, match="no sequence 9"):
        cache.reserve([9], [1])
    with pytest.raises(ValueError, match="cannot grow by -1"):
        cache.reserve([seq], [-1])
    with pytest.raises(ValueError, match="different sequences"):
        cache.reserve([seq, seq], [1, 1])
    with pytest.raises(ValueError, match="has 5 tokens, so it cannot be cut to 6"):
        cache.truncate(seq, 6)
    cache.free(seq)
    with pytest.raises(KeyError, match="no sequence"):
        cache.free(seq)
    assert cache.lengths == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "grow", "cut", "free"]), st.integers(0, 9), st.integers(0, 40)
        ),
        max_size=40,
    )
)
def test_sequences_never_share_a_page(steps: list[tuple[str, int, int]]) -> None:
    cache = cache_of(max_tokens=None, max_pages=9)
    lengths: dict[int, int] = {}
    for action, pick, amount in steps:
        seq = sorted(lengths)[pick % len(lengths)] if lengths else None
        if action == "add" or seq is None:
            lengths[cache.add()] = 0
        elif action == "grow":
            pages = sum(-(-length // 16) for s, length in lengths.items() if s != seq) + -(
                -(lengths[seq] + amount) // 16
            )
            if pages > 9:
                with pytest.raises(RuntimeError, match="the limit is"):
                    cache.reserve([seq], [amount])
            else:
                cache.reserve([seq], [amount])
                lengths[seq] += amount
        elif action == "cut":
            lengths[seq] = min(lengths[seq], amount)
            cache.truncate(seq, lengths[seq])
        else:
            cache.free(seq)
            del lengths[seq]
        assert cache.lengths == lengths
        seqs = list(lengths)
        table = cache.reserve(seqs, [0] * len(seqs)).page_table
        used = [
            p
            for row, s in zip(table.tolist(), seqs, strict=True)
            for p in row[: -(-lengths[s] // 16)]
        ]
        assert len(set(used)) == len(used) and all(0 <= p < cache.capacity // 16 for p in used)


def test_generation_equals_attention_without_a_cache() -> None:
    """Two layers, prefill of two sequences, a cut, then token by token: as attention over all that
    was said."""
    g = torch.Generator().manual_seed(0)
    rope = rope_table(32, 160)
    x = {
        layer: torch.randn(2, 60, 8, 32, generator=g) for layer in range(2)
    }  # 4 heads of q, 2 of k, 2 of v
    cache = cache_of()
    seqs = [cache.add(), cache.add()]
    out: dict[tuple[int, int], Tensor] = {}

    def feed(counts: list[int]) -> None:
        first = [cache.lengths[seq] for seq in seqs]
        batch = cache.reserve(seqs, counts)
        for layer in range(2):
            new = torch.cat(
                [x[layer][b, f : f + n] for b, (f, n) in enumerate(zip(first, counts, strict=True))]
            )
            where = (batch.query_start, batch.kv_len, batch.page_table, *cache.layer(layer))
            result = attention(
                kv_append(new[:, :4], new[:, 4:6], new[:, 6:], rope, None, *where), *where
            )
            for b, part in enumerate(result.split(counts)):
                for i, row in enumerate(part):
                    out[layer, b, first[b] + i] = row

    feed([30, 7])
    feed([5, 40])
    cache.truncate(seqs[0], 20)
    feed([3, 0])
    for _ in range(13):
        feed([1, 1])
    starts = torch.tensor([0, 60], dtype=torch.int32)
    for layer in range(2):
        for b, length in enumerate(cache.lengths.values()):
            cos, sin = rope[:60, None].chunk(2, dim=-1)
            low, high = x[layer][b].chunk(2, dim=-1)
            turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
            expected = attention_dense(
                turned[:, :4], turned[:, 4:6], x[layer][b][:, 6:], starts, starts, causal=True
            )
            mine = torch.stack([out[layer, b, t] for t in range(length)])
            assert (mine - expected[:length]).abs().max() <= 32 * EPS * 4


# ---- rotary tables ----

HF_CASES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.25,
    },
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", HF_CASES, ids=lambda s: s["rope_type"])
def test_rope_table_is_transformers(scaling: dict[str, Any], theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters=scaling | {"rope_theta": theta},
    )
    embedding = LlamaRotaryEmbedding(config)
    table = rope_table(64, 300, theta, scaling)
    assert table.shape == (300, 64) and table.dtype == torch.float32
    cos, sin = embedding(torch.zeros(1), torch.arange(300)[None])
    # transformers multiplies float32 frequencies, off by a few units in the last place, by the
    # position.
    slack = 8 * EPS * torch.arange(1, 301)[:, None] * embedding.attention_scaling
    assert ((table[:, :32] - cos[0, :, :32]).abs() <= slack).all()
    assert ((table[:, 32:] - sin[0, :, :32]).abs() <= slack).all()


def test_rope_table_refuses() -> None:
    for kwargs, message in (
        ({"rotary_dim": 63}, "rotary_dim must be even and positive, got 63"),
        ({"max_positions": -1}, "max_positions must not be negative"),
        ({"theta": 0.0}, "theta must be above 1"),
        (
            {"scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "must be default, linear, llama3 or yarn, got 'dynamic'",
        ),
        ({"scaling": {"type": "linear"}}, "linear scaling needs a positive factor, got None"),
        (
            {"scaling": {"rope_type": "yarn", "factor": 2.0}},
            "positive original_max_position_embeddings",
        ),
        ({"scaling": {"rope_type": "llama3", "factor": "8"}}, "positive factor, got '8'"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_table(**({"rotary_dim": 64, "max_positions": 8} | kwargs))
    assert rope_table(64, 0).shape == (0, 64)
    assert torch.equal(
        rope_table(64, 8, scaling={"type": "linear", "factor": 1.0}), rope_table(64, 8)
    )
