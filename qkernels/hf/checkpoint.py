"""What a quantized checkpoint of transformers has for each module of a model, before any of it is
loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import CheckpointError
from ..checkpoints.formats import quantized_format
from ..checkpoints.quantized import QuantizedFormat, check_dtypes
from ..checkpoints.safetensors_directory import SafetensorsDirectory, TensorSource
from ..convert.plan import kind_of
from ..loading import check_shapes
from ..quant import QuantSpec
from .stored import METHOD, NOTE, Noted, PackedFormat, read_note
from .ties import tied

# Last parts of names that only quantized layers have.
_PARTS = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape",
    "weight_zero_point", "weight_g_idx",
)  # fmt: skip

Member = tuple[str, nn.Module, str]  # path, module, kind


class Checkpoint:
    """The quantized matrices of a checkpoint, held against the modules of a model.

    quantized: by the path that has the tensors, the modules that hold the weight (several, if they
    are tied). specs: their formats. parts: the last parts of the names of their tensors. noted,
    tied: what a note of this package says.

    Everything but the codes is looked at: names, shapes, types, and the values of scales and zeros,
    on which the format depends. Raises CheckpointError for what is missing, of another shape or
    type, not finite, or has no place in the model.
    """

    def __init__(
        self, model: Any, source: TensorSource, raw: Mapping[str, Any], where: str
    ) -> None:
        self.where = where
        self.format, self.noted, self.tied = _format(raw, where)
        self.quantized: dict[str, list[Member]] = {}
        self.specs: dict[str, QuantSpec] = {}
        self.parts: list[str] = []
        claimed: set[str] = set()
        with tied(model):
            by_weight = _by_weight(model)
        for members in by_weight.values():
            found = {
                path: parts
                for path, module, kind in members
                if (parts := self._parts(source, path, module, kind))
            }
            holder = _holder(found, source)
            if holder is None:
                continue
            (module, kind) = next((m, kind) for path, m, kind in members if path == holder)
            parts, (n, k) = found[holder], _shape(module, kind)
            check_shapes(
                {name: part.shape for name, part in parts.items()},
                {name: source.shapes[name] for name in parts if name in source.shapes},
                (),
                where,
            )
            check_dtypes(source, parts)
            claimed.update(parts)
            self.parts += [name.removeprefix(f"{holder}.") for name in parts]
            self.quantized[holder] = members
            noted = self.noted.get(holder)
            opened = None
            if not isinstance(self.format, PackedFormat):
                opened = self.format.open(source, holder, n, k, _kind(kind)).spec
            spec = noted.spec if noted is not None else opened
            assert spec is not None
            self.specs[holder] = spec
        self.parts = sorted(set(self.parts))
        self._check_rest(model, source, claimed)

    @classmethod
    def of(cls, model: Any, files: list[Path], raw: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in these safetensors files. raw: its quantization_config."""
        where = str(getattr(model.config, "name_or_path", "") or "the checkpoint")
        others = [file.name for file in files if file.suffix != ".safetensors"]
        if others or not files:
            raise CheckpointError(
                f"{where}: quantized layers are read from safetensors, got "
                f"{', '.join(others) or 'a state_dict'}"
            )
        with ExitStack() as stack:
            source = SafetensorsDirectory.of_files(files, where, stack)
            return cls(model, _Named(source, _names(model, source)), raw, where)

    def _parts(
        self, source: TensorSource, path: str, module: nn.Module, kind: str
    ) -> dict[str, Any] | None:
        n, k = _shape(module, kind)
        return self.format.parts(source, path, n, k, _kind(kind))

    def _check_rest(self, model: Any, source: TensorSource, claimed: set[str]) -> None:
        """Tensors of quantized layers that no module of the model takes would be lost, and what
        they belong to would be random."""
        holders = set(self.quantized)
        lost, padding = [], []
        for name in source.shapes:
            path, _, part = name.rpartition(".")
            if name in claimed:
                continue
            if part == "bias" and path in holders:
                if getattr(model.get_submodule(path), "bias", None) is None:
                    (padding if self.format.is_padding(source, name) else lost).append(name)
            elif part in _PARTS or (isinstance(self.format, PackedFormat) and path in self.noted):
                lost.append(name)
        gone = [path for path in self.noted if path not in holders]
        if lost or gone:
            names = lost or gone
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(
                f"{self.where}: {type(model).__name__} has no linear layer or table of a known "
                f"kind for {', '.join(names[:4])}{more}"
            )
        if padding:
            ignored = {rf"^{re.escape(name)}$" for name in padding}
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *ignored}


def _format(
    raw: Mapping[str, Any], where: str
) -> tuple[QuantizedFormat, dict[str, Noted], dict[str, str]]:
    raw = dict(raw)
    if raw.get("quant_method") == METHOD:
        return (PackedFormat(raw, where), *read_note(raw, where))
    noted = raw.pop(NOTE, None)
    stored = quantized_format({"quantization_config": raw}, where)
    assert stored is not None
    if noted is None:
        return stored, {}, {}
    return (stored, *read_note(noted, f"{where}: quantization_config: {NOTE}"))


def _by_weight(model: nn.Module) -> dict[int, list[Member]]:
    """The modules that can be packed, by the weight that they hold: on meta, tied ones share it."""
    found: dict[int, list[Member]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None:
            weight = module._parameters.get("weight")
            found.setdefault(id(weight), []).append((path, module, kind))
    return found


def _holder(found: Mapping[str, Mapping[str, Any]], source: TensorSource) -> str | None:
    """The path, of those that share a weight, under which the checkpoint has it packed; None if it
    is dense there."""
    for path, parts in found.items():
        if any(name in source.shapes for name in parts if name != f"{path}.weight"):
            return path
    for path, parts in found.items():
        if source.dtypes.get(f"{path}.weight", torch.float32) not in _FLOATS:
            return path
        if f"{path}.weight" not in source.shapes and not any(
            f"{other}.weight" in source.shapes for other in found
        ):
            return path  # all of it is missing, as the checks will say
    return None


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _shape(module: nn.Module, kind: str) -> tuple[int, int]:
    weight = module._parameters["weight"]
    assert weight is not None
    rows, cols = weight.shape
    return (cols, rows) if kind == "conv1d" else (rows, cols)


def _kind(kind: str) -> str:
    return "Embedding" if kind == "embedding" else "Linear"


class _Named:
    """A source with other names for its tensors."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.where, self._source, self._names = source.where, source, names
        self.shapes = {name: source.shapes[old] for name, old in names.items()}
        self.dtypes = {name: source.dtypes[old] for name, old in names.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._source.rows(self._names[name], start, stop)

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._source.columns(self._names[name], start, stop)

    def whole(self, name: str) -> torch.Tensor:
        return self._source.whole(self._names[name])


def _names(model: Any, source: TensorSource) -> dict[str, str]:
    """The model's name for every tensor of the checkpoint -> the checkpoint's."""
    renamed, prefix = _renaming(model), f"{model.base_model_prefix}."
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    names = {}
    for old in sorted(source.shapes):
        path, _, part = renamed(old).rpartition(".")
        for known in (path, prefix + path, path.removeprefix(prefix)):
            if known in modules:
                path = known
                break
        names[f"{path}.{part}".lstrip(".")] = old
    return names


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers does to the names of this model's checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [
        copy.deepcopy(entry)  # matching leaves marks on them
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightRenaming)
    ]

    def renamed(name: str) -> str:
        for entry in renamings:
            name, _ = entry.rename_source_key(name)
        return name

    return renamed
