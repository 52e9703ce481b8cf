"""Who computes: an ordered table of rows per op, and the choice among them.

A row names an op namespace and says, for a case, why it cannot serve it. The first row of the table
that can is taken.
Passing over a row that stands for the device is a fallback: it warns once per op and case, with the
reasons, or raises.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from . import _library, devices, triton
from .ops.registry import NATIVE, REFERENCE, TRITON

Case = Mapping[str, Any]
ENTRY_POINTS = "qkernels.backends"
POLICIES = ("warn", "error", "ignore")


class FallbackWarning(UserWarning):
    """A faster row could not serve a case."""


class FallbackError(RuntimeError):
    """The same, where `on_fallback="error"`."""


def _anything(case: Case) -> str | None:
    return None


def _too_old(case: Case) -> str | None:
    found = case.get("capability")
    return None if found is None else devices.too_old(found)


def _cuda(case: Case) -> str | None:
    return _too_old(case) or case.get("library")


def _triton(case: Case) -> str | None:
    return _too_old(case) or triton.problem()


@dataclass(frozen=True)
class Row:
    """One implementation of one op.

    op: its name. name: of the backend ("cpu", "cuda", "triton", "reference"), what `set_backend`
    takes. namespace: of torch.ops. device: the device type it stands for; None: any. supports: case
    -> the reason why not, or None. A case holds what the caller of `select` gave: constants such as
    weight=WeightKind(...), act="int8"; of a GPU that is older than all kernels, its
    capability=(major, minor) as well, and library=reason where the CUDA library was built for other
    GPUs.
    """

    op: str
    name: str
    namespace: str
    device: str | None = None
    supports: Callable[[Case], str | None] = _anything


@dataclass(frozen=True)
class Choice:
    """The row taken for a case, and why each row before it was not."""

    row: Row
    reasons: tuple[tuple[str, str], ...] = ()


_rows: dict[str, list[Row]] = {}
_choices: dict[Any, Any] = {}  # (op, device, case, backend) -> the callable op
_warned: set[Any] = set()
_lock = threading.RLock()
_plugins_loaded = False
_backend = "auto"
_policy = "warn"


def register_row(row: Row, *, before: str | None = None) -> None:
    """Adds a row to the table of its op: last among those that stand for a device, or before the
    row named `before`.

    Packages outside this one call it from an entry point of the group "qkernels.backends" (a
    function without
    arguments). Raises ValueError for a second row of the same op and name, or an unknown `before`.
    """
    with _lock:
        rows = _rows.setdefault(row.op, _device_rows(row.op))
        if any(other.name == row.name for other in rows):
            raise ValueError(f"qkernels: {row.op} has a row named {row.name!r} already")
        names = [other.name for other in rows]
        if before is not None and before not in names:
            raise ValueError(f"qkernels: {row.op} has no row named {before!r}; it has {names}")
        rows.insert(len(rows) if before is None else names.index(before), row)
        _choices.clear()


def rows(op: str) -> list[Row]:
    """The table of an op, in order; the reference, which takes everything, comes last."""
    _load_plugins()
    return [*_rows.get(op, _device_rows(op)), Row(op, "reference", REFERENCE)]


def _device_rows(op: str) -> list[Row]:
    """Of an op that nobody has registered rows for."""
    cuda, cpu = Row(op, "cuda", NATIVE, "cuda", _cuda), Row(op, "cpu", NATIVE, "cpu")
    return [cuda, _triton_row(op), cpu] if op in triton.MODULES else [cuda, cpu]


def _triton_row(op: str) -> Row:
    return Row(op, "triton", TRITON, "cuda", _triton)


def _stands_for(row: Row, device: str) -> bool:
    """Interpreted Triton kernels run on the CPU, for those alone who name them."""
    if row.name == "triton" and row.name == _backend and triton.interpreted():
        return device == "cpu"
    return row.device in (None, device)


def choose(op: str, device: str, case: Case) -> Choice:
    """The row for a case, without warning. Raises RuntimeError if none serves it."""
    table = rows(op)
    candidates = [row for row in table if _stands_for(row, device)]
    if _backend != "auto":
        candidates.sort(key=lambda row: row.name != _backend)
        if _backend not in names():
            raise ValueError(
                f"unknown backend {_backend!r} (from QKERNELS_BACKEND); there are {names()}"
            )
        if not any(row.name == _backend for row in candidates):
            known = sorted({row.name for row in table})
            raise RuntimeError(
                f"qkernels::{op}: backend {_backend!r} has no row for device {device}; rows: "
                f"{known}"
            )
    reasons: list[tuple[str, str]] = []
    for row in candidates:
        reason = row.supports(case)
        if reason is None and not implemented(row, device):
            reason = _absent(row, device)
        if reason is None:
            return Choice(row, tuple(reasons))
        reasons.append((row.name, reason))
    told = (
        "; ".join(f"{name}: {reason}" for name, reason in reasons)
        or f"none stands for device {device}"
    )
    raise RuntimeError(f"qkernels::{op}: no backend serves {describe(case)} on {device}: {told}")


def _absent(row: Row, device: str) -> str:
    return f"{row.namespace} has no kernel of it for {device}"


def select(op: str, device: torch.device, **case: Any) -> Callable[..., Any]:
    """The op of the row for this case, ready to call: `select("norm", x.device)(x, weight, bias,
    eps, center)`.

    case: hashable constants that rows decide by. Cached per case; traceable by torch.compile.
    Raises RuntimeError if no
    row serves the case, FallbackError where one is passed over and the policy is "error".
    """
    key = (op, device, tuple(case.items()), _backend)
    if torch.compiler.is_dynamo_compiling():
        return _overload(_resolve_for_trace(op, device, tuple(case.items()), _backend, _policy), op)
    found = _choices.get(key)
    if found is None:
        found = _choices[key] = _overload(_resolve(op, device, case), op)
    return found


def _overload(namespace: str, op: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, namespace), op).default


@torch.compiler.assume_constant_result
def _resolve_for_trace(
    op: str, device: torch.device, case: tuple[tuple[str, Any], ...], backend: str, policy: str
) -> str:
    # backend and policy are arguments so that a trace is guarded by them.
    return _resolve(op, device, {name: _kind(value) for name, value in case})


def _resolve(op: str, device: torch.device, case: Case) -> str:
    if device.type == "meta":
        return NATIVE
    with _lock:
        facts = facts_of(device)
        choice = choose(op, device.type, {**case, **facts})
        # Where there is no CUDA library for this GPU, Triton's kernels are no fallback.
        whole = {facts.get("library"), _absent(Row(op, "cuda", NATIVE), device.type)}
        case_by_case = [reason for _, reason in choice.reasons if reason not in whole]
        passed_over = case_by_case if choice.row.name == "triton" else choice.reasons
        if passed_over and _policy != "ignore":
            _report(op, device.type, case, choice)
    return choice.row.namespace


def facts_of(device: torch.device) -> Case:
    """What a case says of its device: nothing, but of a GPU that is too old for any kernel, or that
    the CUDA library was not built for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    facts: dict[str, Any] = {}
    index = device.index or 0
    found = devices.capability(index)
    if torch.version.hip is None and devices.too_old(found) is not None:
        facts["capability"] = found
    if _library.cuda_status == "loaded" and (reason := devices.library_problem(index)):
        facts["library"] = reason.splitlines()[0]
    return facts


