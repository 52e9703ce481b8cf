"""Quantized kernels for PyTorch: weights at 2 to 8 bits, and a decoder that runs on them."""

from __future__ import annotations

from . import _library, ops
from .backends import backend, set_backend
from .quant import PackedWeight, PlainWeight, QuantSpec

_library.load()

__version__ = "0.1.0"
__all__ = ["PackedWeight", "PlainWeight", "QuantSpec", "backend", "ops", "set_backend"]
