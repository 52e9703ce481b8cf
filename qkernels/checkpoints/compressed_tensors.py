"""compressed-tensors checkpoints with integer weights, as llm-compressor and `save_pretrained`
write them.

A linear or embedding `<path>` [N, K] of b bits has, with G groups along K (one for the strategies
"channel" and "tensor") and offset = 2^(b-1):

- pack-quantized: weight_packed int32 [N, ceil(K b / 32)], the value + offset as a stream of bits
  along K; weight_shape int64 [2]; asymmetric: weight_zero_point int32 [ceil(N b / 32), G], the zero
  point + offset as a stream along N (older files: int8 [N, G]);
- int-quantized and naive-quantized: weight int8 [N, K]; asymmetric: weight_zero_point int8 [N, G];
- both: weight_scale [N, G], [N, 1] or [1], float32, float16 or bfloat16;
- in act-order: weight_g_idx int32 [K].

w = scale * (value - zero point). Source: the compressed-tensors package 0.20,
`compressors/pack_quantized`, `compressors/naive_quantized`, `utils/match.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant import PlainWeight
from ..quant.spec import BITS
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

PACKED, PLAIN = "pack-quantized", ("int-quantized", "naive-quantized")
FORMATS = (PACKED, *PLAIN)


@dataclass(frozen=True)
class _Scheme:
    """How the weights of one config group are stored. group_size: -1 for a scale per row, 0 for one
    of the whole tensor. int8_activations: they are quantized at run time, by token."""

    format: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    int8_activations: bool

    def groups(self, k: int) -> int:
        return -(-k // self.group_size) if self.group_size > 0 else 1


class CompressedTensors(QuantizedFormat):
    """Integer weights of 2 to 8 bits, with any number of config groups. Float formats (fp8, nvfp4,
    mxfp4), sparsity, transforms, block scales, static activation scales and quantized caches are
    refused by name."""

    name = "compressed-tensors"

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        settings = Settings(raw, where)
        self._where = where
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            value = raw.get(key)
            if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
                raise CheckpointError(f"{where}: {key} = {value!r} is not supported")
        self._ignore = settings.names("ignore")
        groups = raw.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise settings.fail("config_groups", groups, "a mapping of at least one group")
        # By target, in order: a later group takes a target over, as in the package.
        self._targets: dict[str, _Scheme | None] = {}
        for name, group in groups.items():
            at = f"{where}: config_groups.{name}"
            if not isinstance(group, Mapping):
                raise CheckpointError(f"{at} must be a mapping, got {group!r}")
            scheme = _scheme(Settings(group, at), raw.get("format"))
            for target in Settings(group, at).names("targets"):
                self._targets[target] = scheme
        for pattern in (*self._targets, *self._ignore):
            if pattern.startswith("re:"):
                _compiled(pattern, where)

    def _scheme_at(self, path: str, kind: str) -> _Scheme | None:
        if any(_matches(target, path, kind) for target in self._ignore):
            return None
        # Names first, then patterns, then classes; each in alphabetical order, as in the package.
        order = sorted(self._targets, key=lambda t: (t == kind, "re:" in t, t))
        return next((self._targets[t] for t in order if _matches(t, path, kind)), None)

    def act(self, path: str, kind: str) -> str:
        scheme = self._scheme_at(path, kind)
        return "int8" if scheme is not None and scheme.int8_activations else "float"

    def parts(
        self, source: TensorSource, path: str, n: int, k: int, kind: str
    ) -> dict[str, Part] | None:
        scheme = self._scheme_at(path, kind)
        scale, weight = f"{path}.weight_scale", f"{path}.weight"
        stored = scale in source.shapes or f"{path}.weight_packed" in source.shapes
        if scheme is None:
            return None
        if not stored and source.dtypes.get(weight) in FLOATS:
            return None  # a model in memory that has been decompressed
        groups = scheme.groups(k)
        shapes: list[tuple[int, ...]] = [(n, groups)]
        if scheme.group_size == -1:
            shapes.append((n,))
        elif scheme.group_size == 0:
            shapes = [(1,), (), (1, 1)]
        scale_shape = _given(source, scale, shapes)
        parts = {scale: Part(scale_shape, FLOATS)}
        zero, integer = f"{path}.weight_zero_point", (torch.int8,)
        if scheme.format == PACKED:
            packed = Part((n, words(k, scheme.bits)), (torch.int32,))
            shape = Part((2,), (torch.int64, torch.int32))
            parts |= {f"{path}.weight_packed": packed, f"{path}.weight_shape": shape}
        else:
            parts[weight] = Part((n, k), integer)
        if not scheme.symmetric or zero in source.shapes:
            if scheme.format == PACKED and source.dtypes.get(zero) != torch.int8:
                parts[zero] = Part((words(n, scheme.bits), groups), (torch.int32,))
            else:
                parts[zero] = Part(_given(source, zero, shapes), integer)
        if scheme.act_order or f"{path}.weight_g_idx" in source.shapes:
            parts[f"{path}.weight_g_idx"] = Part((k,), (torch.int32, torch.int64))
        return parts

    def open(self, source: TensorSource, path: str, n: int, k: int, kind: str) -> StoredMatrix:
        scheme = self._scheme_at(path, kind)
        assert scheme is not None
        bits, group_size = scheme.bits, scheme.group_size or -1
        if scheme.format == PACKED:
            shape = source.whole(f"{path}.weight_shape").tolist()
            if shape != [n, k]:
                raise CheckpointError(
                    f"{source.where}: tensor {path}.weight_shape must hold {[n, k]}, got {shape}"
                )
        name = f"{path}.weight_scale"
        scale = finite(source, name, source.whole(name)).reshape(-1, scheme.groups(k))
        scale = _narrowest(scale.expand(n, -1))
        zero = _zeros(source, f"{path}.weight_zero_point", scheme, n, k)
        name = f"{path}.weight_g_idx"
        unset = name in source.shapes and bool((source.whole(name) == -1).all())
        g_idx = None if unset else group_index(source, name, group_size, k, scheme.act_order)
        spec = make_spec(
            source, path, bits, group_size, k, scale.dtype, zero is not None, g_idx is not None
        )

        def read(start: int, stop: int) -> PlainWeight:
            if scheme.format == PACKED:
                codes = unpack_bits(source.rows(f"{path}.weight_packed", start, stop), bits, k)
            else:
                codes = _codes(source, f"{path}.weight", start, stop, bits)
            return PlainWeight(
                spec,
                codes.contiguous(),
                scale[start:stop].contiguous(),
                None if zero is None else zero[start:stop].contiguous(),
                g_idx=g_idx,
            )

        return StoredMatrix(spec, n, k, read)


def _scheme(group: Settings, default_format: Any) -> _Scheme | None:
    """The scheme of a config group; None if it quantizes no weights."""
    where = group.where
    weights = group.raw.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise group.fail("weights", weights, "a mapping")
    given = group.raw.get("format") or default_format
    given = getattr(given, "value", given)
    if given not in FORMATS:
        raise CheckpointError(
            f"{where}: format {given!r} is not supported; supported are {', '.join(FORMATS)}"
        )
    if group.raw.get("output_activations"):
        raise CheckpointError(f"{where}: output_activations are not supported")
    inputs = group.raw.get("input_activations")
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            raise group.fail("input_activations", inputs, "a mapping")
        at = Settings(inputs, f"{where}.input_activations")
        at.text("type", "int", "int")
        if at.raw.get("dynamic") is not True:
            raise at.fail("dynamic", at.raw.get("dynamic", False), "true (static scales are not)")
    at = Settings(weights, f"{where}.weights")
    at.text("type", "int", "int")
    bits = at.integer(["num_bits"], BITS)
    size = weights.get("group_size")
    fallback = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = at.text("strategy", fallback, "tensor", "channel", "group")
    group_size = {"tensor": 0, "channel": -1}.get(strategy)
    if group_size is None:
        group_size = at.group_size(["group_size"])
    order = getattr(weights.get("actorder"), "value", weights.get("actorder"))
    # "weight" (or "static") only says in which order the columns were quantized.
    at.text("actorder", "weight", "weight", "static", "group", "dynamic")
    by_group = order in ("group", "dynamic") and group_size > 0
    symmetric = at.flag("symmetric", True)
    return _Scheme(str(given), bits, group_size, symmetric, by_group, inputs is not None)


def _compiled(target: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise CheckpointError(f"{where}: {target!r} is no regular expression: {error}") from error


def _matches(target: str, path: str, kind: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return target in (path, kind)


def _given(source: TensorSource, name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that the tensor has, if it is one of `shapes`; else the first of them."""
    given = source.shapes.get(name)
    return given if given in shapes else shapes[0]


