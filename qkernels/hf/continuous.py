"""Continuous batching: `model.generate_batch` of transformers on our attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from ..ops.attention import attention_dense

# Continuous batching takes sdpa, eager, and whatever has "flash" in its name. Only for the latter
# it makes no mask of all queries and all keys of a batch, and gives their lengths.
NAME = "qkernels_flash"


def is_packed(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the attention function comes from continuous batching."""
    return isinstance(kwargs.get("cache"), PagedAttentionCache)


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] of all sequences one after another; kwargs:
    the cache, which keeps keys and values and returns them with the past, and lengths. Returns
    [1, T, Hq, D]."""
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "qkernels attention reads no block tables of continuous batching; set "
            "max_blocks_per_request=0 in its configuration"
        )
    q = query[0].transpose(0, 1)
    key, value = kwargs["cache"].update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    k, v = (x[0].transpose(0, 1).contiguous() for x in (key, value))
    starts, kv_starts = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    used, kv_used = int(starts[-1]), int(kv_starts[-1])  # the rest is there to keep shapes fixed
    out = attention_dense(
        q[:used].contiguous(),
        k[:kv_used],
        v[:kv_used],
        starts.int(),
        kv_starts.int(),
        scale=scale,
        causal=True,
        window=window or 0,
        softcap=softcap or 0.0,
        sinks=sinks,
    )
    whole = out.new_zeros(1, query.shape[2], *out.shape[1:])
    whole[0, :used] = out
    return whole


def _only_in_batches(*args: Any, **kwargs: Any) -> Any:
    from .attention import qkernels_attention

    if not is_packed(kwargs):
        raise ValueError(
            f'attn_implementation="{NAME}" is for continuous batching only: use "qkernels"'
        )
    return qkernels_attention(*args, **kwargs)


@contextmanager
def continuous_batching(model: Any) -> Iterator[Any]:
    """Our attention in transformers' continuous batching:

        with qk.hf.continuous_batching(model):
            outputs = model.generate_batch(prompts, generation_config=...)

    model: a causal language model whose attention goes through transformers' AttentionInterface.
    Within the block `generate_batch`, `init_continuous_batching` and
    `continuous_batching_context_manager` compute with it; `model.generate` does not. After it the
    model has the implementation that it had. Keys and values stay in transformers' own cache, in
    floats. Raises ValueError for a model that does not support flash attention, whose hook this is.
    """
    if not getattr(model, "_supports_flash_attn", False):
        raise ValueError(
            f"continuous_batching: {type(model).__name__} does not support attention on sequences "
            "put one after another (_supports_flash_attn)"
        )
    config = model.config.get_text_config()
    before = {id(c): (c, c._attn_implementation) for c in (model.config, config)}
    try:
        for each, _ in before.values():
            each._attn_implementation = NAME
        yield model
    finally:
        for each, name in before.values():
            each._attn_implementation = name


AttentionInterface.register(NAME, _only_in_batches)
