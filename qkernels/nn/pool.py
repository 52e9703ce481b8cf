"""Sequences of a decoder in a KV cache, for a call or for a conversation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..cache import Batch, PagedKVCache
from ..generate import Request, common_prefix
from ..int_buffer import IntBuffer
from .steps import PAGE, DevicePool

if TYPE_CHECKING:
    from .decoder import QuantDecoder


class _Inputs:
    """What the executor takes for parts of these lengths. Steps of decoding have the same ones, one
    token per sequence, until a sequence comes or leaves; only what is written changes.
    """

    def __init__(self, counts: list[int]) -> None:
        ends = list(accumulate(counts, initial=0))
        self.counts = counts
        self.ids = IntBuffer(ends[-1], torch.int64)
        self.kv_len = IntBuffer(len(counts), torch.int32)
        self.query_start = torch.tensor(ends, dtype=torch.int32)
        self.last_rows = torch.tensor(ends[1:], dtype=torch.int64) - 1


def pool_for(decoder: QuantDecoder, tokens: Sequence[int]) -> KvPool | DevicePool:
    """Where a call keeps its sequences. tokens: for each sequence that is there at the same time,
    how many it may have."""
    if decoder.decodes_on_device:
        return DevicePool(decoder.steps(), tokens)
    return KvPool(decoder, tokens)


class KvPool:
    """Sequences in a paged cache, and the model run on their next tokens."""

    decode = None  # it has logits only

    def __init__(self, decoder: QuantDecoder, tokens: Sequence[int]) -> None:
        """tokens: for each sequence that is there at the same time, how many it may have."""
        config = decoder.config
        pages = sum(-(-count // PAGE) for count in tokens)
        self._decoder = decoder
        self._cache = PagedKVCache(
            config.layers,
            config.kv_heads,
            config.head_dim,
            dtype=decoder.kv_dtype,
            page_size=PAGE,
            max_tokens=pages * PAGE,
        )
        self._inputs = _Inputs([])
        self._running = threading.Lock()  # a call owns the inputs until it is over

    def add(self) -> int:
        return self._cache.add()

    def free(self, handle: int) -> None:
        self._cache.free(handle)

    def truncate(self, handle: int, length: int) -> None:
        self._cache.truncate(handle, length)

    def append_blank(self, handle: int, count: int) -> None:
        """As many tokens more, whose keys and values are zeros: for timing what comes after."""
        self._cache.grow([handle], [count])
        pages = torch.tensor(self._cache.pages(handle))
        cache = self._cache
        for stored in (cache.k_pages, cache.v_pages, cache.k_scale, cache.v_scale):
            if stored is not None:
                stored.index_fill_(1, pages, 0)

    def forward(
        self, parts: Sequence[tuple[int, Sequence[int]]], last_only: bool = True
    ) -> torch.Tensor:
        """Appends tokens to sequences. parts: (handle, its next tokens) -> logits [S, vocab]
        float32.

        One row per part, of its last token, or with last_only=False one per token.
        """
        with self._running:
            handles, counts = [handle for handle, _ in parts], [len(ids) for _, ids in parts]
            if counts != self._inputs.counts:
                self._inputs = _Inputs(counts)
            inputs = self._inputs
            ids = inputs.ids.write([token for _, part in parts for token in part])
            kv_len = inputs.kv_len.write(self._cache.grow(handles, counts))
            batch = Batch(inputs.query_start, kv_len, self._cache.page_table(handles))
            select = inputs.last_rows if last_only else torch.arange(ids.shape[0])
            return self._decoder.executor()(ids, batch, select, self._cache)


class ChatMemory:
    """The cache of a conversation and the tokens in it."""

    def __init__(self, decoder: QuantDecoder) -> None:
        self.pool = pool_for(decoder, [decoder.max_seq_len])
        self._handle = self.pool.add()
        self._ids: list[int] = []
        self._owner: Request | None = None

    def take(self, request: Request) -> ChatMemory:
        """Gives the cache to a request, with as much of it as both have in common."""
        if self._owner is not None:
            self._settle(self._owner)
        # The last token of the prompt is always run: its logits are the first new token's.
        shared = min(common_prefix(self._ids, request.ids), request.prompt - 1)
        self.pool.truncate(self._handle, shared)
        self._ids = self._ids[:shared]
        request.handle, request.done, self._owner = self._handle, shared, request
        return self

    def watch(self, request: Request, pieces: Iterator[Any]) -> Iterator[Any]:
        """The pieces; at the end, also an early one, the cache holds exactly what the request has
        run.
        """
        try:
            for piece in pieces:
                if self._owner is not request:
                    raise RuntimeError(
                        "chat: this answer cannot go on, a later call of chat has taken its cache"
                    )
                yield piece
        finally:
            if self._owner is request:
                self._settle(request)

    def _settle(self, request: Request) -> None:
        self._ids = request.ids[: request.done]
        self.pool.truncate(self._handle, request.done)  # an interrupted step may have reserved more
        self._owner = None
