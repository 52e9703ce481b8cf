"""Which modules of a model are quantized, to what, and why the others are not."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..nn.keep import HoldsPacked
from ..ops.linear import ACTS
from ..quant import QuantSpec, scheme_act
from ..quant.spec import BLOCK, UNIT_COLS
from .report import Skipped

Scheme = str | QuantSpec
Overrides = Mapping[str, Scheme | None]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """A format, and the activations of linear layers in it."""

    spec: QuantSpec
    act: str


@dataclass
class Target:
    """One module to replace. names: every path that leads to it."""

    module: nn.Module
    names: tuple[str, ...]
    kind: str  # "linear", "conv1d" or "embedding"
    choice: Choice
    note: str = ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def transposed(self) -> bool:
        return self.kind == "conv1d"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, cols = self.weight.shape
        return (cols, rows) if self.transposed else (rows, cols)


@dataclass
class Plan:
    """targets: by weight; those in one list share it, and its format, and become one weight."""

    targets: list[list[Target]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """The arguments of `quantize_` that choose formats, checked."""

    linear: Choice
    embedding: Choice | None
    overrides: tuple[tuple[str, re.Pattern[str], Choice | None], ...]
    keep: tuple[str, ...]

    @classmethod
    def of(
        cls,
        spec: Scheme,
        group_size: int | None,
        modules_to_not_convert: Collection[str],
        overrides: Overrides | None,
        embeddings: Scheme | None,
        act: str,
    ) -> Request:
        """Raises ValueError and TypeError for what no format is."""
        if act not in ("auto", *ACTS):
            raise ValueError(f"quantize_: act must be auto, int8 or float, got {act!r}")
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                "quantize_: modules_to_not_convert is a list of names, got the text "
                f"{modules_to_not_convert!r}"
            )
        patterns = []
        for pattern, scheme in (overrides or {}).items():
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"quantize_: override {pattern!r}: {error}") from error
            chosen = None if scheme is None else _choice(scheme, None, act, f"override {pattern!r}")
            patterns.append((pattern, compiled, chosen))
        return cls(
            _choice(spec, group_size, act, "spec"),
            None if embeddings is None else _choice(embeddings, None, act, "embeddings"),
            tuple(patterns),
            tuple(modules_to_not_convert or ()),
        )

    def override(self, names: tuple[str, ...]) -> tuple[str, Choice | None] | None:
        """(pattern, what it says) of the first pattern that is found in one of the names."""
        for pattern, compiled, choice in self.overrides:
            if any(compiled.search(name) for name in names):
                return pattern, choice
        return None

    def kept_by(self, names: tuple[str, ...]) -> str | None:
        """The entry of modules_to_not_convert that stands in one of the names, as whole parts."""
        return next((k for k in self.keep if any(f".{k}." in f".{name}." for name in names)), None)


def _choice(scheme: Scheme, group_size: int | None, act: str, where: str) -> Choice:
    if isinstance(scheme, QuantSpec):
        if group_size is not None and group_size != scheme.group_size:
            raise ValueError(
                f"quantize_: {where} is a QuantSpec with groups of {scheme.group_size}, and "
                f"group_size says {group_size}"
            )
        spec = scheme
    elif isinstance(scheme, str):
        try:
            spec = QuantSpec.from_scheme(scheme, group_size)
        except ValueError as error:
            raise ValueError(f"quantize_: {where}: {error}") from error
        act = scheme_act(scheme) if act == "auto" else act
    else:
        raise TypeError(
            f"quantize_: {where} must be a scheme like 'W4A16' or a QuantSpec, got {scheme!r}"
        )
    if spec.act_order:
        raise ValueError(
            f"quantize_: {where}: {spec} orders columns by a calibration; it comes with checkpoints"
        )
    return Choice(spec, act)


def fitted(spec: QuantSpec, k: int) -> tuple[QuantSpec, str]:
    """The spec with the largest group that divides k, and a note where that is another.

    Groups are multiples of 16; where none divides k, the last group of a row is shorter, which
    the packed layout allows.
    """
    group = spec.group_size
    if group == -1 or k % group == 0:
        return spec, ""
    sizes = range(min(group, k) // UNIT_COLS * UNIT_COLS, 0, -UNIT_COLS)
    fits = (g for g in sizes if k % g == 0 and (not spec.two_level or BLOCK % g == 0))
    smaller = next(fits, None)
    if smaller is None:
        return spec, f"no group size divides {k}: the last group has {k % group} columns"
    return (
        replace(spec, group_size=smaller),
        f"group size {smaller}: {group} does not divide {k}",
    )


def plan(model: nn.Module, request: Request) -> Plan:
    """Decides for every module. Raises ValueError for patterns that match nothing."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
        for name, child in module._modules.items():
            if child is not None:
                parents.setdefault(id(child), []).append((module, name))
    result, targets, used = Plan(), [], set[str]()
    tables: list[Target] = []  # embeddings, decided before the heads that are tied to them
    for key, module in modules.items():
        names = tuple(paths[key])
        kept = request.kept_by(names)
        if kept is not None:
            used.add(kept)
        if isinstance(module, HoldsPacked):
            result.skipped.append(_skip(module, names, "quantized already"))
            continue
        kind = kind_of(module)
        if kind is None:
            reason = _looks_like_linear(module)
            if reason:
                result.skipped.append(_skip(module, names, reason))
            continue
        override = request.override(names) if kind != "embedding" or request.embedding else None
        if override is not None:
            used.add(override[0])
        choice, reason = _decide(kind, module, parents.get(key, []), request, override, kept)
        if choice is None:
            if reason:
                result.skipped.append(_skip(module, names, reason))
            continue
        target = Target(module, names, kind, choice)
        targets.append(target)
        if kind == "embedding":
            tables.append(target)
    _follow_tables(modules, paths, parents, tables, targets, request, result)
    for pattern, compiled, _ in request.overrides:
        if pattern not in used:
            raise ValueError(f"quantize_: {_unused(pattern, compiled, paths)}")
    for name in request.keep:
        if name not in used and name != "lm_head":
            raise ValueError(
                f"quantize_: modules_to_not_convert names {name!r}, which is no module of the model"
            )
    order = {key: i for i, key in enumerate(modules)}
    for target in sorted(targets, key=lambda t: order[id(t.module)]):
        spec, target.note = fitted(target.choice.spec, target.shape[1])
        target.choice = replace(target.choice, spec=spec)
        for group in result.targets:
            first = group[0]
            if (
                first.module.weight is target.module.weight
                and first.transposed == target.transposed
                and first.choice.spec == spec
            ):
                group.append(target)
                break
        else:
            result.targets.append([target])
    _note_what_stays(modules, paths, result)
    return result


