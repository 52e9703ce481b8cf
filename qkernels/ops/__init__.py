"""Typed functions over the ops, one file per family. Importing a family defines its ops."""

from . import decoder as decoder
from .act import QuantAct, quantize_act
from .attention import append_attention, attention, attention_dense, kv_append
from .embedding import embedding
from .gate import gate, gate_quant
from .linear import linear, linear_quant
from .norm import add_norm, add_norm_quant, norm, norm_quant
from .pack import dequantize, pack, unpack
from .position_bias import alibi_slopes, t5_distance_bias
from .sample import sample

__all__ = [
    "QuantAct",
    "add_norm",
    "add_norm_quant",
    "alibi_slopes",
    "append_attention",
    "attention",
    "attention_dense",
    "dequantize",
    "embedding",
    "gate",
    "gate_quant",
    "kv_append",
    "linear",
    "linear_quant",
    "norm",
    "norm_quant",
    "pack",
    "quantize_act",
    "sample",
    "t5_distance_bias",
    "unpack",
]
