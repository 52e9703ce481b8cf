"""From the tensors of a checkpoint to packed modules, inside transformers' loader.

transformers builds the model on the meta device, lets the quantizer replace modules, and then goes
through the tensors of the checkpoint. Those of a packed layer are gathered by a `WeightConverter`
whose operation makes the packed weight; transformers puts its tensors where its device map says.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..checkpoints import CheckpointError
from ..checkpoints.safetensors_directory import StateDict
from ..convert.convert import QuantReport
from ..convert.plan import Choice, Plan, Request, Target, plan
from ..convert.replace import Census, commit, dense_tensors, replacement
from ..convert.report import LayerReport, QuantWarning
from ..loading import pack_blocks, rows_per_block
from ..nn.keep import HoldsPacked
from ..quant import PackedWeight, QuantSpec
from ..quant.quantize import algorithm_of, quantize_packed, relative_error
from . import parallel
from .checkpoint import Checkpoint
from .stored import PackedFormat, as_noted
from .ties import tied, untie

# The name of a parameter beside the other tensors of a PackedWeight.
_PARAMETER = {"codes": "weight"}


@dataclass(eq=False)
class Slot:
    """A weight to come, [n, k], and the modules that will hold it: one, or several that are tied.
    layer: what was done, for the report."""

    targets: list[Target]
    modules: list[HoldsPacked]
    spec: QuantSpec
    n: int
    k: int
    layer: LayerReport | None = None
    filled: bool = False

    @classmethod
    def of(cls, targets: list[Target]) -> Slot:
        (n, k), spec = targets[0].shape, targets[0].choice.spec
        empty = PackedWeight.empty(spec, n, k, device="meta")
        modules = [replacement(target, empty, {}) for target in targets]
        for module in modules:
            # transformers initialises what it finds in no checkpoint; there is nothing like that
            # for codes, and `finish` looks that none is missing.
            module._is_hf_initialized = True  # type: ignore[assignment]
            module._qkernels_tied = len(modules) > 1  # type: ignore[assignment]
        return cls(targets, modules, spec, n, k)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for target in self.targets for name in target.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the float weight in a checkpoint."""
        return (self.k, self.n) if self.targets[0].transposed else (self.n, self.k)


class Loader:
    """The slots of a model, by the paths of their modules. keeps_errors: the first error is raised
    by `finish` instead of by transformers, which would only say that there was one."""

    keeps_errors = True

    def __init__(self, model: Any) -> None:
        self.slots: dict[str, Slot] = {}
        self._errors: list[Exception] = []
        self._base = getattr(model, "base_model_prefix", "")

    def _put(self, model: nn.Module, slots: Iterable[Slot]) -> None:
        """Puts the packed modules, still empty, into the model."""
        made = [*slots]
        for slot in made:
            self.slots |= dict.fromkeys(slot.names, slot)
        new = {id(t.module): m for s in made for t, m in zip(s.targets, s.modules, strict=True)}
        commit(model, new, {})

    def _any_of(self, names: Iterable[str]) -> str:
        """A regular expression for these names alone, with or without the prefix of the base model,
        which checkpoints of transformers may have or lack."""
        prefix = f"{self._base}." if self._base else ""
        bare = "|".join(re.escape(name.removeprefix(prefix)) for name in names)
        return rf"(?:{re.escape(prefix)})?(?:{bare})"

    def takes(self, parameter: str) -> bool:
        """Whether a tensor of the checkpoint is to be quantized."""
        return False

    def nbytes_of(self, parameter: str) -> int | None:
        """What a parameter that is to be quantized will take, None for others."""
        return None

    def conversions(self, quantizer: Any) -> list[WeightConverter]:
        raise NotImplementedError

    def fill(
        self,
        path: str,
        make: Callable[[Slot], PackedWeight],
        device: torch.device,
        missing: set[str] | None,
    ) -> dict[str, Tensor]:
        """The tensors of a slot by their full names; none the second time that it is met, as with
        a checkpoint that has tied weights twice, and none after an error."""
        slot = self.slots[path]
        if slot.filled:
            return {}
        packed = None
        if not self._errors:
            try:
                packed = parallel.local_part(slot.modules[0], make(slot)).to(device)
            except Exception as error:
                if not self.keeps_errors:
                    raise
                self._errors.append(error)
        if packed is None:
            (missing or set()).difference_update(
                f"{name}.{part}"
                for name in slot.names
                for part in slot.modules[0].state_dict(keep_vars=True)
            )
            return {}
        slot.filled = True
        return {
            f"{name}.{_PARAMETER.get(part, part)}": tensor
            for name in slot.names
            for part, tensor in packed.tensors().items()
        }

    def finish(self, model: nn.Module) -> None:
        """Ties what was tied. Raises what went wrong, and CheckpointError for layers that the
        checkpoint does not have."""
        if self._errors:
            raise self._errors[0]
        lost = [slot.names[0] for slot in set(self.slots.values()) if not slot.filled]
        if lost:
            more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
            raise CheckpointError(
                f"{getattr(model, 'name_or_path', '')}: missing weights of "
                f"{', '.join(sorted(lost)[:4])}{more}"
            )
        for slot in set(self.slots.values()):
            for module in slot.modules[1:]:
                module._share(slot.modules[0])

    def report(self, model: nn.Module) -> QuantReport | None:
        return None


