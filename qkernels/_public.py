"""The public names, and what importing them takes: torch, the op definitions and the native
library.
"""

from __future__ import annotations

from . import _library, nn, ops
from .backends import backend, set_backend
from .convert import QuantReport, dequantize_, quantize_
from .info import info
from .nn.decoder import QuantDecoder
from .quant import PackedWeight, PlainWeight, QuantSpec
from .saving import save_pretrained

_library.load()

__all__ = [
    "PackedWeight",
    "PlainWeight",
    "QuantDecoder",
    "QuantReport",
    "QuantSpec",
    "backend",
    "dequantize_",
    "info",
    "nn",
    "ops",
    "quantize_",
    "save_pretrained",
    "set_backend",
]
