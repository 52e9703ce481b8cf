"""A quantized KV cache for transformers: our pages inside a `transformers.Cache`.

Pages are [P, Hkv, page, D], those of one sequence side by side, so page tables never change. All
addresses are fixed and all lengths are tensors on the device: a decode step compiles once and can
be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from ..cache import KV_DTYPES, token_bytes
from ..ops.attention import append_attention, attention, kv_append
from ..ops.attention_checks import MAX_HEAD_DIM
from ..reference.attention import unpack_nibbles
from .masks import SeenKeys

PAGE = 64  # tokens; what `QuantDecoder` uses
LAYERS = ("full_attention", "sliding_attention")


class _Stored:
    """What `update` gives back where attn_implementation="qkernels" reads it: a name for the keys
    (or values) of a layer, the new ones still to be written. Written they are by the attention,
    which knows what is padding. It has the shape, dtype and device of the tensor it stands for."""

    def __init__(self, layer: QuantizedStaticLayer, new: Tensor) -> None:
        self.layer, self.new = layer, new

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, dim = self.new.shape
        return torch.Size((batch, heads, self.layer.max_cache_len, dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.new.dtype

    @property
    def device(self) -> torch.device:
        return self.new.device

    def dim(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> NoReturn:
        self.__getattr__("__getitem__")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"this model computes with the keys or values that its cache returned ({name!r}), and "
            "a QuantizedStaticCache has them in quantized pages: use it with "
            "attn_implementation='sdpa', or use another cache"
        )


class StoredKeys(_Stored):
    """Keys of a layer; the attention function of ours calls it."""

    def __init__(self, layer: QuantizedStaticLayer, new: Tensor, values: Tensor) -> None:
        super().__init__(layer, new)
        self.values = values
        self.written = False

    def attend(
        self,
        query: Tensor,
        seen: SeenKeys,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
        distance_bias: Tensor | None,
    ) -> Tensor:
        """Writes what is new, and attends to all: query [B, Hq, T, D] -> [B, T, Hq, D]."""
        batch, heads, queries, dim = query.shape
        layer = self.layer
        q, k, v = (rows_of(x) for x in (query, self.new, self.values))
        rows, counts = seen.rows, seen.counts
        if rows is None or counts is None:
            starts = layer.starts(queries)
        else:
            q, k, v = q[rows], k[rows], v[rows]
            starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        where = (starts, layer.kv_len, layer.page_table, *layer.pages)
        options: dict[str, Any] = {
            "scale": scale,
            "causal": seen.causal,
            "window": seen.window,
            "softcap": softcap,
            "sinks": sinks,
            "distance_bias": distance_bias,
        }
        if self.written:  # layers may share keys: the second one only reads
            out = attention(q, *where, **options)
        else:
            self.written = True
            layer.count(seen, queries)
            out = append_attention(q, k, v, None, None, *where, **options)
        if rows is not None:
            whole = out.new_zeros(batch * queries, heads, dim)
            out = whole.index_copy_(0, rows, out)
        return out.view(batch, queries, heads, dim)

    def write_padded(self) -> Tensor:
        """Writes what is new, padding too, and returns all keys: [B, Hkv, max_cache_len, D]."""
        if not self.written:
            self.written = True
            self.layer.write_padded(self.new, self.values)
        return self.layer.read(0, self.dtype)


class StoredValues(_Stored):
    """Values of a layer."""

    def read(self) -> Tensor:
        """[B, Hkv, max_cache_len, D], after the keys were written."""
        return self.layer.read(1, self.dtype)


def rows_of(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B T, H, D], heads side by side: a view where the layout allows it."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
    dense = rows.stride(2) == 1 and (rows.shape[1] == 1 or rows.stride(1) == rows.shape[2])
    return rows if dense else rows.contiguous()


class QuantizedStaticLayer(CacheLayerMixin):
    """One layer of a QuantizedStaticCache.

    kv_len [B] int32 counts what is stored of each sequence, `seen` [] int64 the tokens that passed,
    padding too: what transformers calls the length.
    """

    is_compileable = True
    is_croppable = True

    def __init__(self, config: Any, max_cache_len: int, dtype: str, window: int = 0) -> None:
        super().__init__()
        self.config, self.max_cache_len, self.kv_dtype = config, max_cache_len, dtype
        self.window = window
        self.is_sliding = window > 0
        self.per_sequence = -(-max_cache_len // PAGE)
        self.seen = torch.tensor(0)
        # How tokens are stored, from the first ones on: without padding (True), or with it.
        self.compact: bool | None = None
        # Tokens before this one, of some sequence, were padding, and are not stored: [] int64.
        self.ragged_until: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        if dim % 16 or dim > MAX_HEAD_DIM or value_states.shape[-1] != dim:
            raise ValueError(
                "QuantizedStaticCache: keys and values must have the same dims per head, a "
                f"multiple of 16 up to {MAX_HEAD_DIM}, got {dim} and {value_states.shape[-1]}"
            )
        device = key_states.device
        kind = KV_DTYPES[self.kv_dtype]
        stored = dim * kind.bits // 8 if kind.scaled else dim
        count = batch * self.per_sequence

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return _fixed(torch.zeros(shape, dtype=dtype, device=device))

        self.batch_size, self.num_heads, self.head_dim = batch, heads, dim
        self.dtype, self.device = key_states.dtype, device
        self.k_pages = zeros((count, heads, PAGE, stored), kind.torch_dtype)
        self.v_pages = zeros((count, heads, PAGE, stored), kind.torch_dtype)
        planes = (count, heads, 2, PAGE)
        self.k_scale = zeros(planes, torch.float16) if kind.scaled else None
        self.v_scale = zeros(planes, torch.float16) if kind.scaled else None
        self.kv_len = zeros((batch,), torch.int32)
        table = torch.arange(count, dtype=torch.int32, device=device)
        self.page_table = _fixed(table.view(batch, self.per_sequence))
        self.one_each = _fixed(torch.arange(batch + 1, dtype=torch.int32, device=device))
        self.seen = _fixed(self.seen.to(device))
        self.is_initialized = True

    @property
    def pages(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Pages and scales of keys and values, as the ops take them."""
        return self.k_pages, self.v_pages, self.k_scale, self.v_scale

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        tokens = self.batch_size * self.per_sequence * PAGE if self.is_initialized else 0
        return tokens and tokens * token_bytes(self.kv_dtype, self.num_heads, self.head_dim)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """key_states, value_states [B, Hkv, T, D], rotated. Returns what attention takes: with
        attn_implementation="qkernels" names for what is stored, else all keys and values, in their
        dtype, [B, Hkv, max_cache_len, D], of which the mask has to hide what is not there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"QuantizedStaticCache: it holds {self.batch_size} sequences, got "
                f"{key_states.shape[0]}: make a new cache for another batch"
            )
        if self.config._attn_implementation == "qkernels":
            keys = StoredKeys(self, key_states, value_states)
            return keys, StoredValues(self, value_states)
        self.write_padded(key_states, value_states)
        return self.read(0, key_states.dtype), self.read(1, key_states.dtype)

    # ---- writing ----

    def starts(self, tokens: int) -> Tensor:
        """query_start of `tokens` new ones of every sequence."""
        return self.one_each if tokens == 1 else self.one_each * tokens

    def _store(self, compact: bool) -> None:
        if self.compact is None:
            self.compact = compact
        elif self.compact != compact:
            raise RuntimeError(
                "QuantizedStaticCache: what it holds was written by another attention "
                "implementation, or with another kind of mask; reset() it before the change"
            )

    def count(self, seen: SeenKeys, tokens: int) -> None:
        """The lengths with the new tokens. Raises ValueError where the mask hides past tokens other
        than those that were padding when they came."""
        self._store(compact=True)
        looks = not torch.compiler.is_compiling() and self.device.type == "cpu"
        if looks:  # a GPU would have to be waited for
            past = self.seen if seen.past is None else seen.past
            if not bool((self.kv_len == past).all()):
                raise ValueError(
                    "QuantizedStaticCache: the attention mask shows "
                    f"{past.expand(self.batch_size).tolist()} past tokens, the cache holds "
                    f"{self.kv_len.tolist()}: give the whole mask with every call, and hide "
                    "nothing that was no padding when it came"
                )
        self.seen.add_(tokens)
        if seen.counts is None:
            self.kv_len.add_(tokens)
        else:
            self.kv_len.add_(seen.counts)
            self.ragged_until = self.seen.clone()

    def write_padded(self, keys: Tensor, values: Tensor) -> None:
        self._store(compact=False)
        tokens = keys.shape[2]
        self.seen.add_(tokens)
        self.kv_len.add_(tokens)
        k, v = rows_of(keys), rows_of(values)
        kv_append(
            k, k, v, None, None, self.starts(tokens), self.kv_len, self.page_table, *self.pages
        )

    def read(self, which: int, dtype: torch.dtype) -> Tensor:
        """All keys (0) or values (1) as floats: [B, Hkv, max_cache_len, D]."""
        pages = (self.k_pages, self.v_pages)[which]
        scale = (self.k_scale, self.v_scale)[which]
        if scale is not None:
            codes = pages if pages.shape[3] == self.head_dim else unpack_nibbles(pages)
            step, zero = scale.float().unbind(2)
            rows = step[..., None] * (codes.float() - zero[..., None])
        else:
            rows = pages
        rows = rows.unflatten(0, (self.batch_size, self.per_sequence)).transpose(1, 2).flatten(2, 3)
        return rows[:, :, : self.max_cache_len].to(dtype)

    # ---- what transformers asks ----

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.device_is_cpu and not torch.compiler.is_compiling():
            self.check_room(query_length)
        return self.max_cache_len, 0

    @property
    def device_is_cpu(self) -> bool:
        return self.seen.device.type == "cpu"

    def check_room(self, tokens: int) -> None:
        """Raises ValueError if there is no room for `tokens` more."""
        seen = int(self.seen)
        if seen + tokens > self.max_cache_len:
            raise ValueError(
                f"QuantizedStaticCache: it holds {seen} tokens and was made for max_cache_len = "
                f"{self.max_cache_len}; {tokens} more do not fit"
            )

    def get_seq_length(self) -> Any:
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        self.compact, self.ragged_until = None, None
        self.seen.zero_()
        if self.is_initialized:
            for tensor in (*self.pages, self.kv_len):
                if tensor is not None:
                    tensor.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens, a number that is not positive. Raises
        ValueError for other numbers, more tokens than there are, and tokens some of which were
        padding."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"QuantizedStaticCache: crop takes the negative number of tokens to remove, got "
                f"{tokens_to_remove}"
            )
        if not tokens_to_remove or not self.is_initialized:
            return
        left = int(self.seen) + tokens_to_remove
        least = 0 if self.ragged_until is None else int(self.ragged_until)
        if left < least:
            raise ValueError(
                f"QuantizedStaticCache: {-tokens_to_remove} of {int(self.seen)} tokens cannot be "
                f"removed, those before {least} are padded"
            )
        self.seen.add_(tokens_to_remove)
        self.kv_len.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return
        beams = beam_idx.to(self.device)
        self.kv_len.copy_(self.kv_len[beams])
        for tensor in self.pages:
            if tensor is not None:
                each = tensor.unflatten(0, (self.batch_size, self.per_sequence))
                each.copy_(each[beams])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._another_batch()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._another_batch()

    def _another_batch(self) -> NoReturn:
        raise NotImplementedError(
            "QuantizedStaticCache: the number of its sequences is fixed; make a cache for the "
            "batch that is needed"
        )

    def offload(self) -> None:
        raise NotImplementedError("QuantizedStaticCache: its layers cannot be offloaded")


def _fixed(tensor: Tensor) -> Tensor:
    """tensor, whose address compiled code may keep."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class QuantizedStaticCache(Cache):
    """A KV cache of fixed size for transformers models, quantized or not, in this package's pages.

        cache = qk.hf.QuantizedStaticCache(model.config, max_cache_len=2048, dtype="int8")
        model.generate(**inputs, past_key_values=cache)

    config: of the model, whose layers attend in full or through a window. max_cache_len: tokens of
    a sequence, prompt, padding and answer. dtype: "int8", "int4", "float16", "bfloat16" or
    "float32". Integers have a float16 scale and zero point per token and head. Memory is taken when
    the first tokens come, for as many sequences as there are; `nbytes` tells it.

    With attn_implementation="qkernels" attention reads the codes as they are, and padding takes no
    room. With another implementation every step dequantizes all of the cache: right, but slow.

    Raises ValueError for another dtype, for max_cache_len below 1 and for layers of other kinds.
    Using it raises ValueError when it is full or is given another batch.
    """

    max_cache_len: int = 0  # older hosts have a property of that name, which cannot be set

    def __init__(self, config: Any, max_cache_len: int, dtype: str = "int8") -> None:
        if dtype not in KV_DTYPES:
            raise ValueError(
                f"QuantizedStaticCache: dtype must be one of {', '.join(KV_DTYPES)}, got {dtype!r}"
            )
        if max_cache_len < 1:
            raise ValueError(
                f"QuantizedStaticCache: max_cache_len must be at least 1, got {max_cache_len}"
            )
        text = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(text)
        unknown = sorted(set(types) - set(LAYERS))
        if unknown:
            raise ValueError(
                f"QuantizedStaticCache: layers must be {' or '.join(LAYERS)}, this model has "
                f"{', '.join(unknown)}"
            )
        layers: list[Any] = [
            QuantizedStaticLayer(text, max_cache_len, dtype, option.get("sliding_window") or 0)
            for option in options
        ]
        self.kv_dtype, self.max_cache_len = dtype, max_cache_len
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedStaticLayer))

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """max_cache_len."""
        return self.max_cache_len