class _Operation(ConversionOps):
    """An operation of a converter. hf_quantizer: by this name transformers sees that tensors are
    not to be cast."""

    def __init__(self, quantizer: Any, loader: Loader) -> None:
        self.hf_quantizer, self.loader = quantizer, loader

    def __deepcopy__(self, memo: Any) -> _Operation:
        return self  # converters are copied for every tensor, the model must not be

    @property
    def reverse_op(self) -> ConversionOps:
        raise RuntimeError("qkernels: what is saved is made by the quantizer, not by reversing")


class _Keep(_Operation):
    """Passes a tensor on to the quantizer. A converter with it says that the tensor on disk is not
    the one in the model: what is offloaded to disk must be written, not read where it lies."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        (tensor,) = input_dict.values()
        return {full_layer_name: tensor}


class _Quantize(_Operation):
    loader: Quantize

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        return self.loader.quantize(full_layer_name, _only(input_dict), missing_keys)


def _only(tensors: Mapping[str, Any]) -> Tensor:
    (value,) = tensors.values()
    return value[0] if isinstance(value, list) else value


class Quantize(Loader):
    """Float weights, quantized as they come: in memory is what is packed, and one weight."""

    def __init__(self, model: Any, request: Request, algo: str) -> None:
        super().__init__(model)
        self._algo = algo
        self._before = Census.of(model)
        with tied(model):
            self._plan: Plan = plan(model, request)
        slots = []
        for group in self._plan.targets:
            if any("" in target.names for target in group):
                raise ValueError(f"qkernels: the model is itself a {type(model).__name__}")
            slot = Slot.of(group)
            for module in slot.modules:
                # Of the type and shape of what the checkpoint has, until that has come.
                module.weight = nn.Parameter(group[0].weight.detach(), requires_grad=False)
            slots.append(slot)
        # Dense parameters whose values a slot needs too: the table of a head that is quantized.
        self._also = untie(model, slots)
        self._put(model, slots)

    def takes(self, parameter: str) -> bool:
        path, _, part = parameter.rpartition(".")
        return part == "weight" and (path in self.slots or parameter in self._also)

    def nbytes_of(self, parameter: str) -> int | None:
        path, _, part = parameter.rpartition(".")
        slot = self.slots.get(path) if part == "weight" else None
        if slot is None:
            return None
        return PackedWeight.empty(slot.spec, slot.n, slot.k, device="meta").codes.nbytes

    def operation(self, quantizer: Any) -> ConversionOps:
        return _Quantize(quantizer, self)

    def conversions(self, quantizer: Any) -> list[WeightConverter]:
        names = [*(f"{path}.weight" for path in self.slots), *self._also]
        if not names:
            return []
        keep = _Keep(quantizer, self)
        return [WeightConverter([rf"^({self._any_of(names)})$"], [r"\1"], [keep])]

    def quantize(
        self, parameter: str, weight: Tensor, missing: set[str] | None
    ) -> dict[str, Tensor]:
        path = parameter.removesuffix(".weight")
        also = self._also.get(parameter)
        found: dict[str, Tensor] = {} if also is None else {parameter: weight}
        if path not in self.slots and also is not None:
            path = also.names[0]

        def make(slot: Slot) -> PackedWeight:
            return self._packed(slot, weight)

        return {**found, **self.fill(path, make, weight.device, missing)}

    def _packed(self, slot: Slot, weight: Tensor) -> PackedWeight:
        target, name = slot.targets[0], f"{slot.names[0]}.weight"
        if tuple(weight.shape) != slot.shape:
            raise CheckpointError(f"{name} must be {list(slot.shape)}, got {list(weight.shape)}")
        if not weight.is_floating_point():
            raise CheckpointError(f"{name} must be of a float type, got {weight.dtype}")
        nbytes = weight.nbytes
        if target.transposed:
            weight = weight.t()
        packed = quantize_packed(weight, slot.spec, algo=self._algo, name=name)
        linear = [t for t in slot.targets if t.kind != "embedding"]
        slot.layer = LayerReport(
            names=slot.names,
            kind=type(target.module).__name__,
            n=slot.n,
            k=slot.k,
            spec=str(slot.spec),
            act=linear[0].choice.act if linear else "-",
            algo=algorithm_of(self._algo, slot.spec),
            nbytes_before=nbytes,
            nbytes=packed.nbytes,
            error=relative_error(weight, packed),
            note=target.note,
        )
        return packed

    def report(self, model: nn.Module) -> QuantReport | None:
        """As `quantize_` gives it, and its warning. None for a model that is split or offloaded, of
        which only a part is here."""
        layers = [slot.layer for slot in dict.fromkeys(self.slots.values())]
        if parallel.is_split(model) or any(p.is_meta for p in model.parameters()):
            return None
        after, dense = Census.of(model), dense_tensors(model)
        done = tuple(layer for layer in layers if layer is not None)
        linear = [layer for layer in done if layer.act != "-"]
        report = QuantReport(
            layers=done,
            skipped=tuple(self._plan.skipped),
            dense=tuple(dense),
            notes=tuple(self._plan.notes),
            params=self._before.params,
            params_quantized=self._before.params - sum(d.params for d in dense),
            nbytes_before=self._before.nbytes,
            nbytes=after.nbytes,
            linear_nbytes_before=sum(layer.nbytes_before for layer in linear),
            linear_nbytes=sum(layer.nbytes for layer in linear),
        )
        text = report.dense_warning()
        if text is not None:
            warnings.warn(text, QuantWarning, stacklevel=2)
        return report


class _Read(_Operation):
    """The tensors of a layer in its checkpoint's format to those of the packed weight."""

    loader: Gathers
    parts: Mapping[str, str]  # source pattern -> the name of the part

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        path = full_layer_name.removesuffix(".weight")
        tensors = {self.parts[key]: _only({key: value}) for key, value in input_dict.items()}
        device = next(iter(tensors.values())).device

        def make(slot: Slot) -> PackedWeight:
            return self.loader.packed(slot, path, tensors)

        return self.loader.fill(path, make, device, missing_keys)


