"""Decoding on a device of its own: the state of a step lives there, and the host only reads tokens.

A step runs the program on the last token of every sequence, draws the next ones, and writes them
where the following step finds them; lengths and the offsets of the draws advance beside them. It is
recorded once per batch size (`nn/graph.py`). The host assigns pages ahead of the step that needs
them, and starts the next step before it reads the tokens of the last: should one of them end its
sequence, that next step is undone, since nothing but the end of the cache and the buffers here,
which are written anew, has seen it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..backends import select
from ..cache import Batch, PagedKVCache, on_device
from ..generate import MAX_BATCH, GenerationSettings, Request, Sampler, penalize
from ..ops.sample import check_tokens
from .executor import Executor
from .graph import Recording, record, shared_memory

if TYPE_CHECKING:
    from .decoder import QuantDecoder

PAGE = 64  # tokens per page of the cache
# Batch sizes that are recorded; other batches are filled up to the next one, by rows that read and
# write a page of their own. Each takes some 0.1 s to capture, so not all 32.
BATCHES = (1, 2, 4, 8, 16, 32)
# Pages per sequence, likewise: attention divides its work by the longest sequence that there could
# be, 1024 tokens or 4 times as many, and so on.
FEWEST_PAGES, TIMES_PAGES = 16, 4
# Tokens that the cache has room for from the beginning, and as many as a call asks for up to the
# second number when it begins. Beyond, it grows by doubling when they come; what was recorded on
# the old one is recorded again.
FIRST_TOKENS, CALL_TOKENS = 4096, 16384


def batch_of(count: int) -> int:
    """The recorded batch size that takes `count` sequences."""
    return next(size for size in BATCHES if size >= count)


def width_of(pages: int, most: int) -> int:
    """The recorded pages per sequence that take `pages` of them."""
    width = FEWEST_PAGES
    while width < pages:
        width *= TIMES_PAGES
    return min(width, most)


@dataclass(frozen=True)
class _Launched:
    """A step on its way: whose it is, the lengths it leaves, and where its tokens will be."""

    sampler: Sampler
    handles: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: torch.Tensor  # [n] int64, on the host
    arrived: Any  # an event, None where the tokens are there already

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist()


class _Rows(NamedTuple):
    """What a step takes and leaves for each sequence, [batch] each."""

    ids: torch.Tensor  # int64, the last tokens; a step writes the next ones
    kv_len: torch.Tensor  # int32, with the token of the coming step
    advance: torch.Tensor  # int32, 1; 0 in rows that fill up a batch
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    offset: torch.Tensor  # of the draw

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> _Rows:
        i32, i64, f32 = torch.int32, torch.int64, torch.float32
        types = (i64, i32, i32, f32, i32, f32, f32, i64, i64)
        return cls(*(torch.zeros(count, dtype=dtype, device=device) for dtype in types))

    def first(self, count: int) -> _Rows:
        return _Rows(*(tensor.narrow(0, 0, count) for tensor in self))


class DeviceSteps:
    """The one cache of a decoder on a device, and the steps on it. Calls take turns.

    recorded: whether steps are recorded, for those who want to see what that changes. A step of
    which the reference computes a part never is: it looks at what tensors hold.
    """

    def __init__(self, decoder: QuantDecoder) -> None:
        # Weak: a decoder owns its steps, and should not wait for the garbage collector.
        self._decoder = weakref.ref(decoder)
        config, self.device = decoder.config, decoder.device
        self.recorded = True
        self._lock = threading.RLock()
        self._stream: Any = None  # of the last call
        self._most_pages = -(-decoder.max_seq_len // PAGE)
        self._vocab = config.vocab
        self.abandoned: deque[int] = deque()  # sequences whose pools are gone; freed in time
        with self.turn():
            self.cache = PagedKVCache(
                config.layers,
                config.kv_heads,
                config.head_dim,
                dtype=decoder.kv_dtype,
                page_size=PAGE,
                max_pages=2**31 // PAGE,  # positions are int32
                device=self.device,
            )
            self._make_buffers()
            self._make_spare()
        self._graphs: dict[tuple[int, int, bool], Recording] = {}
        self._recorded_of: tuple[Any, int] = (None, 0)  # executor, moves of the cache
        self._capturable = True
        self._memory = shared_memory(self.device)
        self._ahead: _Launched | None = None
        self._table: torch.Tensor | None = None  # the page table that the buffer holds
        self._shape = (0, 0)  # of that table in the buffer: batch size, pages per sequence

    def _make_buffers(self) -> None:
        most, device = MAX_BATCH, self.device
        self._rows = _Rows.zeros(most, device)
        self._pages = torch.zeros(most * self._most_pages, dtype=torch.int32, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._penalty = torch.zeros(1, dtype=torch.float32, device=device)
        # [batch, vocab], which tokens have occurred; made when a penalty is asked for.
        self._seen = torch.zeros(0, 0, dtype=torch.bool, device=device)
        pinned = device.type == "cuda"
        # In turns: the next step starts before the tokens of the last are read.
        self._hosts = [torch.zeros(most, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._events = [torch.cuda.Event() if pinned else None for _ in range(2)]

    def _make_spare(self) -> None:
        """A page for the rows that fill up a batch, each with a slot of its own. Zeros: keys that
        are not numbers would be no harm to others, but trouble to look for."""
        self.cache.ensure(FIRST_TOKENS + PAGE)
        spare = self.cache.add()
        self.cache.grow([spare], [PAGE])
        self._spare_page = self.cache.pages(spare)[0]
        for pages in (
            self.cache.k_pages,
            self.cache.v_pages,
            self.cache.k_scale,
            self.cache.v_scale,
        ):
            if pages is not None:
                pages.select(1, self._spare_page).zero_()

    # Calls

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The device and its stream for one call, behind what earlier calls did on other streams.

        inference_mode(False): buffers made in a caller's inference mode could not be changed by
        calls outside of it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
                stream = torch.cuda.current_stream(self.device)
                if self._stream is not None and stream != self._stream:
                    stream.wait_stream(self._stream)
                self._stream = stream
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[PagedKVCache]:
        """The cache, without the step that ran ahead."""
        with self.turn():
            self._undo_ahead()
            while self.abandoned:
                handle = self.abandoned.popleft()
                if handle in self.cache.lengths:
                    self.cache.free(handle)
            yield self.cache

    def _undo_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        there = self.cache.lengths
        for handle, length in zip(ahead.handles, ahead.lengths, strict=True):
            if there.get(handle) == length:
                self.cache.truncate(handle, length - 1)
        self._table = None

    def forward(self, parts: Sequence[tuple[int, Sequence[int]]], last_only: bool) -> torch.Tensor:
        """As `KvPool.forward`; the logits are on the device."""
        with self.alone() as cache:
            handles, counts = [handle for handle, _ in parts], [len(ids) for _, ids in parts]
            batch = cache.reserve(handles, counts)
            tokens = [token for _, part in parts for token in part]
            rows: torch.Tensor | None = None
            if last_only and max(counts) > 1:
                ends = [end - 1 for end in accumulate(counts)]
                rows = on_device(ends, torch.int64, self.device)
            ids = on_device(tokens, torch.int64, self.device)
            return self._executor()(ids, batch, rows, cache)

    def _executor(self) -> Executor:
        decoder = self._decoder()
        assert decoder is not None
        return decoder.executor()

    def decode(self, sequences: Sequence[Request], sampler: Sampler, more: bool) -> list[int]:
        """The next token of each sequence. more: whether another call for the same ones is to come,
        as far as is known. Raises RuntimeError for logits that are not numbers."""
        handles = tuple(sequence.handle for sequence in sequences)
        with self.turn():
            launched, self._ahead = self._ahead, None
            if launched is None or (launched.sampler, launched.handles) != (sampler, handles):
                self._ahead = launched
                with self.alone():
                    self._load(sequences, sampler)
                    launched = self._launch(handles, sampler)
            if more:
                self._ahead = self._launch(handles, sampler)
            tokens = launched.read()
            check_tokens(tokens)
            return tokens

    def warm_up(self, batches: Sequence[int]) -> None:
        """Records the steps of these batch sizes, with up to 1024 tokens per sequence."""
        settings = GenerationSettings(seed=0)
        with self.alone() as cache:
            cache.ensure(CALL_TOKENS)  # as the largest call, which would move the cache
        for count in batches:
            with self.alone() as cache:
                handles = [cache.add() for _ in range(count)]
            try:
                requests = [Request(i, [0], 1, None, handles[i]) for i in range(count)]  # type: ignore[arg-type]
                self.decode(requests, Sampler(settings), more=False)
            finally:
                with self.alone() as cache:
                    for handle in handles:
                        cache.free(handle)

    # Steps

    def _load(self, sequences: Sequence[Request], sampler: Sampler) -> None:
        """Writes the buffers for the step that runs the last tokens of these sequences."""
        n, settings = len(sequences), sampler.settings
        size = batch_of(n)
        fill = size - n
        lengths = self.cache.lengths

        rows = self._rows.first(size)

        def write(buffer: torch.Tensor, values: list[int]) -> None:
            buffer.copy_(on_device(values, buffer.dtype, self.device))

        write(rows.ids, [s.ids[-1] for s in sequences] + [0] * fill)
        write(rows.kv_len, [lengths[s.handle] + 1 for s in sequences] + [*range(1, fill + 1)])
        write(rows.advance, [1] * n + [0] * fill)
        write(rows.seed, [sampler.seed + s.index for s in sequences] + [0] * fill)
        write(rows.offset, [s.new_count for s in sequences] + [0] * fill)
        rows.temperature.fill_(settings.temperature)
        rows.top_k.fill_(settings.top_k)
        rows.top_p.fill_(settings.top_p)
        rows.min_p.fill_(settings.min_p)
        if settings.repetition_penalty != 1.0:
            self._penalty.fill_(settings.repetition_penalty)
            if not self._seen.numel():
                shape = (MAX_BATCH, self._vocab)
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._seen.zero_()
            for row, s in enumerate(sequences):
                ids = on_device(sorted(set(s.ids)), torch.int64, self.device)
                self._seen.select(0, row).index_fill_(0, ids, True)
        self._table = None

    def _launch(self, handles: tuple[int, ...], sampler: Sampler) -> _Launched:
        """Starts the step that the buffers are ready for."""
        n = len(handles)
        lengths = self.cache.grow(handles, [1] * n)
        self._place(handles)
        penalized = sampler.settings.repetition_penalty != 1.0
        self._step_of(*self._shape, penalized).replay()
        self._hosts.reverse()
        self._events.reverse()
        tokens, arrived = self._hosts[0].narrow(0, 0, n), self._events[0]
        tokens.copy_(self._rows.ids.narrow(0, 0, n), non_blocking=True)
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(self.device))
        return _Launched(sampler, handles, tuple(lengths), tokens, arrived)

    def _place(self, handles: tuple[int, ...]) -> None:
        """Brings the page table up to date, if a page has come."""
        table = self.cache.page_table(handles)
        if table is self._table:
            return
        n, pages = table.shape
        self._shape = size, width = batch_of(n), width_of(pages, self._most_pages)
        buffer = self._page_table(size, width)
        buffer.fill_(self._spare_page)
        buffer.narrow(0, 0, n).narrow(1, 0, pages).copy_(table)
        self._table = table

    def _page_table(self, size: int, width: int) -> torch.Tensor:
        return self._pages.narrow(0, 0, size * width).view(size, width)

    def _step_of(self, size: int, width: int, penalized: bool) -> Recording:
        """The step for a shape: recorded, or simply to be called."""
        executor = self._executor()

        def step() -> None:
            self._step(executor, size, width, penalized)

        if self._recorded_of != (executor, self.cache.moves):
            decoder = self._decoder()
            assert decoder is not None
            self._capturable = decoder.uncaptured_because() is None
            if self._graphs and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # one may still be running
            self._graphs.clear()
            # torch refuses to capture into memory whose graphs are all gone.
            self._memory = shared_memory(self.device)
            self._recorded_of = executor, self.cache.moves
        if not (self.recorded and self._capturable):
            return _Called(step)
        key = size, width, penalized
        if key not in self._graphs:
            state = [self._rows.ids, self._rows.kv_len, self._rows.offset, self._seen]
            try:
                self._graphs[key] = record(step, state, self.device, self._memory)
            except BaseException:
                if not self._graphs:  # the failed one was the first of its memory
                    self._memory = shared_memory(self.device)
                raise
        return self._graphs[key]

    def _step(self, executor: Executor, size: int, width: int, penalized: bool) -> None:
        """Everything a step does, on the device alone."""
        rows = self._rows.first(size)
        starts, table = self._starts.narrow(0, 0, size + 1), self._page_table(size, width)
        # Where logits were not numbers the last token is -1 or -2, and whoever reads it raises. The
        # step after it has begun by then and must not look that up: torch's kernels would assert,
        # and the process could not use the GPU any more.
        ids = rows.ids.clamp_min(0)
        logits = executor(ids, Batch(starts, rows.kv_len, table), None, self.cache)
        if penalized:
            seen = self._seen.narrow(0, 0, size)
            seen.scatter_(1, ids.unsqueeze(1), True)
            logits = torch.where(seen, penalize(logits, self._penalty), logits)
        settings = rows.temperature, rows.top_k, rows.top_p, rows.min_p
        tokens = select("sample", self.device)(logits, *settings, rows.seed, rows.offset)
        rows.ids.copy_(tokens)
        rows.kv_len.add_(rows.advance)
        rows.offset.add_(rows.advance)


class _Called:
    """A step that is not recorded."""

    def __init__(self, step: Any) -> None:
        self.replay = step


class DevicePool:
    """Sequences of one call in the decoder's cache; as `KvPool`, and it decodes by itself."""

    def __init__(self, steps: DeviceSteps, tokens: Sequence[int]) -> None:
        """tokens: for each sequence that is there at the same time, how many it may have."""
        self._steps = steps
        self._own: set[int] = set()
        # Pages that nobody can ask for any more; the garbage collector may run in the midst of a
        # call, so that they are only noted.
        weakref.finalize(self, _abandon, steps.abandoned, self._own)
        whole_pages = sum(-(-count // PAGE) * PAGE for count in tokens)
        with steps.alone() as cache:
            cache.ensure(min(whole_pages, CALL_TOKENS))

    def add(self) -> int:
        with self._steps.alone() as cache:
            handle = cache.add()
            self._own.add(handle)
            return handle

    def free(self, handle: int) -> None:
        with self._steps.alone() as cache:
            cache.free(handle)
            self._own.discard(handle)

    def truncate(self, handle: int, length: int) -> None:
        with self._steps.alone() as cache:
            cache.truncate(handle, length)

    def forward(
        self, parts: Sequence[tuple[int, Sequence[int]]], last_only: bool = True
    ) -> torch.Tensor:
        """As `KvPool.forward`; the logits are on the device."""
        return self._steps.forward(parts, last_only)

    def decode(self, sequences: Sequence[Request], sampler: Sampler, more: bool) -> list[int]:
        """As `DeviceSteps.decode`."""
        return self._steps.decode(sequences, sampler, more)


def _abandon(abandoned: deque[int], own: set[int]) -> None:
    abandoned.extend(own)
