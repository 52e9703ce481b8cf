"""Quantized weights: what their bits mean, where they sit, and how they come to be."""

from .quantize import quantize, quantize_packed
from .spec import E2M1, IQ4_NL, QuantSpec, scheme_act
from .weight import PackedWeight, PlainWeight

__all__ = ["E2M1", "IQ4_NL", "PackedWeight", "PlainWeight", "QuantSpec", "quantize", "quantize_packed", "scheme_act"]
