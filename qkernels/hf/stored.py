"""How a quantized model lies on disk when transformers saves it, and what is noted beside it.

Two layouts. compressed-tensors, where it can hold every layer: vLLM and, for symmetric layers,
transformers load it without this package. Else `quant_method` "qkernels": `<path>.weight` is the
packed layout as one row of bytes, and `<path>.scale`, `.zero` and so on are the other tensors of a
`PackedWeight`. A transformers that knows no such method warns and goes on with a float model; then
the shapes of the weights do not match, which is an error there, never a random model.

Both have a note in `quantization_config`, which says exactly what each layer was: compressed-tensors
knows no type of scales and little of activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointError
from ..checkpoints.compressed_tensors_writer import (
    Layer,
    quantization_config,
    reason_against,
    tensors,
)
from ..checkpoints.quantized import Part, QuantizedFormat, StoredMatrix
from ..checkpoints.safetensors_directory import TensorSource
from ..nn.embedding import QuantEmbedding
from ..nn.keep import HoldsPacked
from ..ops.linear import ACTS
from ..quant import PackedWeight, PlainWeight, QuantSpec
from ..quant.rounding import store

METHOD = "qkernels"
NOTE = "qkernels"  # the key of the note in a quantization_config of compressed-tensors
VERSION = 1


@dataclass(frozen=True)
class Noted:
    """What is known of a layer: its format, its activations, its shape."""

    spec: QuantSpec
    act: str
    n: int
    k: int


def note(layers: Mapping[str, Noted], tied: Mapping[str, str]) -> dict[str, Any]:
    """Plain values, fit for JSON. tied: paths of modules that hold the weight of another one."""
    schemes: list[dict[str, Any]] = []
    entries = {}
    for path, layer in layers.items():
        scheme = {"spec": layer.spec.to_dict(), "act": layer.act}
        if scheme not in schemes:
            schemes.append(scheme)
        entries[path] = [schemes.index(scheme), layer.n, layer.k]
    return {"version": VERSION, "schemes": schemes, "layers": entries, "tied": dict(tied)}


def read_note(raw: Any, where: str) -> tuple[dict[str, Noted], dict[str, str]]:
    """The inverse of `note`. Raises CheckpointError for what it never wrote, and for the note of a
    later version."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{where} must be a mapping, got {raw!r}")
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: version must be {VERSION}, got {raw.get('version')!r}: it was written by "
            "another version of qkernels"
        )
    schemes, entries, tied = raw.get("schemes"), raw.get("layers"), raw.get("tied", {})
    if not isinstance(schemes, list) or not isinstance(entries, Mapping):
        raise CheckpointError(f"{where}: expected a list of schemes and a mapping of layers")
    if not isinstance(tied, Mapping):
        raise CheckpointError(f"{where}: tied must be a mapping, got {tied!r}")
    read = []
    for i, scheme in enumerate(schemes):
        try:
            spec, act = QuantSpec.from_dict(dict(scheme["spec"])), scheme["act"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: scheme {i}: {error}") from error
        if act not in ("auto", *ACTS):
            raise CheckpointError(f"{where}: scheme {i}: act {act!r} is unknown")
        read.append((spec, act))
    layers = {}
    for path, entry in entries.items():
        try:
            index, n, k = (int(value) for value in entry)
            if min(index, n - 1, k - 1) < 0:
                raise IndexError("a negative number")
            layers[path] = Noted(*read[index], n, k)
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{where}: layer {path} must be [scheme, N, K], got {entry!r}"
            ) from error
    return layers, {str(path): str(first) for path, first in tied.items()}


class PackedFormat(QuantizedFormat):
    """Tensors of the packed layout, as `flat_tensors` writes them."""

    name = METHOD

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._layers, self._tied = read_note(raw, where)

    def parts(
        self, source: TensorSource, path: str, n: int, k: int, kind: str
    ) -> dict[str, Part] | None:
        noted = self._layers.get(path)
        if noted is None:
            return None
        if (noted.n, noted.k) != (n, k):
            raise CheckpointError(
                f"{source.where}: {path} was saved as [{noted.n}, {noted.k}], the model wants "
                f"[{n}, {k}]"
            )
        empty = PackedWeight.empty(noted.spec, n, k, device="meta").tensors()
        return {
            f"{path}.{_ON_DISK.get(name, name)}": Part(
                (tensor.numel(),) if name == "codes" else tuple(tensor.shape), (tensor.dtype,)
            )
            for name, tensor in empty.items()
        }

    def packed(self, source: TensorSource, path: str) -> PackedWeight:
        """The weight whose parts have been found there. Raises CheckpointError for scales that are
        not finite and columns in no order."""
        noted = self._layers[path]
        empty = PackedWeight.empty(noted.spec, noted.n, noted.k, device="meta")
        found = {
            name: source.whole(f"{path}.{_ON_DISK.get(name, name)}") for name in empty.tensors()
        }
        found["codes"] = found["codes"].reshape(empty.codes.shape)
        try:
            weight = PackedWeight.from_tensors(noted.spec, noted.n, noted.k, found)
        except ValueError as error:
            raise CheckpointError(f"{source.where}: {path}: {error}") from error
        if weight.perm is not None and not torch.equal(
            weight.perm.sort().values, torch.arange(noted.k, device=weight.perm.device)
        ):
            raise CheckpointError(f"{source.where}: tensor {path}.perm is no order of columns")
        return weight

    def open(self, source: TensorSource, path: str, n: int, k: int, kind: str) -> StoredMatrix:
        weight = self.packed(source, path)

        def read(start: int, stop: int) -> PlainWeight:
            return weight.slice_rows(start, stop).unpack()

        return StoredMatrix(weight.spec, n, k, read)


