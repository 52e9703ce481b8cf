"""Sequences of a decoder in a KV cache, for a call or for a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..cache import PagedKVCache
from ..generate import Request, common_prefix

if TYPE_CHECKING:
    from .decoder import QuantDecoder

PAGE = 64  # tokens per page of the cache


class KvPool:
    """Sequences in a paged cache, and the model run on their next tokens."""

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

    def add(self) -> int:
        return self._cache.add()

    def free(self, handle: int) -> None:
        self._cache.free(handle)

    def truncate(self, handle: int, length: int) -> None:
        self._cache.truncate(handle, length)

    def forward(
        self, parts: Sequence[tuple[int, Sequence[int]]], last_only: bool = True
    ) -> torch.Tensor:
        """Appends tokens to sequences. parts: (handle, its next tokens) -> logits [S, vocab]
        float32.

        One row per part, of its last token, or with last_only=False one per token.
        """
        counts = [len(ids) for _, ids in parts]
        ids = torch.tensor([token for _, part in parts for token in part], dtype=torch.int64)
        batch = self._cache.reserve([handle for handle, _ in parts], counts)
        select = torch.tensor(counts).cumsum(0) - 1 if last_only else torch.arange(ids.shape[0])
        return self._decoder.executor()(ids, batch, select, self._cache)


class ChatMemory:
    """The cache of a conversation and the tokens in it."""

    def __init__(self, decoder: QuantDecoder) -> None:
        self.pool = KvPool(decoder, [decoder.max_seq_len])
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
