"""The public names, and what importing them takes: torch, the op definitions and the native
library.
"""

from __future__ import annotations

from . import _library, nn, ops
from .backends import backend, set_backend
from .nn.decoder import QuantDecoder
from .quant import PackedWeight, PlainWeight, QuantSpec

_library.load()

__all__ = [
    "PackedWeight",
    "PlainWeight",
    "QuantDecoder",
    "QuantSpec",
    "backend",
    "nn",
    "ops",
    "set_backend",
]
