"""The float32 definition of every op: the oracle of the tests, and a backend of its own (`qk.backend("reference")`)."""

from .act import quantize_act
from .embedding import embedding
from .linear import linear, linear_quant
from .pack import dequantize, pack, unpack

__all__ = ["dequantize", "embedding", "linear", "linear_quant", "pack", "quantize_act", "unpack"]
