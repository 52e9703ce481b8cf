"""Packed weights as compressed-tensors: the tensors of a matrix, and the quantization_config of a
model. `compressed_tensors.py` says what they look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant import PackedWeight, QuantSpec
from ..quant.spec import FLAT_SCALES
from .bits import pack_bits

_BLOCK_CODES = 4 << 20  # unpacked at a time
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Layer:
    """A matrix to be written. kind: "Linear" or "Embedding". int8_activations: the layer quantizes
    its activations to int8 at run time, per token."""

    path: str
    packed: PackedWeight
    kind: str = "Linear"
    int8_activations: bool = False


def reason_against(spec: QuantSpec, k: int) -> str | None:
    """Why compressed-tensors cannot hold a matrix of k columns in this format, and what to choose
    instead; None if it can."""
    if spec.table is not None:
        return "codes mean values of a table; choose W2 to W8 with integer codes"
    if spec.two_level:
        return "scales have two levels; choose a flat scale (float16, bfloat16, float32)"
    if spec.zero == "minimum":
        return "groups have minima; choose zero='symmetric' or zero='integer'"
    if spec.group_size > 0 and k % spec.group_size:
        return f"{spec.group_size} does not divide its {k} columns; choose a group size that does"
    return None


def tensors(layer: Layer, float32_scales: bool = False) -> dict[str, Tensor]:
    """The tensors of a matrix by their full names. Padding of the packed layout is left out, values
    are exactly those of the packed weight.

    float32_scales: for a float32 model, as the compressed-tensors package dequantizes in the type
    of the scales and would round the products to it. The reader finds that 16 bits are enough.
    """
    packed, path = layer.packed, layer.path
    spec, n, k = packed.spec, packed.n, packed.k
    plain_int8 = _is_w8a8(layer)
    codes, scales, zeros = [], [], []
    step = max(64, _BLOCK_CODES // k // 64 * 64)
    g_idx = None
    for start in range(0, n, step):
        plain = packed.slice_rows(start, min(start + step, n)).unpack()
        codes.append(
            (plain.codes.to(torch.int16) - 128).to(torch.int8)
            if plain_int8
            else pack_bits(plain.codes, spec.bits)
        )
        own = spec.scale in _FLOATS and not float32_scales
        scales.append(plain.scale if own else plain.scale.float())
        if plain.zero is not None:
            zeros.append(plain.zero)
        g_idx = plain.g_idx
    out = {f"{path}.weight_scale": torch.cat(scales)}
    if plain_int8:
        return {f"{path}.weight": torch.cat(codes), **out}
    out[f"{path}.weight_packed"] = torch.cat(codes)
    out[f"{path}.weight_shape"] = torch.tensor([n, k])
    if zeros:
        zero = torch.cat(zeros)
        out[f"{path}.weight_zero_point"] = pack_bits(zero.T.contiguous(), spec.bits).T.contiguous()
    if g_idx is not None:
        out[f"{path}.weight_g_idx"] = g_idx
    return out


def quantization_config(layers: Iterable[Layer], dense: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of config.json. dense: paths of the linear layers that are not
    quantized.

    The scheme of the most linear layers targets the class, the others name their layers.
    """
    schemes: dict[str, tuple[dict[str, Any], list[Layer]]] = {}
    for layer in layers:
        scheme = _scheme(layer)
        schemes.setdefault(repr(scheme), (scheme, []))[1].append(layer)

    def linears(entry: tuple[dict[str, Any], list[Layer]]) -> int:
        return sum(layer.kind == "Linear" for layer in entry[1])

    # The class comes last: the package reports names behind it as matching nothing.
    *named, most = sorted(schemes.values(), key=linears)
    groups = {}
    for i, (scheme, found) in enumerate([*named, most]):
        names = [layer.path for layer in found]
        if found is most[1] and linears(most):
            names = ["Linear", *(layer.path for layer in found if layer.kind != "Linear")]
        groups[f"group_{i}"] = {"targets": names, **scheme}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _is_w8a8(layer: Layer) -> bool:
    spec = layer.packed.spec
    return (
        layer.int8_activations
        and (spec.bits, spec.group_size, spec.zero) == (8, -1, "symmetric")
        and layer.kind == "Linear"
    )


def _scheme(layer: Layer) -> dict[str, Any]:
    """A config group without its targets."""
    spec = layer.packed.spec
    assert spec.scale in FLAT_SCALES
    w8a8, by_group = _is_w8a8(layer), spec.group_size > 0
    weights: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.zero == "symmetric",
        "strategy": "group" if by_group else "channel",
        "group_size": spec.group_size if by_group else None,
        "block_structure": None,
        "dynamic": False,
        "actorder": "group" if spec.act_order else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    activations: Mapping[str, Any] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "block_structure": None,
        "dynamic": True,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }
    return {
        "weights": weights,
        "input_activations": dict(activations) if w8a8 else None,
        "output_activations": None,
        "format": "int-quantized" if w8a8 else "pack-quantized",
    }
