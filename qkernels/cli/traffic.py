"""Bytes that one decode step reads, for the bandwidth a speed means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def kv_bytes(
    kv_dtype: str, kv_heads: int, head_dim: int, windows: Sequence[int], context: int
) -> int:
    """Bytes of keys and values read at `context` tokens. windows: per layer, tokens a query sees;
    0: all.
    """
    from qkernels.cache import token_bytes  # here: it imports torch

    tokens = sum(min(context, window) if window else context for window in windows)
    return token_bytes(kv_dtype, kv_heads, head_dim) * tokens


def bytes_per_step(decoder: Any, context: int) -> tuple[int, int]:
    """Bytes of weights and of keys and values that a step of one sequence reads at `context`
    tokens.

    Weights: everything but an embedding table that only the lookup uses, of which a step reads one
    row.
    """
    config = decoder.config
    kv = kv_bytes(decoder.kv_dtype, config.kv_heads, config.head_dim, config.windows, context)
    return decoder.weight_bytes, kv
