"""What replaced layers ask of the host in place of its masks and angles: values made when wanted.

Our layers need to know which tokens are padding and nothing else; the host's own layers, where they
run after all, need its masks [B, 1, T, keys] and its cosines and sines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The attention implementation of a model with replaced layers. For the host's own layers, where
# they run, it is torch's scaled_dot_product_attention.
NAME = "qkernels_layers"


class HostMask:
    """Stands where a layer's mask would.

    padding: [B, keys] bool, False at padding, or None: there is none. overlaid: whether the mask is
    more than that, so that only the host's layers can obey it.
    """

    __slots__ = ("_arguments", "_dense", "overlaid", "padding")

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.padding: torch.Tensor | None = arguments.get("attention_mask")
        skips = arguments.get("allow_is_causal_skip", True) and not arguments.get("use_vmap", False)
        self.overlaid = not skips
        self._arguments = arguments
        self._dense: tuple[torch.Tensor | None] | None = None

    def dense(self) -> torch.Tensor | None:
        """The host's mask, None where it needs none."""
        if self._dense is None:
            self._dense = (ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**self._arguments),)
        return self._dense[0]


def _host_mask(**arguments: Any) -> HostMask:
    return HostMask(arguments)


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **named: Any
) -> Any:
    # Also of a model with layers of its own that shares its configuration with a replaced one.
    if isinstance(attention_mask, HostMask):
        attention_mask = attention_mask.dense()
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, **named)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _host_mask)


class HostAngles:
    """Stands where the host's (cosines, sines) would; they are computed when unpacked."""

    __slots__ = ("_arguments", "_made", "_rotary")

    def __init__(self, rotary: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._rotary, self._arguments = rotary, (arguments, named)
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def made(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._made is None:
            arguments, named = self._arguments
            self._made = type(self._rotary).forward(self._rotary, *arguments, **named)
        return self._made

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.made())


class RotaryForward:
    """The forward of a host's rotary embedding that waits until somebody wants the angles."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary

    def __call__(self, *arguments: Any, **named: Any) -> HostAngles:
        return HostAngles(self.rotary, arguments, named)
