"""What was built, and what runs in the layers of a model and why."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _library, backends, devices, triton
from ._format import amount, columns, ranges
from .cache import token_bytes
from .models import RopeConfig
from .nn.decoder import QuantDecoder, WeightUse
from .ops import registry
from .ops.linear import default_act_group, resolve_act
from .ops.registry import TRITON
from .quant import PackedWeight


@dataclass(frozen=True)
class BuildInfo:
    """The installation. `str()` is a few lines of text and a table.

    isa: the CPU instruction set in use; isas: those that build and CPU have, best first; cuda:
    "loaded", or why not; triton: which, or why not. auto: the device that device="auto" is, and
    why. libraries: (name, how it was built, or why it was not). ops: per op, the rows of its table
    on this machine, in order; those without a kernel say so.
    """

    version: str
    torch: str
    isa: str
    isas: tuple[str, ...]
    threads: int
    cuda: str
    triton: str
    auto: str
    backend: str
    on_fallback: str
    libraries: tuple[tuple[str, str], ...]
    ops: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        python = platform.python_version()
        facts = [
            ("qkernels", f"{self.version}, torch {self.torch}, Python {python}"),
            ("CPU", f"{self.isa} in use of {', '.join(self.isas)}; {self.threads} threads"),
            ("CUDA", self.cuda),
            ("Triton", self.triton),
            ("device auto", self.auto),
            ("backend", f"{self.backend}; when a row is passed over: {self.on_fallback}"),
            *self.libraries,
        ]
        rows = [("op", "rows, first that can serve wins")]
        rows += [(op, ", ".join(names)) for op, names in self.ops]
        return f"{columns(facts)}\n\n{columns(rows)}"


@dataclass(frozen=True)
class LayerInfo:
    """One use of a weight: which row computes its op, and why each row before it does not.

    spec: the format of a packed weight, the dtype of a dense one, whose row is "torch". act: "int8"
    or "float", "-" where there is no choice.
    """

    name: str
    op: str
    n: int
    k: int
    spec: str
    act: str
    row: str
    reasons: tuple[tuple[str, str], ...]
    nbytes: int

    def said(self) -> tuple[str, ...]:
        """op, [N, K], format, activations, row and reasons, as they stand in tables."""
        why = "; ".join(f"{row}: {reason}" for row, reason in self.reasons)
        return (self.op, f"[{self.n}, {self.k}]", self.spec, self.act, self.row, why)


TABLE_HEAD = ("op", "[N, K]", "format", "act", "runs on", "because")  # of `LayerInfo.said`


@dataclass(frozen=True)
class ModelInfo:
    """The weights of a model, in its order. `str()` is a table.

    facts: of a QuantDecoder, (name, text): its sizes, and how it runs. nbytes: of all weights, one
    that is used twice counted once.
    """

    layers: tuple[LayerInfo, ...]
    nbytes: int
    facts: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        table = columns([("layer", *TABLE_HEAD), *((x.name, *x.said()) for x in self.layers)])
        facts = f"{columns(self.facts)}\n\n" if self.facts else ""
        return f"{facts}{table}\n{amount(self.nbytes)} of weights"


def info(model: Any = None) -> BuildInfo | ModelInfo:
    """What was built; with a model, what runs in each layer that holds a weight, and why.

    model: a QuantDecoder; another nn.Module whose layers keep a PackedWeight in `.packed`; or a
    mapping of names to PackedWeights. Raises TypeError for anything else.
    """
    if model is None:
        return _build()
    if isinstance(model, QuantDecoder):
        layers = tuple(_use(use) for use in model.uses())
        return ModelInfo(layers, model.nbytes, _facts(model))
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
    used: list[LayerInfo] = []
    sizes: dict[int, int] = {}
    for name, module, weight in found:
        if isinstance(weight, PackedWeight):
            used.append(_layer(name, module, weight))
            # Tied modules hold the same parameter: its weight is there once.
            sizes[id(getattr(module, "weight", weight))] = weight.nbytes
    return ModelInfo(tuple(used), sum(sizes.values()))


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
        triton=triton.status(),
        auto=devices.said_of_auto(),
        backend=backend,
        on_fallback=policy,
        libraries=_libraries(),
        ops=tuple((op, tuple(map(_row, backends.rows(op)))) for op in registry.computing()),
    )


def _libraries() -> tuple[tuple[str, str], ...]:
    path = Path(_library.__file__).with_name("build_info.json")
    facts = json.loads(path.read_text()) if path.exists() else {}
    built = tuple(
        (
            "built",
            f"{name}: {', '.join(how.get('targets', []))}; {how.get('compiler')}, "
            f"torch {how.get('headers')}",
        )
        for name, how in facts.get("built", {}).items()
    )
    skipped = facts.get("skipped", {}).items()
    return built + tuple(("not built", f"{name}: {why}") for name, why in skipped)


def _row(row: backends.Row) -> str:
    device = row.device or "cpu"
    if row.namespace == TRITON and triton.problem() is not None:
        return f"{row.name} (no Triton)"
    if row.namespace == TRITON and triton.interpreted():
        return f"{row.name} (interpreted, for those who name it)"
    return row.name + ("" if backends.implemented(row, device) else f" (no kernel for {device})")


def _use(use: WeightUse) -> LayerInfo:
    name = use.name.removesuffix(".weight")
    weight = use.weight
    if isinstance(weight, PackedWeight):
        return _packed(name, use.op, weight, use.case)
    (n, k), dtype = weight.shape, str(weight.dtype).removeprefix("torch.")
    return LayerInfo(name, use.op, n, k, dtype, "-", "torch", (), weight.nbytes)


def _layer(name: str, module: nn.Module | None, weight: PackedWeight) -> LayerInfo:
    if module is not None and hasattr(module, "num_embeddings"):
        return _packed(name, "embedding", weight, {"weight": weight.kind})
    act = resolve_act(getattr(module, "act", "auto"), weight.device)
    group = default_act_group(weight) if act == "int8" else 0
    case = {"weight": weight.kind, "act": act, "group": weight.group, "act_group": group}
    return _packed(name, "linear", weight, case)


def _packed(name: str, op: str, weight: PackedWeight, case: dict[str, Any]) -> LayerInfo:
    facts = {**case, **backends.facts_of(weight.device)}
    choice = backends.choose(op, weight.device.type, facts)
    act, row, spec = case.get("act", "-"), choice.row.name, str(weight.spec)
    return LayerInfo(
        name, op, weight.n, weight.k, spec, act, row, choice.reasons, weight.nbytes
    )  # fmt: skip


def _rope(rope: RopeConfig) -> str:
    return f"theta {rope.theta:g}, {rope.scaling.get('rope_type') or 'not scaled'}"


def _facts(decoder: QuantDecoder) -> tuple[tuple[str, str], ...]:
    config = decoder.config
    windows = ranges([*{w for w in config.windows if w}])
    dtype = str(decoder.dtype).removeprefix("torch.")
    token = config.layers * token_bytes(decoder.kv_dtype, config.kv_heads, config.head_dim)
    return (
        ("source", str(decoder.source)),
        ("device", str(decoder.device)),
        (
            "model",
            f"{config.family}: {config.layers} layers, hidden {config.hidden}, "
            f"FFN {config.ffn} ({config.activation}), "
            f"vocabulary {config.vocab}" + (", tied head" if config.tied else ""),
        ),
        (
            "attention",
            f"{config.q_heads} heads on {config.kv_heads} of keys and values, "
            f"head_dim {config.head_dim}"
            + (f", window {windows}" if windows else "")
            + (", qk-norm" if config.qk_norm else ""),
        ),
        (
            "rope",
            _rope(config.rope)
            + (
                f"; in layers with a window: {_rope(config.local_rope)}"
                if config.local_rope is not None
                else ""
            ),
        ),
        (
            "context",
            f"{decoder.max_seq_len} tokens here; the model was made for {config.max_position}",
        ),
        (
            "weights",
            f"{amount(decoder.nbytes)}; a decode step reads {amount(decoder.weight_bytes)}",
        ),
        (
            "KV cache",
            f"{decoder.kv_dtype}, {amount(token)} per token, "
            f"{amount(token * decoder.max_seq_len)} for a full context",
        ),
        ("activations", decoder.act),
        ("dtype", f"{dtype} between the matrices"),
        ("runs as", _runs_as(decoder)),
    )


def _runs_as(decoder: QuantDecoder) -> str:
    if decoder.decodes_on_device:
        because = decoder.uncaptured_because()
        if because is None:
            return "one CUDA graph per decode step, prompts one op after the other"
    else:
        because = decoder.composed_because()
        if because is None:
            return "one native call per step"
    return f"one op after the other: {because}"
