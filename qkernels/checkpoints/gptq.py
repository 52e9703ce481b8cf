"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A linear `<path>` [N, K] of b bits has, with G groups along K:

- qweight int32 [K b / 32, N]: codes, a stream of bits along K (3 bits: 32 codes in 3 words);
- qzeros int32 [G, N b / 32]: zero points, a stream along N. `checkpoint_format` "gptq" stores them
  less 1, modulo 2^b; "gptq_v2" as they are;
- scales [G, N], float16 as a rule;
- g_idx int32 [K]: the group of each column. Without it columns are grouped by position.

w[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]). Source: AutoGPTQ 0.7,
`auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
    group_index,
    make_spec,
)
from .safetensors_directory import TensorSource

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class _Layer:
    bits: int
    group_size: int
    desc_act: bool


class GPTQ(QuantizedFormat):
    """GPTQ with bits of 2, 3, 4, 8, symmetric or not, in act-order or not, and the `dynamic`
    overrides of GPTQModel. Marlin and BitBLAS layouts are refused."""

    name = "gptq"

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        settings = Settings(raw, where)
        self._where = where
        # GPTQModel calls it "format" in its own file.
        key = "checkpoint_format" if raw.get("checkpoint_format") is not None else "format"
        self._v2 = settings.text(key, "gptq", "gptq", "gptq_v2") == "gptq_v2"
        if settings.flag("is_marlin_format", False):
            raise CheckpointError(f"{where}: the Marlin layout is not supported, only GPTQ's own")
        settings.text("pack_dtype", "int32", "int32")
        self._default = _layer(settings)
        self._head = settings.flag("lm_head", False)
        dynamic = raw.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise settings.fail("dynamic", dynamic, "a mapping from patterns to settings")
        self._dynamic = [self._override(key, value) for key, value in dynamic.items()]

    def _override(self, key: str, value: Any) -> tuple[re.Pattern[str], _Layer | None]:
        """GPTQModel: "-:pattern" leaves layers dense, "+:pattern" or "pattern" changes settings."""
        where = f"{self._where}: dynamic {key!r}"
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{where} is no regular expression: {error}") from error
        if key.startswith("-:"):
            return pattern, None
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{where} must be a mapping of settings, got {value!r}")
        layer = self._default
        return pattern, _layer(Settings({**vars(layer), **value}, where))

    def _layer_at(self, path: str) -> _Layer | None:
        for pattern, layer in self._dynamic:
            if pattern.match(path):
                return layer
        return self._default

    def parts(
        self, source: TensorSource, path: str, n: int, k: int, kind: str
    ) -> dict[str, Part] | None:
        layer = self._layer_at(path)
        stored = any(f"{path}.{part}" in source.shapes for part in ("qweight", "qzeros", "scales"))
        if kind != "Linear" or layer is None:
            return None
        if not stored and (f"{path}.weight" in source.shapes or not self._expects(path)):
            return None
        groups = 1 if layer.group_size == -1 else -(-k // layer.group_size)
        parts = {
            f"{path}.qweight": Part((words(k, layer.bits), n), (torch.int32,)),
            f"{path}.qzeros": Part((groups, words(n, layer.bits)), (torch.int32,)),
            f"{path}.scales": Part((groups, n), FLOATS),
        }
        if layer.desc_act or f"{path}.g_idx" in source.shapes:
            parts[f"{path}.g_idx"] = Part((k,), (torch.int32, torch.int64))
        return parts

    def _expects(self, path: str) -> bool:
        return self._head or path.rpartition(".")[2] != "lm_head"

    def open(self, source: TensorSource, path: str, n: int, k: int, kind: str) -> StoredMatrix:
        layer = self._layer_at(path)
        assert layer is not None
        bits, middle = layer.bits, 1 << (layer.bits - 1)
        g_idx = group_index(source, f"{path}.g_idx", layer.group_size, k, layer.desc_act)
        # Scales and zeros are whole in memory, the codes never are: they are b to 4 b times larger.
        scale = finite(source, f"{path}.scales", source.whole(f"{path}.scales")).T
        zero = unpack_bits(source.whole(f"{path}.qzeros"), bits, n).T
        if not self._v2:
            zero = (zero + 1) & ((1 << bits) - 1)
        zeros = bool((zero != middle).any())
        spec = make_spec(
            source, path, bits, layer.group_size, k, scale.dtype, zeros, g_idx is not None
        )

        def read(start: int, stop: int) -> PlainWeight:
            packed = source.columns(f"{path}.qweight", start, stop)
            return PlainWeight(
                spec,
                unpack_bits(packed.T, bits, k).contiguous(),
                scale[start:stop].contiguous(),
                zero[start:stop].contiguous() if zeros else None,
                g_idx=g_idx,
            )

        return StoredMatrix(spec, n, k, read)

    def is_padding(self, source: TensorSource, name: str) -> bool:
        """AutoGPTQ gave every linear a bias, of zeros where the model has none."""
        path, _, part = name.rpartition(".")
        if part != "bias" or f"{path}.qweight" not in source.shapes:
            return False
        bias: Tensor = source.whole(name)
        return not bool(bias.any())


def _layer(settings: Settings) -> _Layer:
    layer = _Layer(
        settings.integer(["bits"], BITS),
        settings.group_size(["group_size"]),
        settings.flag("desc_act", False),
    )
    return replace(layer, desc_act=False) if layer.group_size == -1 else layer
