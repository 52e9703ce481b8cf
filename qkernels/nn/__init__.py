"""Modules that hold quantized weights, and the decoder made of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoder import QuantDecoder
    from .embedding import DenseEmbedding, QuantEmbedding
    from .linear import DenseLinear, QuantLinear
    from .norm import LayerNorm, RMSNorm

_MODULES = {
    "QuantDecoder": "decoder",
    "QuantEmbedding": "embedding",
    "DenseEmbedding": "embedding",
    "QuantLinear": "linear",
    "DenseLinear": "linear",
    "RMSNorm": "norm",
    "LayerNorm": "norm",
}
__all__ = [
    "DenseEmbedding",
    "DenseLinear",
    "LayerNorm",
    "QuantDecoder",
    "QuantEmbedding",
    "QuantLinear",
    "RMSNorm",
]


# On first use: the families in qkernels.models import nn.program, and nn.decoder imports the families.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
