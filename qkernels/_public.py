"""The public names, and what importing them takes: torch, the op definitions and the native
library.
"""

from __future__ import annotations

from . import _library, nn, ops, triton
from .backends import backend, set_backend
from .convert import QuantReport, dequantize_, quantize_
from .hf.layers import replace_decoder_layers_, restore_decoder_layers_
from .info import info
from .nn.decoder import QuantDecoder
from .quant import PackedWeight, PlainWeight, QuantSpec
from .quantize_directory import quantize_directory
from .saving import save_pretrained

_library.load()
triton.register()

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
    "quantize_directory",
    "replace_decoder_layers_",
    "restore_decoder_layers_",
    "save_pretrained",
    "set_backend",
]
