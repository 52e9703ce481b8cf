"""Integers that change from call to call of an op, in a tensor that Python writes by itself."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

_TYPE_CODES = {torch.int32: "i", torch.int64: "q"}


class IntBuffer:
    """`size` integers, written by Python and read by ops.

    A decode step reads so many weights that the caches hold nothing else after it. The first
    `torch.tensor` then takes 85 us instead of 3, the first `write` 10 (SmolLM2-135M, AMD EPYC with
    2 busy cores). The tensor is the same one every time: it is for calls that are over before the
    next `write`.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._numbers = array(_TYPE_CODES[dtype], [0]) * size
        self._tensor = (
            torch.frombuffer(self._numbers, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        )

    def write(self, values: Sequence[int]) -> torch.Tensor:
        """Replaces all of the integers -> [size]. Raises ValueError for another number of them."""
        if len(values) != len(self._numbers):
            raise ValueError(f"expected {len(self._numbers)} integers, got {len(values)}")
        self._numbers[:] = array(self._numbers.typecode, values)
        return self._tensor
