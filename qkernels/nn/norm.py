"""RMSNorm and LayerNorm on the package's kernels."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from .keep import KeepsTypes


class RMSNorm(KeepsTypes):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    weight: [K], kept in float32. x: [..., K] float32, float16 or bfloat16; y has its type.
    """

    center = False

    def __init__(self, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        if weight.dim() != 1:
            raise ValueError(
                f"{type(self).__name__}: expected a weight of shape [K], got {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape:
            raise ValueError(
                f"{type(self).__name__}: expected a bias of shape {list(weight.shape)}, got "
                f"{list(bias.shape)}"
            )
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(
                f"{type(self).__name__}: expected x of shape [..., {self.weight.shape[0]}], got "
                f"{list(x.shape)}"
            )
        rows = x.reshape(-1, x.shape[-1])
        return ops.norm(rows, self.weight, self.bias, eps=self.eps, center=self.center).view(
            x.shape
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


class LayerNorm(RMSNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension; types as in
    RMSNorm.
    """

    center = True