def _report(op: str, device: str, case: Case, choice: Choice) -> None:
    told = "; ".join(f"{name}: {reason}" for name, reason in choice.reasons)
    text = (
        f"qkernels::{op} of {describe(case)} on {device} runs on the {choice.row.name!r} row, "
        f"not a faster one ({told})"
    )
    if _policy == "error":
        raise FallbackError(text)
    key = (op, device, tuple(case.items()))
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, FallbackWarning, stacklevel=5)


def _kind(value: Any) -> Any:
    """A WeightKind that tracing may have handed on as a plain tuple."""
    from .quant.weight import WeightKind

    return (
        WeightKind(*value)
        if isinstance(value, tuple) and len(value) == len(WeightKind._fields)
        else value
    )


def describe(case: Case) -> str:
    return (
        ", ".join(str(v) if k == "weight" else f"{k} {v}" for k, v in case.items()) or "any input"
    )


def implemented(row: Row, device: str) -> bool:
    """Whether a kernel of the row's op is registered for this device type."""
    name = f"{row.namespace}::{row.op}"
    keys = ("CompositeExplicitAutograd", "CompositeImplicitAutograd", device.upper())
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def set_backend(name: str = "auto", *, on_fallback: str | None = None) -> None:
    """Which row computes, process-wide.

    name: "auto" takes the first of the table that can; another ("reference", "cpu", "cuda", or a
    plugin's) comes before
    all others. The environment variable QKERNELS_BACKEND sets it at import. on_fallback: what
    happens when a row is
    passed over because it cannot serve a case: "warn" once per case, "error", or "ignore"; None
    leaves it as it is.
    Raises ValueError for an unknown name or policy.
    """
    global _backend, _policy
    if on_fallback is not None and on_fallback not in POLICIES:
        raise ValueError(f"on_fallback must be one of {POLICIES}, got {on_fallback!r}")
    known = names()
    if name not in known:
        raise ValueError(f"unknown backend {name!r}; there are {known}")
    with _lock:
        _backend = name
        _policy = on_fallback or _policy
        _choices.clear()
        _warned.clear()


