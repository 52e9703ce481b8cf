"""AWQ checkpoints of the layout "gemm", as AutoAWQ writes them.

A linear `<path>` [N, K] of 4 bits has, with G groups along K:

- qweight int32 [K, N / 8]: nibble j of word i holds column 8 i + ORDER[j];
- qzeros int32 [G, N / 8]: zero points, in the same order; none with zero_point false;
- scales [G, N], float16 as a rule.

w[n, k] = scales[k // group, n] * (code[k, n] - zero[k // group, n]); without zero points, zero is
8. Source: AutoAWQ 0.2.7, `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..quant import PlainWeight
from .bits import unpack_bits, words
from .errors import CheckpointError
from .quantized import (
    FLOATS,
    Part,
    QuantizedFormat,
    Settings,
    StoredMatrix,
    finite,
    make_spec,
    names_path,
)
from .safetensors_directory import TensorSource

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


class AWQ(QuantizedFormat):
    """AWQ gemm. The layouts gemv, gemv_fast, marlin, exllama and ipex are refused."""

    name = "awq"

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        settings = Settings(raw, where)
        settings.integer(["bits", "w_bit"], (BITS,))
        # transformers 5 writes the layout as "format", before it was "version".
        for key in ("version", "format"):
            settings.text(key, "gemm", "gemm")
        self._group_size = settings.group_size(["group_size", "q_group_size"])
        self._zeros = settings.flag("zero_point", True)
        self._dense = settings.names("modules_to_not_convert")

    def parts(
        self, source: TensorSource, path: str, n: int, k: int, kind: str
    ) -> dict[str, Part] | None:
        stored = any(f"{path}.{part}" in source.shapes for part in ("qweight", "qzeros", "scales"))
        if kind != "Linear":
            return None
        skipped = names_path((*self._dense, "lm_head"), path)
        if not stored and (skipped or f"{path}.weight" in source.shapes):
            return None
        groups = 1 if self._group_size == -1 else -(-k // self._group_size)
        parts = {
            f"{path}.qweight": Part((k, words(n, BITS)), (torch.int32,)),
            f"{path}.scales": Part((groups, n), FLOATS),
        }
        if self._zeros or f"{path}.qzeros" in source.shapes:
            parts[f"{path}.qzeros"] = Part((groups, words(n, BITS)), (torch.int32,))
        return parts

    def open(self, source: TensorSource, path: str, n: int, k: int, kind: str) -> StoredMatrix:
        if self._group_size != -1 and k % self._group_size:
            raise CheckpointError(
                f"{source.where}: {path}: {k} columns are no multiple of group_size "
                f"{self._group_size}"
            )
        scale = finite(source, f"{path}.scales", source.whole(f"{path}.scales")).T
        zero = None
        if f"{path}.qzeros" in source.shapes:
            zero = unpack_bits(source.whole(f"{path}.qzeros"), BITS, n, ORDER).T
            zero = None if bool((zero == 1 << (BITS - 1)).all()) else zero
        spec = make_spec(source, path, BITS, self._group_size, k, scale.dtype, zero is not None)

        def read(start: int, stop: int) -> PlainWeight:
            # Blocks begin at multiples of 64, so at a word.
            packed = source.columns(f"{path}.qweight", start // 8, words(stop, BITS))
            codes = unpack_bits(packed, BITS, stop - start, ORDER).T
            return PlainWeight(
                spec,
                codes.contiguous(),
                scale[start:stop].contiguous(),
                None if zero is None else zero[start:stop].contiguous(),
            )

        return StoredMatrix(spec, n, k, read)
