"""The float32 definition of every op: the oracle of the tests, and a backend of its own (`qk.backend("reference")`)."""

from .act import quantize_act
from .embedding import embedding
from .gate import gate, gate_quant
from .linear import linear, linear_quant
from .norm import add_norm, add_norm_quant, norm, norm_quant
from .pack import dequantize, pack, unpack
from .sample import sample

__all__ = [
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
