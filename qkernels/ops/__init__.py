"""Typed functions over the ops, one file per family. Importing a family defines its ops."""

from .act import QuantAct, quantize_act
from .embedding import embedding
from .linear import linear, linear_quant
from .pack import dequantize, pack, unpack

__all__ = ["QuantAct", "dequantize", "embedding", "linear", "linear_quant", "pack", "quantize_act", "unpack"]
