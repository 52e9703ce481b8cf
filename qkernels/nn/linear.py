"""Linear layers on packed weights, and dense ones beside them."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..ops.linear import ACTS
from ..quant import PackedWeight
from .keep import HoldsPacked, KeepsTypes


class QuantLinear(HoldsPacked, nn.Linear):
    """y = x W^T + bias with a packed W.

    x: [..., K] float32, float16 or bfloat16; y: [..., N] of its type. bias: [N], kept in float32,
    or None. act: "int8" quantizes x at run time, "float" does not, "auto" depends on the device.
    """

    def __init__(
        self, packed: PackedWeight, bias: torch.Tensor | None = None, act: str = "auto"
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would allocate a float weight
        if bias is not None and bias.shape != (packed.n,):
            raise ValueError(
                f"QuantLinear: expected a bias of shape [{packed.n}], got {list(bias.shape)}"
            )
        if act not in ("auto", *ACTS):
            raise ValueError(f"QuantLinear: act must be auto, int8 or float, got {act!r}")
        self.in_features, self.out_features = packed.k, packed.n
        self.act = act
        self._hold(packed)
        fixed = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.bias = fixed  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        raise RuntimeError(
            "QuantLinear: a packed weight cannot be initialised; make a new layer from a "
            "PackedWeight"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.packed, self.bias, act=self.act)

    def extra_repr(self) -> str:
        shape = f"{self.in_features}, {self.out_features}"
        return f"{shape}, {self.spec}, act={self.act}, bias={self.bias is not None}"


class DenseLinear(KeepsTypes):
    """y = x W^T + bias with a float W in the type that its checkpoint has.

    weight: [N, K] float32, float16 or bfloat16. x is rounded to that type first, products are
    accumulated as torch.nn.functional.linear does for it, y is [..., N] float32, and the float32
    bias is added last.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        fixed = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.bias = fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight).float()
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        shape = f"{self.in_features}, {self.out_features}"
        return f"{shape}, {self.weight.dtype}, bias={self.bias is not None}"
