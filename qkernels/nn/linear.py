"""Linear layers on packed weights, and dense ones beside them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..ops.linear import ACTS, apply, default_act_group, resolve_act
from ..quant import PackedWeight, QuantSpec
from .keep import HoldsPacked, KeepsTypes


class QuantLinear(HoldsPacked, nn.Linear):
    """y = x W^T + bias with a packed W.

    x: [..., K] float32, float16 or bfloat16; y: [..., N] of its type; under torch.autocast x takes
    its type first, as with nn.Linear. bias: [N], kept in float32, or None. act: "int8" quantizes x
    at run time, "float" does not, "auto" depends on the device. dtype: of the layer that it stands
    for, if any (see `HoldsPacked.float_dtype`).
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        act: str = "auto",
        *,
        dtype: torch.dtype | None = None,
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
        self._hold(packed, dtype)
        self._act_group = default_act_group(packed)
        fixed = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.register_parameter("bias", fixed)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        spec: str | QuantSpec = "W4A16",
        *,
        group_size: int | None = None,
        algo: str = "auto",
        act: str = "auto",
    ) -> QuantLinear:
        """The packed form of an nn.Linear, or of the Conv1D of transformers; arguments as in
        `qk.quantize_`. Raises TypeError for another module, or one with a forward of its own."""
        from ..convert.convert import quantized_layer

        return quantized_layer(linear, spec, group_size, algo, act)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense layer: of the class that this one replaced, nn.Linear if none. dtype: None is
        that layer's, float32 if there was none."""
        return self._restored(dtype, {})

    def _restored(self, dtype: torch.dtype | None, weights: dict[Any, nn.Parameter]) -> nn.Module:
        def like(old: nn.Parameter | None, values: torch.Tensor | None) -> nn.Parameter | None:
            asks = old is None or old.requires_grad
            return None if values is None else nn.Parameter(values, requires_grad=asks)

        dtype = dtype or self.float_dtype or torch.float32
        empty = self._skeleton()
        if empty is None:
            with torch.device("meta"):
                empty = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        transposed = not isinstance(empty, nn.Linear)
        key = (id(self.weight), transposed)
        if key not in weights:
            dense = self.packed.dequantize(dtype)
            made = like(
                empty._parameters["weight"], dense.t().contiguous() if transposed else dense
            )
            assert made is not None
            weights[key] = made
        bias = None if self.bias is None else self.bias.detach().to(dtype, copy=True)
        empty._parameters["weight"] = weights[key]
        empty._parameters["bias"] = like(empty._parameters.get("bias"), bias)
        return empty.train(self.training)

    @property
    def base_layer(self) -> Any:
        """There is none. PEFT asks every layer that it wraps: without our hooks it would take codes
        for values, so it is stopped here."""
        if "peft" in sys.modules and "qkernels.peft" not in sys.modules:
            raise RuntimeError(
                "QuantLinear: PEFT needs `import qkernels.peft` before it wraps packed layers: its "
                "own merge would change their codes as if they were weights"
            )
        raise AttributeError("QuantLinear has no base_layer")

    def reset_parameters(self) -> None:
        raise RuntimeError(
            "QuantLinear: a packed weight cannot be initialised; make a new layer from a "
            "PackedWeight"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device
        casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
        if casts and x.is_floating_point() and x.dtype != torch.float64:  # as nn.Linear
            x = x.to(torch.get_autocast_dtype(device.type))
        if x.dim() and x.stride(-1) != 1:
            x = x.contiguous()  # the op wants dense rows; nn.Linear takes a transposed x too
        return apply(
            x,
            self._op_args(),
            self._kind,
            self._buffers["perm"],
            self._parameters["bias"],
            resolve_act(self.act, device),
            self._act_group,
        )

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
