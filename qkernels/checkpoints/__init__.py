"""Readers of checkpoint formats. Each turns stored tensors into `PlainWeight`, a block of rows at a time."""

from qkernels.checkpoints.errors import CheckpointError
from qkernels.checkpoints.gguf import GGUFFile, TensorInfo, llama_row_order

__all__ = ["CheckpointError", "GGUFFile", "TensorInfo", "llama_row_order"]
