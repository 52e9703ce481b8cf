"""Modules whose tensors change device but never their type, and those of them that hold a packed
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..quant import PackedWeight, QuantSpec
from ..quant.weight import check_finite

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TENSORS = (
    "scale",
    "zero",
    "block_scale",
    "block_zero",
    "table",
    "perm",
)  # of a PackedWeight, beside its codes


class KeepsTypes(nn.Module):
    """`.half()`, `.bfloat16()` and `.to(dtype)` leave the tensors of such a module alone;
    `.to(device)` moves them.

    Scales and minima are part of a format, and the kernels take norm weights and biases in float32:
    a cast would change values, or make the next call fail.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            bits = tensor.detach().view(_INTEGER_OF_SIZE[tensor.element_size()])
            return fn(bits).view(tensor.dtype)

        return super()._apply(keep, recurse)


class HoldsPacked(KeepsTypes):
    """Keeps a PackedWeight as tensors of the module: the codes in `.weight`, the rest under their
    own names.

    weight: [Np, Kp * bits / 8] int8. It is two-dimensional and int8 because that is what PEFT and
    tensor-parallel loaders look for; a float `.weight` would make PEFT's merge drop the adapter
    without a word.
    """

    weight: torch.Tensor
    spec: QuantSpec

    def _hold(self, packed: PackedWeight) -> None:
        self.spec = packed.spec
        self._n, self._k = packed.n, packed.k
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        for name in _TENSORS:
            self.register_buffer(name, getattr(packed, name))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = {name: state_dict.get(prefix + name) for name in _TENSORS}
        check_finite({n: t for n, t in given.items() if isinstance(t, torch.Tensor)}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def packed(self) -> PackedWeight:
        """The weight, on the tensors of this module."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return PackedWeight(self.spec, self._n, self._k, self.weight.detach(), **tensors)
