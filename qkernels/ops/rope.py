"""Rotary angles as a table: what `kv_append` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _number(scaling: Mapping[str, Any], key: str, kind: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"rope_table: {kind} scaling needs a positive {key}, got {value!r}")
    return float(value)


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between
    interpolated."""
    factor, low, high, original = (
        _number(scaling, key, "llama3")
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    if high <= low:
        raise ValueError(
            f"rope_table: high_freq_factor ({high}) must be above low_freq_factor ({low})"
        )
    turns = original * inverse / (2 * math.pi)  # over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (keep + (1 - keep) / factor)


def _yarn(inverse: Tensor, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), with the options of Hugging Face configurations; also the factor on
    cos and sin."""
    factor = _number(scaling, "factor", "yarn")
    original = _number(scaling, "original_max_position_embeddings", "yarn")
    dim = 2 * len(inverse)

    def dim_of(
        turns: float,
    ) -> float:  # the pair that makes this many turns over the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.get("beta_fast") or 32.0), dim_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(dim // 2, dtype=inverse.dtype) - low) / (high - low)).clamp(0, 1)
    inverse = inverse * (1 - stretched) + inverse / factor * stretched

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = (
            temperature(above) / temperature(below) if above and below else temperature(1.0)
        )
    return inverse, float(attention_factor)


def rope_table(
    rotary_dim: int,
    max_positions: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
) -> Tensor:
    """Rotary angles for `kv_append`: [max_positions, rotary_dim] float32, cosines of rotary_dim / 2
    angles, then sines.

    scaling: the `rope_scaling` (or `rope_parameters`) of a Hugging Face configuration: rope_type
    default, linear, llama3 or yarn with their parameters. YaRN's attention factor multiplies the
    table. Angles are computed in float64. Raises ValueError for another rope_type, a parameter that
    is missing or not positive, or an odd rotary_dim.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rope_table: rotary_dim must be even and positive, got {rotary_dim}")
    if max_positions < 0:
        raise ValueError(f"rope_table: max_positions must not be negative, got {max_positions}")
    if not theta > 1:
        raise ValueError(f"rope_table: theta must be above 1, got {theta}")
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    inverse = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    magnitude = 1.0
    if kind == "linear":
        inverse = inverse / _number(scaling, "factor", "linear")
    elif kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif kind == "yarn":
        inverse, magnitude = _yarn(inverse, theta, scaling)
    elif kind != "default":
        raise ValueError(
            f"rope_table: rope_type must be default, linear, llama3 or yarn, got {kind!r}"
        )
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), inverse)
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * magnitude).float()
