"""Typed functions over the ops, one file per family. Importing a family defines its ops."""

from .act import QuantAct, quantize_act
from .embedding import embedding
from .gate import gate, gate_quant
from .linear import linear, linear_quant
from .norm import add_norm, add_norm_quant, norm, norm_quant
from .pack import dequantize, pack, unpack
from .sample import sample

__all__ = [
    "QuantAct",
    "add_norm",
    "add_norm_quant",
    "dequantize",
    "embedding",
    "gate",
    "gate_quant",
    "linear",
    "linear_quant",
    "norm",
    "norm_quant",
    "pack",
    "quantize_act",
    "sample",
    "unpack",
]
