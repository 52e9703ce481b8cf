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

# Of a tensor of bytes, or of one-byte floats, the one view of it that pickling makes.
_byte_views: Any = WeakIdKeyDictionary()

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


def _viewed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.view(dtype), the same object each time: tied modules share their tensors."""
    made = _byte_views.get(tensor)
    if made is None or made.data_ptr() != tensor.data_ptr():  # other memory was put under it
        made = torch.empty(0, dtype=dtype, device=tensor.device)
        # Not by .view, whose result would keep its base, the key here, alive.
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        _byte_views[tensor] = made.set_(tensor.untyped_storage(), *place)
    return _byte_views[tensor]


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
        self._kind, self._group = packed.kind, packed.group
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
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As in torch, but another format is an error: a copy would cast it, floats to codes."""
        given = {
            name: tensor
            for name in ("weight", *_TENSORS)
            if isinstance(tensor := state_dict.get(prefix + name), torch.Tensor)
        }
        wrong = []
        for name, tensor in given.items():
            own = self.weight if name == "weight" else self._buffers[name]
            if own is None:
                wrong.append(f"it has no {name}")
            elif (own.dtype, own.shape) != (tensor.dtype, tensor.shape):
                wrong.append(
                    f"{name} must be {own.dtype} {list(own.shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        if wrong:
            layer = f"{prefix.removesuffix('.') or type(self).__name__}: "
            error_msgs.append(f"{layer}{self.spec} [{self._n}, {self._k}]: {'; '.join(wrong)}")
            return
        check_finite({name: t for name, t in given.items() if name != "weight"}, prefix)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def __getstate__(self) -> dict[str, Any]:
        """pickle cannot read the 8-bit floats of torch back: they go as bytes."""
        state = dict(self.__dict__)
        scale = self._buffers["scale"]
        if scale is not None and scale.is_floating_point() and scale.element_size() == 1:
            state["_buffers"] = {**self._buffers, "scale": _viewed(scale, torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        scale, dtype = self._buffers["scale"], self.spec.scale_dtype
        if scale is not None and scale.dtype != dtype:
            self._buffers = {**self._buffers, "scale": _viewed(scale, dtype)}

    def _op_args(self) -> tuple[Any, ...]:
        """`PackedWeight.op_args` on the tensors of this module, without making one."""
        b = self._buffers
        return (
            self._parameters["weight"], b["scale"], b["zero"], b["block_scale"], b["block_zero"],
            b["table"], self.spec.bits, self._group, self._n, self._k,
        )  # fmt: skip

    @property
    def packed(self) -> PackedWeight:
        """The weight, on the tensors of this module."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return PackedWeight(self.spec, self._n, self._k, self.weight.detach(), **tensors)
