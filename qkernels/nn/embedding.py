"""Tables of embeddings, packed or dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.embedding import apply
from ..quant import PackedWeight
from .keep import HoldsPacked, KeepsTypes


class QuantEmbedding(HoldsPacked):
    """Rows of a packed table, times `multiplier`: ids [...] int32 or int64 -> [..., K] of dtype.

    dtype: of the nn.Embedding that it stands for, which `.half()` and the like change; None gives
    float32 whatever happens. padding_idx: kept for others to read; its row is a row.
    round_multiplier: whether that is rounded to dtype before it multiplies. Raises RuntimeError for
    an id out of range.
    """

    def __init__(
        self,
        packed: PackedWeight,
        *,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        multiplier: float = 1.0,
        round_multiplier: bool = False,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.n, packed.k
        self.padding_idx = padding_idx
        self.multiplier, self.round_multiplier = multiplier, round_multiplier
        self._hold(packed, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        dtype = self.float_dtype or torch.float32
        ids = ids.long().contiguous()
        rows = apply(ids, self._op_args(), self._kind, self._buffers["perm"], dtype)
        if self.multiplier == 1.0:
            return rows
        # In two roundings, as the layer that this one stands for.
        return rows * (
            rows.new_tensor(self.multiplier) if self.round_multiplier else self.multiplier
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense table: of the class that this one replaced, nn.Embedding if none. dtype: None
        is that module's, float32 if there was none. Raises ValueError for a table with a
        multiplier that never was another class."""
        return self._restored(dtype, {})

    def _restored(self, dtype: torch.dtype | None, weights: dict[Any, nn.Parameter]) -> nn.Module:
        dtype = dtype or self.float_dtype or torch.float32
        empty = self._skeleton()
        if empty is None:
            if self.multiplier != 1.0:
                raise ValueError("QuantEmbedding: nn.Embedding has no multiplier")
            with torch.device("meta"):
                empty = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        old = empty._parameters["weight"]
        assert old is not None
        key = (id(self.weight), False)
        if key not in weights:
            dense = self.packed.dequantize(dtype)
            weights[key] = nn.Parameter(dense, requires_grad=old.requires_grad)
        empty._parameters["weight"] = weights[key]
        return empty.train(self.training)

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
