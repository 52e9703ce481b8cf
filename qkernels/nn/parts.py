"""What a decoder is put together from: a module per weight, and tables of rotations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..cache import rope_table
from ..loading import Weight
from ..models import RopeConfig
from ..quant import PackedWeight
from .embedding import DenseEmbedding, QuantEmbedding
from .linear import DenseLinear, QuantLinear
from .norm import RMSNorm


def angles(rope: RopeConfig, positions: int) -> torch.Tensor:
    """[positions, rotary dim] float32: the cosines and sines that `kv_append` rotates by."""
    if rope.factors is None:
        return rope_table(rope.dim, positions, rope.theta, rope.scaling or None)
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim
    inverse = rope.theta**-exponents / torch.tensor(rope.factors, dtype=torch.float64)
    turned = torch.outer(torch.arange(positions, dtype=torch.float64), inverse)
    return torch.cat((turned.cos(), turned.sin()), dim=1).float()


def module_of(
    name: str, weight: Weight, bias: Weight | None, eps: Mapping[str, float], act: str
) -> nn.Module:
    """The module of a matrix or of a norm. eps: of the norms, by the names of their weights."""
    if bias is not None and isinstance(bias, PackedWeight):
        raise TypeError(f"{name}: a bias cannot be packed")
    if name in eps:
        if isinstance(weight, PackedWeight):
            raise TypeError(f"{name}: the weight of a norm cannot be packed")
        return RMSNorm(weight, eps[name], bias)
    if name == "embed.weight":
        return (
            QuantEmbedding(weight) if isinstance(weight, PackedWeight) else DenseEmbedding(weight)
        )
    return (
        QuantLinear(weight, bias, act)
        if isinstance(weight, PackedWeight)
        else DenseLinear(weight, bias)
    )
