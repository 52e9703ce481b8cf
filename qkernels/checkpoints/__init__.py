"""Readers of checkpoint formats: stored tensors become `PlainWeight`, a block of rows at a time."""

from .errors import CheckpointError
from .gguf import GGUFFile, TensorInfo

__all__ = ["CheckpointError", "GGUFFile", "TensorInfo"]
