"""Which keys a query sees, as a few numbers: what models get from us in place of a [B, 1, T, S]
mask.

Transformers describes a mask by a function of (batch, head, query, key) that it composes of known
parts: causal, a window, padding, packed sequences. `seen_keys` recognizes those parts. What it does
not recognize becomes the mask itself, as for `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import masking_utils as host

# The parts of masks, by the functions that make them. They are no public hook of transformers, but
# their names have not changed since masks are made so; tests/test_hf_attention.py holds us to it.
PARTS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
)
_missing = [name for name in PARTS if not hasattr(host, name)]
if _missing:
    raise ImportError(
        f"qkernels.hf: transformers.masking_utils has no {', '.join(_missing)}, of which masks "
        "are made in the versions of transformers that are known to work"
    )
# Newer ones count the positions of packed sequences anew in each, which changes no distance in it.
_remap = getattr(host, "remap_positions_for_packed_sequence", None)


class SeenKeys:
    """Which of its S keys each of T queries in B sequences sees.

    causal: none after its own position; window > 0: only the last `window` up to it; reach >= 0:
    none further than that, to either side. Query i stands at key i + offset, an int or a tensor [].
    valid: [B, S] bool, False for the keys of padding, or None where there is none; past: keys seen
    before these queries [B], with valid only. packed: [B, T] int64, the number of the sequence that
    a token belongs to, within its row of the batch; each row holds its sequences one after another.
    rows: of the flattened [B, T] queries those that are no padding, or None for all; counts: of
    these [B] int32.

    Models that hand masks on to their attention function can carry it. It is not a tensor: a model
    that computes with its mask fails, by name.
    """

    ndim = 4

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        causal: bool,
        window: int = 0,
        reach: int = -1,
        offset: int | Tensor = 0,
        valid: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> None:
        self.batch, self.queries, self.keys = shape
        self.causal, self.window, self.reach = causal, window, reach
        self.offset, self.valid, self.packed = offset, valid, packed
        self.rows: Tensor | None = None
        self.counts: Tensor | None = None
        self.past: Tensor | None = None
        self._kept: dict[str, Any] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 1, self.queries, self.keys

    def contiguous(self) -> SeenKeys:
        return self

    def to(self, *args: Any, **kwargs: Any) -> SeenKeys:
        """As it is: its tensors are made where the model computes."""
        return self

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), called once: all layers of a forward pass share what they take from a mask."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"this model {what} its attention mask, which attn_implementation='qkernels' keeps as "
            "a description and not as a tensor; load the model with attn_implementation='sdpa'"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse("indexes")

    def __add__(self, other: Any) -> NoReturn:
        self._refuse("adds to")

    __radd__ = __mul__ = __rmul__ = __add__

    def dense(self, device: torch.device) -> Tensor:
        """The mask that this describes: [B, 1, T, S] bool."""
        key = torch.arange(self.keys, device=device)
        query = torch.arange(self.queries, device=device)[:, None] + self.offset
        seen = torch.ones(self.queries, self.keys, dtype=torch.bool, device=device)
        if self.causal:
            seen &= key <= query
        if self.window > 0:
            seen &= key > query - self.window
        if self.reach >= 0:
            seen &= (key - query).abs() <= self.reach
        seen = seen.expand(self.batch, 1, -1, -1)
        if self.packed is not None:
            seen = seen & (self.packed[:, None, :, None] == self.packed[:, None, None, :])
        if self.valid is not None:
            seen = seen & self.valid[:, None, None, :]
        return seen


def _made_by(function: Any, maker: Any) -> bool:
    """Whether function is the one that maker defines inside itself."""
    code = getattr(function, "__code__", None)
    return code is not None and code in maker.__code__.co_consts


def _free(function: Any, name: str) -> Any:
    """What a closure knows under a name."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def parts_of(function: Any) -> dict[str, Any] | None:
    """The parts that a mask function is the intersection of: causal, window, reach, packed and
    remapped (positions are those within packed sequences); None if it has others."""
    if function is host.causal_mask_function:
        return {"causal": True}
    if function is host.bidirectional_mask_function:
        return {}
    if _made_by(function, host.sliding_window_overlay):
        return {"window": _free(function, "sliding_window")}
    if _made_by(function, host.sliding_window_bidirectional_overlay):
        return {"reach": _free(function, "sliding_window")}
    if _made_by(function, host.packed_sequence_mask_function):
        return {"packed": _free(function, "packed_sequence_mask")}
    if _remap is not None and _made_by(function, _remap):
        inner = parts_of(_free(function, "mask_function"))
        return None if inner is None else {"remapped": True, **inner}
    if not _made_by(function, host.and_masks):
        return None
    found: dict[str, Any] = {}
    for part in _free(function, "mask_functions"):
        inner = parts_of(part)
        if inner is None or any(name in found and name != "causal" for name in inner):
            return None
        found |= inner
    # Positions that start anew only mean anything within sequences that are kept apart.
    return None if "remapped" in found and "packed" not in found else found


def _padding(seen: SeenKeys, mask: Tensor, q_offset: Any, kv_offset: int) -> None:
    """Puts the padding of a [B, tokens] mask, which may end before the keys do, into seen."""
    batch, tokens = mask.shape
    if batch != seen.batch:
        raise ValueError(
            f"attention_mask is of {batch} sequences, the input of {seen.batch}: expected "
            f"[{seen.batch}, tokens]"
        )
    start = int(q_offset)
    end = start + seen.queries if seen.causal else kv_offset + seen.keys
    if tokens >= end and bool(mask.all()):
        return  # keys after those of the mask, of which a static cache has many, are in the future
    if tokens < kv_offset + seen.keys:
        mask = torch.nn.functional.pad(mask, (0, kv_offset + seen.keys - tokens))
    seen.valid = mask[:, kv_offset : kv_offset + seen.keys]
    if not seen.causal or start + seen.queries > mask.shape[1]:
        return
    seen.past = mask[:, :start].sum(1)
    new = mask[:, start : start + seen.queries]
    if not bool(new.all()):
        seen.rows = new.flatten().nonzero().flatten()
        seen.counts = new.sum(1, dtype=torch.int32)


def seen_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = host.causal_mask_function,
    attention_mask: Tensor | SeenKeys | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> SeenKeys | Tensor:
    """The mask function of `attn_implementation="qkernels"`, with the arguments of
    `transformers.masking_utils.sdpa_mask`: attention_mask is [B, tokens] bool, False at padding.

    Returns a SeenKeys, or for patterns that it cannot express (an or_mask_function, image blocks,
    chunks) the mask [B, 1, T, S] bool, which costs memory and time. Raises ValueError for a mask of
    another batch.
    """
    if isinstance(attention_mask, SeenKeys):  # made before the forward pass, by `generate`
        return attention_mask
    parts = parts_of(mask_function)
    if parts is None:
        options.pop("allow_is_causal_skip", None)
        options.pop("allow_is_bidirectional_skip", None)
        mask = host.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # a static cache's is a tensor
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
            **options,
        )
        assert mask is not None  # nothing was allowed to be skipped
        return mask
    if isinstance(q_offset, Tensor):  # a static cache's own length, which it will count up
        q_offset = q_offset.clone()
    seen = SeenKeys(
        (batch_size, q_length, kv_length),
        causal=parts.get("causal", False),
        window=parts.get("window", 0),
        reach=parts.get("reach", -1),
        offset=q_offset - kv_offset if kv_offset else q_offset,
        packed=parts.get("packed"),
    )
    if attention_mask is not None:
        _padding(seen, attention_mask, q_offset, kv_offset)
    return seen
