"""What was built, and what runs in the layers of a model and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import _library, backends
from .ops.linear import default_act_group, resolve_act
from .quant import PackedWeight


@dataclass(frozen=True)
class BuildInfo:
    """The installation. `str()` is a few lines of text.

    isa: the CPU instruction set in use; isas: those that build and CPU have, best first; cuda:
    "loaded", or why not.
    """

    version: str
    torch: str
    isa: str
    isas: tuple[str, ...]
    threads: int
    cuda: str
    backend: str
    on_fallback: str

    def __str__(self) -> str:
        return _columns(
            [
                ("qkernels", f"{self.version}, torch {self.torch}"),
                ("CPU", f"{self.isa} in use of {', '.join(self.isas)}; {self.threads} threads"),
                ("CUDA", self.cuda),
                ("backend", f"{self.backend}; when a row is passed over: {self.on_fallback}"),
            ]
        )


@dataclass(frozen=True)
class LayerInfo:
    """One packed weight: which row computes its op, and why each row before it does not."""

    name: str
    op: str
    n: int
    k: int
    spec: str
    act: str
    row: str
    reasons: tuple[tuple[str, str], ...]
    nbytes: int


@dataclass(frozen=True)
class ModelInfo:
    """The packed weights of a model, in its order. `str()` is a table."""

    layers: tuple[LayerInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "op", "[N, K]", "weight", "act", "runs on", "because")]
        for layer in self.layers:
            why = "; ".join(f"{row}: {reason}" for row, reason in layer.reasons)
            shape = f"[{layer.n}, {layer.k}]"
            rows.append((layer.name, layer.op, shape, layer.spec, layer.act, layer.row, why))
        return f"{_columns(rows)}\n{len(self.layers)} packed weights, {self.nbytes / 1e6:.1f} MB"


def info(model: Any = None) -> BuildInfo | ModelInfo:
    """What was built; with a model, what runs in each layer that holds a packed weight, and why.

    model: an nn.Module whose layers keep a PackedWeight in `.packed`, or a mapping of names to
    PackedWeights.
    Raises TypeError for anything else.
    """
    if model is None:
        return _build()
    if isinstance(model, nn.Module):
        found = [
            (name, module, getattr(module, "packed", None))
            for name, module in model.named_modules()
        ]
    elif isinstance(model, dict):
        found = [(name, None, weight) for name, weight in model.items()]
    else:
        raise TypeError(
            f"info takes a module or a dict of packed weights, got {type(model).__name__}"
        )
    return ModelInfo(
        tuple(
            _layer(name, module, weight)
            for name, module, weight in found
            if isinstance(weight, PackedWeight)
        )
    )


def _build() -> BuildInfo:
    from . import __version__

    backend, policy = backends.current()
    native = torch.ops.qkernels
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        isa=native.cpu_isa(),
        isas=tuple(native.cpu_isas().split(", ")),
        threads=torch.get_num_threads(),
        cuda=_library.cuda_status,
        backend=backend,
        on_fallback=policy,
    )


def _layer(name: str, module: nn.Module | None, weight: PackedWeight) -> LayerInfo:
    case: dict[str, Any] = {"weight": weight.kind}
    table = module is not None and hasattr(module, "num_embeddings")
    act = "-"
    if not table:
        act = resolve_act(getattr(module, "act", "auto"), weight.device)
        group = default_act_group(weight) if act == "int8" else 0
        case |= {"act": act, "group": weight.group, "act_group": group}
    op = "embedding" if table else "linear"
    choice = backends.choose(op, weight.device.type, case)
    return LayerInfo(
        name,
        op,
        weight.n,
        weight.k,
        str(weight.spec),
        act,
        choice.row.name,
        choice.reasons,
        weight.nbytes,
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