_ON_DISK = {"codes": "weight"}


def flat_tensors(path: str, packed: PackedWeight) -> dict[str, Tensor]:
    """The tensors of a matrix in the layout "qkernels", by their full names."""
    named = {f"{path}.{_ON_DISK.get(name, name)}": t for name, t in packed.tensors().items()}
    named[f"{path}.weight"] = packed.codes.reshape(-1)
    return named


def as_noted(plain: PlainWeight, spec: QuantSpec, where: str) -> PlainWeight:
    """The same weight in the format that it had when it was saved. compressed-tensors keeps its
    values, while the type of scales and zeros that are all the middle get lost on the way. Raises
    CheckpointError where the values do not fit that format."""
    if plain.spec == spec:
        return plain
    n, groups = plain.scale.shape
    scale = store(plain.scale.float(), spec.scale_dtype)
    zero, g_idx = plain.zero, plain.g_idx
    if spec.zero == "integer" and zero is None:
        zero = torch.full((n, groups), 1 << (spec.bits - 1), dtype=torch.uint8)
    if spec.act_order and g_idx is None:
        g_idx = (torch.arange(plain.k) // spec.group(plain.k)).int()
    try:
        restored = replace(plain, spec=spec, scale=scale, zero=zero, g_idx=g_idx)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: noted as {spec}, stored as {plain.spec}: {error}"
        ) from error
    if not torch.equal(scale.float(), plain.scale.float()):
        raise CheckpointError(f"{where}: noted as {spec}, but its scales do not fit {spec.scale}")
    return restored


@dataclass(frozen=True)
class Saved:
    """What is written of the packed layers: their tensors by name, and the quantization_config."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def packed_modules(model: nn.Module) -> tuple[dict[str, HoldsPacked], dict[str, str]]:
    """The packed modules by path, each weight once; and the paths of those that hold the weight of
    another one, with its path."""
    modules: dict[str, HoldsPacked] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, HoldsPacked):
            known = first.setdefault(id(module.weight), path)
            if known == path:
                modules[path] = module
            else:
                tied[path] = known
    return modules, tied


def describe(model: nn.Module) -> dict[str, Any]:
    """The quantization_config of a model's packed layers, as they would be saved."""
    modules, tied = packed_modules(model)
    noted = note({path: Noted(m.spec, _act(m), m._n, m._k) for path, m in modules.items()}, tied)
    if not _fits_compressed_tensors(modules):
        return {"quant_method": METHOD, **noted}
    dense = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, HoldsPacked)
    ]
    return {**quantization_config(_layers(modules), dense), NOTE: noted}


def saved(model: nn.Module, float32_scales: bool) -> Saved:
    """Everything of the packed layers that is written, but for their biases.

    float32_scales: for a float32 model (see `compressed_tensors_writer.tensors`).
    """
    modules, _ = packed_modules(model)
    config = describe(model)
    found: dict[str, Tensor] = {}
    if config["quant_method"] == METHOD:
        for path, module in modules.items():
            found |= flat_tensors(path, module.packed)
    else:
        for layer in _layers(modules):
            found |= tensors(layer, float32_scales)
    return Saved(found, config)


def _fits_compressed_tensors(modules: Mapping[str, HoldsPacked]) -> bool:
    """Whether compressed-tensors holds all of them, so that those who read it load the model or say
    that they cannot. transformers neither loads packed tables nor has Conv1D there."""
    return all(
        reason_against(module.spec, module._k) is None
        and not isinstance(module, QuantEmbedding)
        and isinstance(module._skeleton() or nn.Linear(1, 1), nn.Linear)
        for module in modules.values()
    )


def _layers(modules: Mapping[str, HoldsPacked]) -> Iterable[Layer]:
    return [Layer(path, m.packed, "Linear", _act(m) == "int8") for path, m in modules.items()]


def _act(module: HoldsPacked) -> str:
    return getattr(module, "act", "auto")
