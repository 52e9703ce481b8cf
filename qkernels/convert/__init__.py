"""Any model's layers to packed ones and back, in place: `quantize_` and `dequantize_`."""

from .convert import dequantize_, quantize_
from .report import DenseTensor, LayerReport, QuantReport, QuantWarning, Skipped

__all__ = [
    "DenseTensor",
    "LayerReport",
    "QuantReport",
    "QuantWarning",
    "Skipped",
    "dequantize_",
    "quantize_",
]
