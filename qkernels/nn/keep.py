"""Modules whose tensors change device but never their type, and those of them that hold a packed
weight.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

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

# Where a buffer that several modules hold went when the first of them moved: weak both ways.
_moved: Any = WeakIdKeyDictionary()


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
    float_dtype: the type of the layer that this one replaced, None if it never was another; it
    changes with `.half()` and the like, as the type of that layer would have.
    """

    weight: torch.Tensor
    spec: QuantSpec
    float_dtype: torch.dtype | None

    def _hold(self, packed: PackedWeight, float_dtype: torch.dtype | None = None) -> None:
        self.spec = packed.spec
        self._n, self._k = packed.n, packed.k
        self.float_dtype = float_dtype
        self._replaced: tuple[nn.Module, ...] = ()  # a tuple, so that it is no submodule
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        for name in _TENSORS:
            self.register_buffer(name, getattr(packed, name))

    def _share(self, other: HoldsPacked) -> None:
        """Holds the very tensors of `other`, as tied layers do."""
        self.weight = other.weight
        for name in _TENSORS:
            self._buffers[name] = other._buffers[name]

    def _replaces(self, skeleton: nn.Module) -> None:
        """Stands for a module: of its class and with its attributes, its parameters on meta."""
        self._replaced = (skeleton,)
        self.training = skeleton.training
        for name, value in vars(skeleton).items():
            if name.endswith("_hooks") and isinstance(value, dict) and "state_dict" not in name:
                self.__dict__[name] = value  # the same ones, so that their handles still work

    def _skeleton(self) -> nn.Module | None:
        """A copy of the module this one stands for, on its device, to be filled; None if none."""
        if not self._replaced:
            return None
        module = copy.copy(self._replaced[0])
        for store in ("_parameters", "_buffers"):
            module.__dict__[store] = dict(module.__dict__[store])
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(self.weight.device)
        return module

    def _restored(self, dtype: torch.dtype | None, weights: dict[Any, nn.Parameter]) -> nn.Module:
        """The dense module that this one stands for. weights: those made before, which tied
        modules share."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in _TENSORS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            first = _moved[old]() if old in _moved else None
            if first is not None and (first.device, first.dtype) == (new.device, new.dtype):
                self._buffers[name] = first  # a tied layer moved before this one
            else:
                _moved[old] = weakref.ref(new)
        if self.float_dtype is not None:
            probe = torch.empty(0, dtype=self.float_dtype, device=self.weight.device)
            self.float_dtype = fn(probe).dtype
        return self

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
