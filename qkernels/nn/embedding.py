"""Tables of embeddings, packed or dense."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..quant import PackedWeight
from .keep import HoldsPacked, KeepsTypes


class QuantEmbedding(HoldsPacked):
    """Rows of a packed table: ids [...] int64 -> [..., K] float32. Raises RuntimeError for an id
    out of range.
    """

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.n, packed.k
        self._hold(packed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, self.packed)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}"


class DenseEmbedding(KeepsTypes):
    """Rows of a float table in the type that its checkpoint has: ids [...] int64 -> [..., K]
    float32.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight).float()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight.dtype}"
