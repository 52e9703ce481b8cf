"""The public names, and what importing them takes: torch, the op definitions and the native
library.
"""

from __future__ import annotations

from . import _library, ops
from .backends import backend, set_backend
from .quant import PackedWeight, PlainWeight, QuantSpec

_library.load()

__all__ = ["PackedWeight", "PlainWeight", "QuantSpec", "backend", "ops", "set_backend"]
