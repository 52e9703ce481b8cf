"""bitsandbytes checkpoints: LLM.int8, and NF4 and FP4 with a stated error.

A linear `<path>` [N, K] has

- LLM.int8: weight int8 [N, K] and SCB float32 [N]: w = weight * SCB / 127;
- NF4 and FP4: weight uint8 [N K / 2, 1], the even element in the high nibble; weight.quant_map
  float32 [16]; weight.absmax, one per block of `blocksize` consecutive elements: float32 or,
  nested, uint8 with weight.nested_absmax and weight.nested_quant_map; the JSON in
  weight.quant_state.bitsandbytes__nf4 (or __fp4), as uint8. w = quant_map[code] * absmax.

The 16 levels become integers of 8 bits over a common divisor, which moves a weight by at most
`Levels.error` times the absmax of its block: 0.0029 for NF4 and for FP4. Neighbouring levels of NF4
are 0.08 to 0.30 apart. Loading says so in a warning, once.

Source: bitsandbytes 0.48, `functional.py` (QuantState) and `nn/modules.py`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant import PlainWeight, QuantSpec
from .errors import CheckpointError
from .quantized import (
    Part,
    QuantizedFormat,
    Settings,
    StoredMatrix,
    finite,
    names_path,
)
from .safetensors_directory import TensorSource

_STATE = "weight.quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class Levels:
    """16 float levels as integers / divisor. error: the largest |level - integer / divisor|."""

    table: tuple[int, ...]
    divisor: float
    error: float

    @classmethod
    def of(cls, levels: Tensor) -> Levels:
        """The integers from -127 to 127 and the divisor, in steps of 1/64, of least error. levels
        [16], the largest magnitude above 0."""
        exact = levels.double()
        divisors = torch.arange(64 * 64, 128 * 64, dtype=torch.float64) / 64 / exact.abs().max()
        integers = (exact[None, :] * divisors[:, None]).round()
        error = (integers / divisors[:, None] - exact).abs().amax(1)
        error[integers.abs().amax(1) > 127] = torch.inf
        best = int(error.argmin())
        table = tuple(int(v) for v in integers[best].tolist())
        return cls(table, float(divisors[best]), float(error[best]))


class BitsAndBytes(QuantizedFormat):
    """LLM.int8 exactly; NF4 and FP4, nested or not, within `Levels.error`. Blocks that do not
    divide a row are refused."""

    name = "bitsandbytes"

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        settings = Settings(raw, where)
        eight, four = settings.flag("load_in_8bit", False), settings.flag("load_in_4bit", False)
        if eight == four:
            raise CheckpointError(
                f"{where}: expected one of load_in_8bit and load_in_4bit to be true, got "
                f"{eight} and {four}"
            )
        self._four = four
        self._dense = settings.names("llm_int8_skip_modules")
        self._levels: dict[tuple[float, ...], Levels] = {}

    def parts(
        self, source: TensorSource, path: str, n: int, k: int, kind: str
    ) -> dict[str, Part] | None:
        weight, state = f"{path}.weight", self._state_name(source, path)
        stored = f"{path}.SCB" in source.shapes or state in source.shapes
        dense = source.dtypes.get(weight) not in (torch.int8, torch.uint8)
        skipped = names_path((*self._dense, "lm_head"), path)
        if kind != "Linear" or (not stored and (dense or skipped)):
            return None
        if not self._four:
            parts = {
                weight: Part((n, k), (torch.int8,)),
                f"{path}.SCB": Part((n,), (torch.float32,)),
            }
            if f"{path}.weight_format" in source.shapes:
                parts[f"{path}.weight_format"] = Part((), (torch.uint8,))
            return parts
        parts = {
            weight: Part((-(-n * k // 2), 1), (torch.uint8,)),
            f"{weight}.quant_map": Part((16,), (torch.float32,)),
        }
        if state not in source.shapes:  # what it says is not known: only that it is missing
            return parts | {state: Part((1,), (torch.uint8,))}
        said = _State.read(source, state, n, k)
        blocks = -(-n * k // said.blocksize)
        parts[state] = Part(source.shapes[state], (torch.uint8,))
        nested = said.nested_blocksize
        absmax = torch.uint8 if nested else torch.float32
        parts[f"{weight}.absmax"] = Part((blocks,), (absmax,))
        if nested:
            parts[f"{weight}.nested_absmax"] = Part((-(-blocks // nested),), (torch.float32,))
            parts[f"{weight}.nested_quant_map"] = Part((256,), (torch.float32,))
        return parts

    @staticmethod
    def _state_name(source: TensorSource, path: str) -> str:
        names = [f"{path}.{_STATE}{kind}" for kind in _TYPES]
        return next((name for name in names if name in source.shapes), names[0])

    def open(self, source: TensorSource, path: str, n: int, k: int, kind: str) -> StoredMatrix:
        return self._open_4bit(source, path, n, k) if self._four else _int8(source, path, n, k)

    def _open_4bit(self, source: TensorSource, path: str, n: int, k: int) -> StoredMatrix:
        weight, state = f"{path}.weight", self._state_name(source, path)
        size = _State.read(source, state, n, k).blocksize
        if size % 16 or k % size:
            raise CheckpointError(
                f"{source.where}: {path}: blocks of {size} must be a multiple of 16 and divide "
                f"rows of {k}"
            )
        levels = finite(source, f"{weight}.quant_map", source.whole(f"{weight}.quant_map"))
        if not bool(levels.any()):
            raise CheckpointError(f"{source.where}: tensor {weight}.quant_map is all zeros")
        key = tuple(levels.tolist())
        if key not in self._levels:
            self._levels[key] = Levels.of(levels)
            warnings.warn(
                f"{source.where}: the 16 float levels of {path} become integers of 8 bits; weights "
                f"move by at most {self._levels[key].error:.2g} of the largest of their block",
                stacklevel=2,
            )
        table = self._levels[key]
        spec = QuantSpec(4, size, "float32", table=table.table)
        absmax = _absmax(source, weight, state, n, k)
        scale = (finite(source, f"{weight}.absmax", absmax) / table.divisor).view(n, k // size)

        def read(start: int, stop: int) -> PlainWeight:
            pairs = source.rows(weight, start * k // 2, stop * k // 2).view(stop - start, k // 2)
            codes = torch.empty(stop - start, k, dtype=torch.uint8)
            codes[:, 0::2], codes[:, 1::2] = pairs >> 4, pairs & 15
            return PlainWeight(spec, codes, scale[start:stop].contiguous())

        return StoredMatrix(spec, n, k, read)


@dataclass(frozen=True)
class _State:
    """What the quant_state of a 4-bit matrix says. nested_blocksize: 0 if absmax is float32."""

    blocksize: int
    nested_blocksize: int
    nested_offset: float

    @classmethod
    def read(cls, source: TensorSource, name: str, n: int, k: int) -> _State:
        where = f"{source.where}: tensor {name}"
        if source.dtypes[name] != torch.uint8 or len(source.shapes[name]) != 1:
            raise CheckpointError(f"{where} must be uint8 [bytes]")
        try:
            said = json.loads(bytes(source.whole(name).tolist()))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} must hold JSON: {error}") from error
        if not isinstance(said, dict):
            raise CheckpointError(f"{where} must hold a JSON object, got {type(said).__name__}")
        settings = Settings(said, where)
        if said.get("shape") != [n, k]:
            raise settings.fail("shape", said.get("shape"), str([n, k]))
        nested = said.get("nested_blocksize")
        state = cls(
            settings.integer(["blocksize"]),
            0 if nested is None else settings.integer(["nested_blocksize"]),
            said.get("nested_offset", 0.0),
        )
        if state.blocksize < 1 or state.nested_blocksize < 0:
            raise settings.fail("blocksize", state.blocksize, "positive")
        if not isinstance(state.nested_offset, (int, float)):
            raise settings.fail("nested_offset", state.nested_offset, "a number")
        return state


def _absmax(source: TensorSource, weight: str, state: str, n: int, k: int) -> Tensor:
    """[blocks] float32, unpacked if it is nested."""
    said, stored = _State.read(source, state, n, k), source.whole(f"{weight}.absmax")
    if not said.nested_blocksize:
        return stored
    code = source.whole(f"{weight}.nested_quant_map")[stored.long()]
    scale = source.whole(f"{weight}.nested_absmax")
    scale = scale.repeat_interleave(said.nested_blocksize)[: len(code)]
    return code * scale + said.nested_offset


def _int8(source: TensorSource, path: str, n: int, k: int) -> StoredMatrix:
    layout = f"{path}.weight_format"
    if layout in source.shapes and int(source.whole(layout)) != 0:
        raise CheckpointError(
            f"{source.where}: tensor {layout} must be 0 (rows), got {int(source.whole(layout))}"
        )
    spec = QuantSpec(8, -1, "float32")
    scale = finite(source, f"{path}.SCB", source.whole(f"{path}.SCB"))[:, None] / 127

    def read(start: int, stop: int) -> PlainWeight:
        codes = (source.rows(f"{path}.weight", start, stop).to(torch.int16) + 128).to(torch.uint8)
        return PlainWeight(spec, codes, scale[start:stop])

    return StoredMatrix(spec, n, k, read)