def _unused(pattern: str, compiled: re.Pattern[str], paths: dict[int, list[str]]) -> str:
    """What is wrong with an override that decides nothing."""
    found = [name for names in paths.values() for name in names if name and compiled.search(name)]
    if not found:
        return f"override {pattern!r} matches no layer of the model"
    return (
        f"override {pattern!r} matches no layer that it could decide: {found[-1]} is no linear "
        "layer of a known kind, or an embedding without embeddings=, or an earlier override decides"
    )


def kind_of(module: nn.Module) -> str | None:
    """What `quantize_` takes it for; None for everything else."""
    if isinstance(module, nn.Linear):
        own_forward = type(module).forward is not nn.Linear.forward or "forward" in vars(module)
        if own_forward or isinstance(module, NonDynamicallyQuantizableLinear):
            return None
        return "linear"
    if is_conv1d(module) and "forward" not in vars(module):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [K, N]."""
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and type(module) is known.Conv1D


def _looks_like_linear(module: nn.Module) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is read directly, by nn.MultiheadAttention"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        if "forward" in vars(module):
            return "its forward was replaced on the instance, as device_map does: quantize before"
        return "it has a forward of its own"
    return None


def scaled_embedding(module: nn.Module) -> tuple[float, bool] | None:
    """(scale, whether it is rounded to the type of the table) of the scaled embeddings of
    transformers, None for any other class.

    They are `rows * embed_scale`, with a float (BART and its kin) or a buffer (Gemma).
    """
    cls = type(module)
    known = cls.__name__.endswith("ScaledWordEmbedding") and cls.__module__.startswith(
        "transformers.models."
    )
    if not known or set(module._parameters) != {"weight"} or module._modules:
        return None
    if set(module._buffers) == {"embed_scale"}:
        scale = getattr(module, "scalar_embed_scale", None)
        return (float(scale), True) if isinstance(scale, int | float) else None
    scale = getattr(module, "embed_scale", None)
    if module._buffers or not isinstance(scale, int | float):
        return None
    return float(scale), False


def _decide(
    kind: str,
    module: nn.Module,
    parents: list[tuple[nn.Module, str]],
    request: Request,
    override: tuple[str, Choice | None] | None,
    kept: str | None,
) -> tuple[Choice | None, str]:
    """The format, or None and why; no reason for an embedding that nobody asked for."""
    if kind == "embedding" and request.embedding is None:
        return None, ""
    reason = _cannot(kind, module, parents)
    if reason:
        return None, reason
    if override is not None:
        return override[1], f"override {override[0]!r}"
    if kept is not None:
        return None, f"modules_to_not_convert names {kept!r}"
    return (request.embedding if kind == "embedding" else request.linear), ""


def _cannot(kind: str, module: nn.Module, parents: list[tuple[nn.Module, str]]) -> str:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own (a parametrization, or none)"
    if weight.dtype not in FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.dim() != 2 or not weight.numel():
        return f"its weight is {list(weight.shape)}"
    for parent, name in parents:
        if isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2"):
            return "its weight is read directly, by nn.TransformerEncoderLayer"
    if kind == "embedding" and isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "it rescales its rows (max_norm)"
        own = type(module).forward is not nn.Embedding.forward or "forward" in vars(module)
        if own and scaled_embedding(module) is None:
            return "it has a forward of its own"
    return ""


def _follow_tables(
    modules: dict[int, nn.Module],
    paths: dict[int, list[str]],
    parents: dict[int, list[tuple[nn.Module, str]]],
    tables: list[Target],
    targets: list[Target],
    request: Request,
    result: Plan,
) -> None:
    """A linear layer tied to a quantized table takes its format, unless an override names it."""
    for table in tables:
        for key, module in modules.items():
            weight = module._parameters.get("weight")
            tied = weight is table.module.weight and kind_of(module) == "linear"
            names = tuple(paths[key])
            if not tied or request.override(names) or _cannot("linear", module, parents[key]):
                continue
            mine = [t for t in targets if t.module is module]
            if mine:
                mine[0].choice = replace(mine[0].choice, spec=table.choice.spec)
            else:
                result.skipped = [s for s in result.skipped if s.name != names[0]]
                targets.append(Target(module, names, "linear", table.choice))
            result.notes.append(f"{names[0]} is tied to {table.name} and quantized as it is")


def _note_what_stays(
    modules: dict[int, nn.Module], paths: dict[int, list[str]], result: Plan
) -> None:
    """Says where a float weight stays although it was quantized, for others that hold it."""
    replaced = {id(t.module) for group in result.targets for t in group}
    seen: dict[int, str] = {}
    for group in result.targets:
        weight = group[0].module.weight
        if id(weight) in seen:
            result.notes.append(
                f"{group[0].name} was tied to {seen[id(weight)]}; in two formats they are no longer"
            )
        seen[id(weight)] = group[0].name
        for key, module in modules.items():
            for name, parameter in module._parameters.items():
                if parameter is weight and key not in replaced:
                    path = f"{paths[key][0]}.{name}".lstrip(".")
                    result.notes.append(
                        f"{group[0].name} was tied to {path}, which stays dense: both are in memory"
                    )


def _skip(module: nn.Module, names: tuple[str, ...], reason: str) -> Skipped:
    if isinstance(module, HoldsPacked):
        params = module.packed.n * module.packed.k
    else:
        weight = module._parameters.get("weight")
        params = 0 if weight is None else weight.numel()
    return Skipped(" = ".join(names), type(module).__name__, params, reason)
