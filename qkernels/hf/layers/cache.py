"""Keys and values of replaced layers: pages of ours inside a cache object of the host.

The host makes a `DynamicCache`; the first forward through replaced layers puts layers of ours into
it, so that whatever the host asks of the cache (its length, to be cut, reordered for beams,
repeated, reset, copied) is asked of the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ...cache import Batch, LayerCache, PagedKVCache
from ...generate import PREFILL_CHUNK
from ...int_buffer import IntBuffer
from ...nn.executor import Executor
from ...nn.steps import PAGE


@dataclass(frozen=True)
class CacheShape:
    """What the pages of a model look like. max_seq_len: tokens of the longest sequence."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    max_seq_len: int
    device: torch.device

    @property
    def model(self) -> tuple[int, int, int, torch.device]:
        return self.layers, self.kv_heads, self.head_dim, self.device


@dataclass
class Step:
    """The new tokens of one forward. counts: of each sequence, padding left out. rows: where they
    are among the host's [B * T], None: all of them. layers: those that have not seen them yet."""

    counts: list[int]
    rows: torch.Tensor | None
    size: tuple[int, int]
    before: list[int]  # lengths without them
    layers: set[int]


class _Inputs:
    """What an executor takes beside rows, for parts of these lengths."""

    def __init__(self, counts: list[int]) -> None:
        ends = list(accumulate(counts, initial=0))
        self.counts = counts
        self.kv_len = IntBuffer(len(counts), torch.int32)
        self.query_start = torch.tensor(ends, dtype=torch.int32)
        self.select = torch.arange(ends[-1])


