"""Bytes that one decode step reads, for the bandwidth a speed means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_KV_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
_KV_SCALE_BYTES = 4  # integer KV: float16 scale and zero point per token and head


def kv_bytes(
    kv_dtype: str, kv_heads: int, head_dim: int, windows: Sequence[int], context: int
) -> int:
    """Bytes of keys and values read at `context` tokens. windows: per layer, tokens a query sees;
    0: all.
    """
    bits = _KV_BITS[kv_dtype]
    per_head = head_dim * bits // 8 + (_KV_SCALE_BYTES if bits < 16 else 0)
    tokens = sum(min(context, window) if window else context for window in windows)
    return 2 * kv_heads * per_head * tokens


def bytes_per_step(decoder: Any, context: int) -> tuple[int, int]:
    """Bytes of weights and of keys and values that a step of one sequence reads at `context`
    tokens.

    Weights: everything but an embedding table that only the lookup uses, of which a step reads one
    row.
    """
    config = decoder.config
    kv = kv_bytes(decoder.kv_dtype, config.kv_heads, config.head_dim, config.windows, context)
    return decoder.weight_bytes, kv