class Gathers(Loader):
    """Layers that are quantized already, each from several tensors."""

    def _gathered(self) -> tuple[Sequence[str], Sequence[str]]:
        """The paths that have tensors in the checkpoint, and the last parts of their names."""
        raise NotImplementedError

    def packed(self, slot: Slot, path: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """A packed weight, from the tensors at its path by the last parts of their names."""
        raise NotImplementedError

    def conversions(self, quantizer: Any) -> list[WeightConverter]:
        paths, parts = self._gathered()
        if not paths:
            return []
        operation, either = _Read(quantizer, self), self._any_of(paths)
        converter = WeightConverter(
            [rf"^({either})\.{re.escape(part)}$" for part in parts], [r"\1.weight"], [operation]
        )
        operation.parts = dict(zip(converter.source_patterns, parts, strict=True))
        return [converter]


class Stored(Gathers):
    """Layers that a checkpoint of transformers has quantized, exactly as they are.

    act: of linear layers of which no note says it: "int8", "float", or "auto", what the checkpoint
    says of its activations.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, act: str) -> None:
        super().__init__(model)
        self.checkpoint, self._act = checkpoint, act
        slots = []
        for holder, members in checkpoint.quantized.items():
            spec = checkpoint.specs[holder]
            slots.append(
                Slot.of(
                    [
                        Target(module, (path,), kind, Choice(spec, self._act_of(path)))
                        for path, module, kind in members
                    ]
                )
            )
        untie(model, slots)
        self._put(model, slots)

    def _act_of(self, path: str) -> str:
        noted = self.checkpoint.noted.get(self.checkpoint.tied.get(path, path))
        if noted is not None:
            return noted.act
        return self.checkpoint.format.act(path, "Linear") if self._act == "auto" else self._act

    def _gathered(self) -> tuple[Sequence[str], Sequence[str]]:
        return [*self.checkpoint.quantized], self.checkpoint.parts

    def packed(self, slot: Slot, path: str, tensors: Mapping[str, Tensor]) -> PackedWeight:
        where, stored = self.checkpoint.where, self.checkpoint.format
        source = StateDict({f"{path}.{name}": tensor for name, tensor in tensors.items()}, where)
        if isinstance(stored, PackedFormat):
            return stored.packed(source, path)
        kind = "Embedding" if slot.targets[0].kind == "embedding" else "Linear"
        matrix = stored.open(source, path, slot.n, slot.k, kind)
        step = rows_per_block(4 * slot.k)
        rows = ((at, matrix.read(at, min(at + step, slot.n))) for at in range(0, slot.n, step))
        noted = ((at, as_noted(plain, slot.spec, f"{where}: {path}")) for at, plain in rows)
        return pack_blocks(slot.spec, slot.n, slot.k, noted)