def names() -> list[str]:
    """What `set_backend` takes."""
    _load_plugins()
    every = [row.name for table in (_device_rows(""), *_rows.values()) for row in table]
    return ["auto", *dict.fromkeys([*every, "reference"])]


def current() -> tuple[str, str]:
    """The backend and the policy in force."""
    return _backend, _policy


@contextlib.contextmanager
def backend(name: str = "auto", *, on_fallback: str | None = None) -> Iterator[None]:
    """`set_backend` for the duration of a `with` block."""
    before = current()
    set_backend(name, on_fallback=on_fallback)
    try:
        yield
    finally:
        set_backend(before[0], on_fallback=before[1])


def _load_plugins() -> None:
    global _plugins_loaded
    with _lock:
        if _plugins_loaded:
            return
        _plugins_loaded = True
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            try:
                entry.load()()
            except (
                Exception
            ) as error:  # a broken plugin must not take the package down, but must be heard of
                warnings.warn(
                    f"qkernels: the backend plugin {entry.value!r} failed: {error!r}", stacklevel=2
                )


def _from_environment() -> None:
    """QKERNELS_BACKEND, which the first choice checks: plugins, whose name it may be, import this
    module."""
    global _backend
    _backend = os.environ.get("QKERNELS_BACKEND", "") or "auto"


# What the kernels of linear take beyond what makes a weight; the other ops take everything. On
# CUDA, float32 activations go through a dequantized copy of the weight (csrc/cuda/linear.cu).
_LINEAR_MAX_SPAN = 32768  # kMaxSpan of csrc/linear_ops.h


def _int8_linear(case: Case) -> str | None:
    span = min(case.get("group", 0), case.get("act_group", 0))
    if case.get("act") == "int8" and span > _LINEAR_MAX_SPAN:
        return f"int8 sums over more than {_LINEAR_MAX_SPAN} columns could overflow"
    return None


def _cuda_linear(case: Case) -> str | None:
    return _cuda(case) or _int8_linear(case)


for _op in ("linear", "linear_quant"):
    _rows[_op] = [
        Row(_op, "cuda", NATIVE, "cuda", _cuda_linear),
        _triton_row(_op),
        Row(_op, "cpu", NATIVE, "cpu", _int8_linear),
    ]

_from_environment()
