"""The paged KV cache of a model: one pool of pages per kind of tensor, shared by all layers and
sequences."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.attention_checks import MAX_HEAD_DIM
from .ops.rope import rope_table

__all__ = ["KV_DTYPES", "Batch", "LayerCache", "PagedKVCache", "rope_table", "token_bytes"]


class KvDtype(NamedTuple):
    """How a row of D numbers is stored."""

    torch_dtype: torch.dtype
    bits: int
    scaled: bool  # a float16 scale and zero point per token and head stand beside the codes


KV_DTYPES = {
    "float32": KvDtype(torch.float32, 32, False),
    "float16": KvDtype(torch.float16, 16, False),
    "bfloat16": KvDtype(torch.bfloat16, 16, False),
    "int8": KvDtype(torch.uint8, 8, True),
    "int4": KvDtype(torch.uint8, 4, True),
}


def token_bytes(dtype: str, kv_heads: int, head_dim: int) -> int:
    """Bytes that one token takes in one layer: keys, values, their scales and zero points."""
    kind = KV_DTYPES[dtype]
    return 2 * kv_heads * (head_dim * kind.bits // 8 + (4 if kind.scaled else 0))


@dataclass(frozen=True)
class Batch:
    """Where the new tokens of a ragged batch go: what `kv_append` and `attention` take.

    query_start [B + 1], kv_len [B] (new tokens included), page_table [B, pages of the longest], all
    int32. To be read only: batches may share a page table.
    """

    query_start: Tensor
    kv_len: Tensor
    page_table: Tensor


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers; to a GPU by a copy that nobody waits for, from memory that stays as it
    is until then."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class LayerCache(NamedTuple):
    """The pages of one layer, views into the pool: k and v [P, Hkv, page, D] (int4: D / 2 bytes);
    scales [P, Hkv, 2, page] float16 for integer pages, else None. In the order that the ops take
    them."""

    k_pages: Tensor
    v_pages: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


class PagedKVCache:
    """Keys and values of any number of sequences, in pages of `page_size` tokens.

    layers, kv_heads, head_dim: of the model; head_dim a multiple of 16 up to 512. dtype: "float32",
    "float16", "bfloat16", "int8" or "int4". page_size: a multiple of 16. The limit is max_tokens,
    rounded up to whole pages, or max_pages; sequences share it, and each one occupies whole pages.
    Memory grows on demand by doubling (with a copy), never beyond the limit. Raises ValueError for
    arguments outside these ranges.
    """

    k_pages: Tensor
    v_pages: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "float16",
        page_size: int = 64,
        max_tokens: int | None = None,
        max_pages: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in KV_DTYPES:
            raise ValueError(
                f"the KV cache's dtype must be one of {', '.join(KV_DTYPES)}, got {dtype!r}"
            )
        if layers < 1 or kv_heads < 1:
            raise ValueError(
                f"a KV cache needs layers and heads, got {layers} layers, {kv_heads} KV heads"
            )
        if head_dim < 16 or head_dim % 16 or head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}"
            )
        if page_size < 16 or page_size % 16:
            raise ValueError(f"page_size must be a multiple of 16, got {page_size}")
        if (max_tokens is None) == (max_pages is None):
            raise ValueError("give either max_tokens or max_pages")
        limit = -(-max_tokens // page_size) if max_tokens is not None else max_pages
        if limit is None or limit < 1:
            raise ValueError(
                f"the limit must be at least one token, got {max_tokens=}, {max_pages=}"
            )
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.dtype, self.page_size, self.max_pages = dtype, page_size, limit
        self.max_tokens = limit * page_size if max_tokens is None else max_tokens
        self.device = torch.device(device)
        self._pages: dict[int, list[int]] = {}  # of each sequence, in order
        self._lengths: dict[int, int] = {}
        self._free: list[int] = []  # a heap, so that low pages are taken first
        self._next = 0
        self._count = 0  # pages in memory
        self.moves = 0  # times that the tensors were made anew, and lie elsewhere
        # The last page table and its sequences, until a page comes or goes. It has been handed out:
        # it is replaced, never written to.
        self._table: tuple[tuple[int, ...], Tensor] | None = None
        self._allocate(0)

    # ---- tensors ----

    def _allocate(self, pages: int) -> None:
        """Makes the pool `pages` large; the pages there were keep their contents."""
        kind = KV_DTYPES[self.dtype]
        stored = self.head_dim * kind.bits // 8 if kind.scaled else self.head_dim
        rows = (self.layers, pages, self.kv_heads, self.page_size, stored)
        planes = (self.layers, pages, self.kv_heads, 2, self.page_size)
        old = self._count

        def grown(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            if old:
                before = getattr(self, name)
                tensor[:, :old] = before[:, :old]
                if before.is_cuda:  # it may have been made for another stream than that of the copy
                    before.record_stream(torch.cuda.current_stream(before.device))
            return tensor

        # One tensor after the other, so that at most one of them exists twice.
        done: list[str] = []
        try:
            for name, shape, dtype in (
                ("k_pages", rows, kind.torch_dtype),
                ("v_pages", rows, kind.torch_dtype),
                ("k_scale", planes, torch.float16),
                ("v_scale", planes, torch.float16),
            ):
                there = kind.scaled or shape is rows
                setattr(self, name, grown(name, shape, dtype) if there else None)
                done.append(name)
        except BaseException:  # out of memory: all four say again what they said before
            for name in done:
                if getattr(self, name) is not None:
                    setattr(self, name, getattr(self, name)[:, :old])
            self.moves += bool(done)  # those lie elsewhere now
            raise
        self._count = pages
        self.moves += 1
        for page in range(old, pages):
            heapq.heappush(self._free, page)

    def layer(self, index: int) -> LayerCache:
        """The pages of one layer. Views: take them after `reserve`, which may move the pool."""
        return LayerCache(
            self.k_pages.select(0, index),
            self.v_pages.select(0, index),
            None if self.k_scale is None else self.k_scale.select(0, index),
            None if self.v_scale is None else self.v_scale.select(0, index),
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers: keys, values, their scales and zero points."""
        return self.layers * token_bytes(self.dtype, self.kv_heads, self.head_dim)

    @property
    def capacity(self) -> int:
        """Tokens that the memory held now has room for."""
        return self._count * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self.capacity * self.bytes_per_token

    # ---- sequences ----

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each sequence, by its number. A copy."""
        return dict(self._lengths)

    def add(self) -> int:
        """A new, empty sequence; returns its number."""
        seq = self._next
        self._next += 1
        self._pages[seq], self._lengths[seq] = [], 0
        return seq

    def _check(self, seq: int) -> None:
        if seq not in self._lengths:
            raise KeyError(f"the KV cache has no sequence {seq!r}; it has {sorted(self._lengths)}")

    def reserve(self, seqs: Sequence[int], counts: Sequence[int]) -> Batch:
        """Makes room for counts[i] more tokens of sequence seqs[i], and says where they go.

        The lengths count the new tokens from now on. Raises as `grow` does.
        """
        lengths = self.grow(seqs, counts)
        starts = self._ints([0, *accumulate(counts)])
        return Batch(starts, self._ints(lengths), self.page_table(seqs))

    def grow(self, seqs: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Makes room for counts[i] more tokens of sequence seqs[i] -> the lengths with them.

        Raises RuntimeError where the limit is too low (nothing has changed then), KeyError for an
        unknown sequence, ValueError for one that occurs twice or a negative count.
        """
        if len(seqs) != len(counts) or len(set(seqs)) != len(seqs):
            raise ValueError(
                f"reserve needs different sequences and a count for each, got {seqs} and {counts}"
            )
        lengths, missing = [], 0
        for seq, count in zip(seqs, counts, strict=True):
            self._check(seq)
            if count < 0:
                raise ValueError(f"sequence {seq} cannot grow by {count} tokens")
            lengths.append(self._lengths[seq] + count)
            missing += -(-lengths[-1] // self.page_size) - len(self._pages[seq])
        self._make_room(missing, sum(counts))
        self._lengths.update(zip(seqs, lengths, strict=True))
        if missing:
            for seq, length in zip(seqs, lengths, strict=True):
                pages = self._pages[seq]
                while len(pages) * self.page_size < length:
                    pages.append(heapq.heappop(self._free))
            self._table = None
        return lengths

    def _make_room(self, missing: int, new_tokens: int) -> None:
        have = self._count
        used = have - len(self._free)
        tokens = sum(self._lengths.values()) + new_tokens
        if tokens > self.max_tokens:
            raise RuntimeError(f"needs {tokens} tokens of KV cache, the limit is {self.max_tokens}")
        needed = used + missing
        if needed > self.max_pages:
            raise RuntimeError(
                f"needs {needed * self.page_size} tokens of KV cache in whole pages of "
                f"{self.page_size}, the limit is {self.max_pages * self.page_size}"
            )
        if needed <= have:
            return
        try:
            self._allocate(min(max(needed, 2 * have), self.max_pages))
        except torch.OutOfMemoryError:  # of a GPU; what is needed may fit where its double does not
            if needed >= 2 * have:
                raise
            self._allocate(needed)

    def ensure(self, tokens: int) -> None:
        """Has memory for `tokens` more in sequences of their own, so that reserving them moves
        nothing: whoever keeps addresses of the pages asks for what is coming at once. Raises as
        `grow` does."""
        self._make_room(-(-tokens // self.page_size), 0)

    def pages(self, seq: int) -> list[int]:
        """The pages of a sequence, in order. A copy. Raises KeyError as `reserve` does."""
        self._check(seq)
        return list(self._pages[seq])

    def page_table(self, seqs: Sequence[int]) -> Tensor:
        """[B, pages of the longest] int32, of sequences that are there. To be read only."""
        key = tuple(seqs)
        if self._table is None or self._table[0] != key:
            width = max((len(self._pages[seq]) for seq in seqs), default=0)
            rows = [self._pages[seq] + [0] * (width - len(self._pages[seq])) for seq in seqs]
            self._table = key, self._ints(rows).reshape(len(seqs), width)
        return self._table[1]

    def _ints(self, values: list[int] | list[list[int]]) -> Tensor:
        return on_device(values, torch.int32, self.device)

    def truncate(self, seq: int, length: int) -> None:
        """Forgets all tokens of a sequence from `length` on. Raises KeyError, or ValueError if
        there are fewer."""
        self._check(seq)
        if not 0 <= length <= self._lengths[seq]:
            raise ValueError(
                f"sequence {seq} has {self._lengths[seq]} tokens, so it cannot be cut to {length}"
            )
        keep = -(-length // self.page_size)
        for page in self._pages[seq][keep:]:
            heapq.heappush(self._free, page)
        del self._pages[seq][keep:]
        self._lengths[seq] = length
        self._table = None

    def fork(self, seq: int) -> int:
        """A copy of a sequence, in pages of its own; returns its number. Raises as `grow` does."""
        self._check(seq)
        copy = self.add()
        try:
            self.grow([copy], [self._lengths[seq]])
        except BaseException:
            self.free(copy)
            raise
        source, target = self.pages(seq), self.pages(copy)
        for pages in (self.k_pages, self.v_pages, self.k_scale, self.v_scale):
            if pages is not None and source:
                pages[:, target] = pages[:, source]
        return copy

    def free(self, seq: int) -> None:
        """Removes a sequence. Raises KeyError if there is none of that number."""
        self.truncate(seq, 0)
        del self._pages[seq], self._lengths[seq]