def _narrowest(scale: Tensor) -> Tensor:
    """Scales in 16 bits where nothing is lost: a file may hold them in the model's type."""
    if scale.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(scale.to(dtype).float(), scale):
                return scale.to(dtype)
    return scale


def _codes(source: TensorSource, name: str, start: int, stop: int, bits: int) -> Tensor:
    """Rows of int8 values as codes, [rows, K] uint8."""
    values, half = source.rows(name, start, stop), 1 << (bits - 1)
    if bits < 8:
        low, high = (int(v) for v in values.aminmax())
        if low < -half or high >= half:
            raise CheckpointError(
                f"{source.where}: tensor {name} must hold values from {-half} to {half - 1}, "
                f"got {low if low < -half else high}"
            )
    return (values.to(torch.int16) + half).to(torch.uint8)


def _zeros(source: TensorSource, name: str, scheme: _Scheme, n: int, k: int) -> Tensor | None:
    """Zero points as subtracted from codes, [N, G] uint8; None where there are none."""
    if name not in source.shapes:
        return None
    stored, bits, groups = source.whole(name), scheme.bits, scheme.groups(k)
    half = 1 << (bits - 1)
    if stored.dtype == torch.int32:
        zero = unpack_bits(stored.T, bits, n).T
    else:
        zero = _codes(source, name, 0, stored.shape[0] if stored.dim() else 1, bits)
        zero = zero.reshape(-1, groups).expand(n, -1)
    if scheme.symmetric and bool((zero != half).any()):
        raise CheckpointError(
            f"{source.where}: tensor {name} must be zeros, as its weights are symmetric"
        )
    return None if bool((zero == half).all()) else zero