class Sequences:
    """A batch of sequences in pages, and where the host believes them to be.

    length: tokens of the host, padding included. Of each sequence: lengths, without padding, and
    shifts, by how much the host counts its positions higher (rotations see differences only).
    """

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self._cache = PagedKVCache(
            shape.layers,
            shape.kv_heads,
            shape.head_dim,
            dtype=shape.dtype,
            page_size=PAGE,
            max_pages=2**31 // PAGE,  # max_seq_len is the limit, for each sequence
            device=shape.device,
        )
        self._handles: list[int] = []
        self.length = 0
        self.lengths: list[int] = []
        self._shifts: list[int | None] = []
        self._padding: torch.Tensor | None = None  # [B, length] bool; None: there was none
        self._pending: Step | None = None
        self._inputs: _Inputs | None = None

    @property
    def batch(self) -> int:
        return len(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inputs": None}  # its tensors are on memory of Python's

    # ---- new tokens ----

    def extend(
        self,
        batch: int,
        count: int,
        padding: torch.Tensor | None,
        positions: torch.Tensor | None,
        layers: int,
    ) -> Step:
        """The step of `count` tokens more for each of `batch` sequences.

        padding: [batch, length + count] bool, False at padding. positions: [1 or batch, count], as
        the host has them. layers: how many will see the tokens one by one, 0: all at once. Raises
        ValueError where these do not continue what is here, or beyond max_seq_len.
        """
        if self._pending is not None and self._pending.layers:
            raise ValueError(
                f"layers {sorted(self._pending.layers)} have not seen the tokens before these: "
                "every layer must, in turn; start again with a new cache"
            )
        if not self._handles:
            self._handles = [self._cache.add() for _ in range(batch)]
            self.lengths, self._shifts = [0] * batch, [None] * batch
        elif batch != len(self._handles):
            raise ValueError(f"the cache has {len(self._handles)} sequences, got {batch}")
        new = self._new_tokens(batch, count, padding)
        counts = [count] * batch if new is None else new.sum(1).tolist()
        longest = max((a + b for a, b in zip(self.lengths, counts, strict=True)), default=0)
        if longest > self.shape.max_seq_len:
            raise ValueError(
                f"a sequence would have {longest} tokens, the replaced layers take "
                f"{self.shape.max_seq_len}: see max_seq_len of replace_decoder_layers_"
            )
        shifts = self._shifts if positions is None else self._shifted(positions, new, count)
        rows = None if new is None else new.reshape(-1).nonzero().squeeze(1)
        step = Step(counts, rows, (batch, count), self.lengths, set(range(layers)))
        self._shifts = shifts
        if new is not None or self._padding is not None:
            assert padding is not None
            self._padding = padding.clone()
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        self.length += count
        self._pending = step
        return step

    def _new_tokens(
        self, batch: int, count: int, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """[batch, count] bool, where new tokens are; None: everywhere."""
        if padding is None:
            if self._padding is not None:
                raise ValueError(
                    "attention_mask is missing; earlier tokens were padding, so it must be given "
                    f"for all {self.length + count} tokens"
                )
            return None
        wanted = (batch, self.length + count)
        if tuple(padding.shape) != wanted:
            raise ValueError(
                f"attention_mask must be {list(wanted)} here (earlier tokens are part of it), got "
                f"{list(padding.shape)}"
            )
        if self._padding is None and bool(padding.all()):
            return None
        past, new = padding[:, : self.length], padding[:, self.length :]
        same = past.all() if self._padding is None else torch.equal(past, self._padding)
        if not same:
            raise ValueError(
                "attention_mask has changed for tokens that are in the cache already; replaced "
                "layers leave padding out of it, so it must stay as it was"
            )
        return new

    def _shifted(
        self, positions: torch.Tensor, new: torch.Tensor | None, count: int
    ) -> list[int | None]:
        """The shifts after these positions, checked to follow the tokens before them."""
        batch = len(self._handles)
        if (
            positions.dim() != 2
            or positions.shape[0] not in (1, batch)
            or (positions.shape[1] != count)
        ):
            raise ValueError(
                f"position_ids must be [{batch}, {count}] here, got {list(positions.shape)}"
            )
        if new is None:
            first = positions[:, 0].tolist()
            if count > 1 and not bool((positions.diff(dim=1) == 1).all()):
                raise ValueError(_ONE_BY_ONE.format("they do not"))
            starts: list[int | None] = first * (batch // len(first))
        else:
            own = new.long().cumsum(1) - 1
            starts = []
            for row, own_row, there in zip(positions.expand(batch, -1), own, new, strict=True):
                differences = (row - own_row)[there].unique().tolist()
                if len(differences) > 1:
                    raise ValueError(_ONE_BY_ONE.format("they do not"))
                starts.append(differences[0] if differences else None)
        shifts = []
        for i, start in enumerate(starts):
            shift, known = None if start is None else start - self.lengths[i], self._shifts[i]
            if shift is not None and known is not None and shift != known:
                raise ValueError(
                    _ONE_BY_ONE.format(
                        f"sequence {i} went on at {self.lengths[i] + known}, got {start}"
                    )
                )
            shifts.append(known if shift is None else shift)
        return shifts

    def pending(self, layer: int, size: tuple[int, int]) -> Step | None:
        """The step that layers are taking one by one, if `layer` has yet to. Raises ValueError for
        another number of tokens."""
        step = self._pending
        if step is None or layer not in step.layers:
            return None
        if step.size != size:
            raise ValueError(
                f"layer {layer} must take {list(step.size)} tokens as the layers before it, got "
                f"{list(size)}"
            )
        return step

    def undo(self, step: Step) -> None:
        """Forgets the tokens of a step that has failed."""
        for handle, length in zip(self._handles, step.before, strict=True):
            if self._cache.lengths[handle] > length:
                self._cache.truncate(handle, length)
        self.lengths, self._pending = step.before, None
        self.length -= step.size[1]
        if self._padding is not None:
            self._padding = self._padding[:, : self.length]

    def run(
        self, step: Step, execute: Executor, x: torch.Tensor, layer: int | None
    ) -> torch.Tensor:
        """Rows [tokens, hidden] through all layers at once, or through one of them, which must be
        among those of the step -> [tokens, hidden]."""
        cache = self._cache if layer is None else _OneLayer(self._cache, layer)
        grows = layer is None or len(step.layers) == self.shape.layers
        if layer is not None or x.shape[0] <= PREFILL_CHUNK:
            out = execute(x, *self._batch(self._handles, step, step.counts, grows), cache)  # type: ignore[arg-type]
        else:
            out = torch.empty_like(x)
            for rows, part in _chunks(step.counts):
                out[rows] = execute(x[rows], *self._batch(self._handles, step, part, True), cache)  # type: ignore[arg-type]
        if layer is not None:
            step.layers.discard(layer)
        return out

    def _batch(
        self, handles: list[int], step: Step, counts: list[int], grows: bool
    ) -> tuple[Batch, torch.Tensor]:
        if 0 in counts:
            pairs = [(h, n) for h, n in zip(handles, counts, strict=True) if n]
            handles, counts = [h for h, _ in pairs], [n for _, n in pairs]
        if grows:
            lengths = self._cache.grow(handles, counts)
        else:
            all_lengths = self._cache.lengths
            lengths = [all_lengths[handle] for handle in handles]
        if self._cache.device.type != "cpu":
            ends = list(accumulate(counts, initial=0))
            start, kv_len = self._cache._ints(ends), self._cache._ints(lengths)
            select = torch.arange(ends[-1], device=self._cache.device)
            return Batch(start, kv_len, self._cache.page_table(handles)), select
        if self._inputs is None or self._inputs.counts != counts:
            self._inputs = _Inputs(counts)
        inputs = self._inputs
        kv_len = inputs.kv_len.write(lengths)
        return Batch(inputs.query_start, kv_len, self._cache.page_table(handles)), inputs.select

    # ---- what the host asks of a cache ----

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens of the host, of all sequences."""
        if not 0 <= count <= self.length:
            raise ValueError(f"the cache has {self.length} tokens, {count} cannot be removed")
        keep = self.length - count
        if self._padding is None:
            left = [length - count for length in self.lengths]
        else:
            self._padding = self._padding[:, :keep]
            left = self._padding.sum(1).tolist()
        for handle, length in zip(self._handles, left, strict=True):
            self._cache.truncate(handle, length)
        self.length, self.lengths, self._pending = keep, left, None

    def take(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what rows[i] was; a row may be taken several times, or not at all."""
        kept = set(rows)
        for i, handle in enumerate(self._handles):
            if i not in kept:
                self._cache.free(handle)
        used: set[int] = set()
        handles = []
        for row in rows:
            handles.append(
                self._cache.fork(self._handles[row]) if row in used else self._handles[row]
            )
            used.add(row)
        self._handles = handles
        self.lengths = [self.lengths[row] for row in rows]
        self._shifts = [self._shifts[row] for row in rows]
        if self._padding is not None:
            self._padding = self._padding[list(rows)]

    def reset(self) -> None:
        for handle in self._handles:
            self._cache.free(handle)
        self._handles, self.lengths, self._shifts = [], [], []
        self.length, self._padding, self._pending = 0, None, None


_ONE_BY_ONE = (
    "position_ids: replaced layers number the tokens of a sequence one by one, padding left out, "
    "and {}"
)


class _OneLayer:
    """The pages of one layer, whichever is asked for: the program of a single layer has its own
    number, in a cache of one layer too."""

    def __init__(self, cache: PagedKVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def layer(self, _: int) -> LayerCache:
        return self._cache.layer(self._layer)


def _chunks(counts: list[int]) -> Iterator[tuple[slice | torch.Tensor, list[int]]]:
    """Parts of a prefill: rows of it, and how many of each sequence."""
    size = max(1, PREFILL_CHUNK // len(counts))
    begins = list(accumulate(counts, initial=0))
    for at in range(0, max(counts), size):
        part = [min(max(count - at, 0), size) for count in counts]
        if len(counts) == 1:
            yield slice(at, at + part[0]), part
            continue
        rows = [torch.arange(b + at, b + at + n) for b, n in zip(begins, part, strict=False) if n]
        yield torch.cat(rows), part


class PagedLayer(CacheLayerMixin):
    """A layer of the host's cache whose keys and values are in `sequences`. The first layer passes
    on what the host asks of every one."""

    is_croppable = True
    supports_early_init = False
    is_sliding = False  # all keys are kept; a window is the business of attention

    def __init__(self, sequences: Sequences, index: int) -> None:
        super().__init__()
        self.sequences, self.index = sequences, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError(_UPDATED)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError(_UPDATED)

    @property
    def batch_size(self) -> int:
        if not self.sequences.batch:
            raise AttributeError("batch_size: the cache is empty")
        return self.sequences.batch

    def get_seq_length(self) -> int:
        return self.sequences.length

    def get_max_length(self) -> int:
        return self.sequences.shape.max_seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.sequences.length + query_length, 0

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def reset(self) -> None:
        if self.index == 0:
            self.sequences.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                "crop: expected minus the number of tokens to remove, got a positive "
                f"{tokens_to_remove}"
            )
        if self.index == 0:
            self.sequences.crop(-tokens_to_remove)

    def _take(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.index == 0 and self.sequences.batch:
            self.sequences.take(rows(torch.arange(self.sequences.batch)).tolist())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take(lambda rows: rows[beam_idx.cpu()])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(lambda rows: rows[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(lambda rows: rows.repeat_interleave(repeats))


_UPDATED = (
    "this cache belongs to replaced decoder layers, which write it themselves; the host's own "
    "layers (with adapters inside, or for a gradient) need one of their own, from the first token "
    "on"
)


def is_ours(cache: Any) -> bool:
    """Whether a host's cache holds tokens in pages of ours."""
    layers = getattr(cache, "layers", None)
    first = layers[0] if layers else None
    return isinstance(first, PagedLayer) and first.sequences.length > 0


def sequences_of(cache: Any, shape: CacheShape) -> Sequences:
    """The sequences in a host's cache; an empty DynamicCache gets layers of ours.

    Raises TypeError for another kind of cache, ValueError for one that is full of something else.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a DynamicCache, got {type(cache).__name__}")
    first = cache.layers[0] if cache.layers else None
    if isinstance(first, PagedLayer):
        found = first.sequences
        if found.shape.model != shape.model:
            raise ValueError(
                f"past_key_values are those of a model with (layers, KV heads, head_dim, device) "
                f"{found.shape.model}, this one has {shape.model}"
            )
        return found
    if not isinstance(cache, DynamicCache) or cache.offloading:
        what = f"an offloading {type(cache).__name__}" if cache.offloading else type(cache).__name__
        raise TypeError(
            "replaced layers keep keys and values themselves, in kv_dtype: past_key_values must be "
            f"a DynamicCache (leave cache_implementation at its default), got {what}"
        )
    if cache.get_seq_length():
        raise ValueError(
            f"past_key_values hold {cache.get_seq_length()} tokens of the host's own layers; "
            "replaced layers begin with an empty cache"
        )
    sequences = Sequences(shape)
    cache.layers[:] = [PagedLayer(sequences, i) for i in range(shape.layers)]
    cache.layer_class_to_replicate = None  # that made layers on the way
    return sequences
