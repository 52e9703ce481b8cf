"""Triton kernels of the ops: the portable path, for GPUs that no CUDA library was built for.

Each module holds the kernels of one stem of csrc/cuda and the functions that launch them, which are
ops of the namespace `qkernels_triton`. Triton itself is imported by the first call. With
TRITON_INTERPRET=1 in the environment when qkernels is imported, the kernels are interpreted, on
tensors of the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from ..ops.registry import TRITON, implement

LEAST = (3, 6)
# What the distribution is called that has the module `triton`; torch for ROCm brings its own.
DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")
# Of every op: the module of its stem; the function has the op's name.
MODULES = {
    "append_attention": "attention",
    "attention": "attention",
    "attention_dense": "attention",
    "gate": "gate",
    "gate_quant": "gate",
    "linear": "linear",
    "linear_quant": "linear",
    "quantize_act": "quantize_act",
    "norm": "norm",
    "add_norm": "norm",
    "norm_quant": "norm",
    "add_norm_quant": "norm",
    "pack": "pack",
    "unpack": "pack",
    "dequantize": "pack",
    "embedding": "embedding",
    "sample": "sample",
    "kv_append": "kv_append",
}


_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def interpreted() -> bool:
    """Whether kernels run on the CPU, statement by statement; decided when this is imported."""
    return _INTERPRETED


@functools.cache
def version() -> str | None:
    """Of the Triton that is installed."""
    if find_spec("triton") is None:
        return None
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def problem() -> str | None:
    """Why the kernels cannot run on any machine; None if Triton is there."""
    found = version()
    if found is None:
        return "Triton is not installed (pip install 'qkernels[triton]')"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < LEAST:
        least = ".".join(map(str, LEAST))
        return f"Triton {found} is installed, and the kernels need {least} (pip install -U triton)"
    return None


def status() -> str:
    """For people: which Triton there is and what runs on it, or why not."""
    reason = problem()
    if reason is not None:
        return reason
    mode = "interpreted on the CPU (TRITON_INTERPRET=1)" if interpreted() else "for GPUs"
    return f"Triton {version()}, {mode}"


def _first_call(op: str) -> Callable[..., Any]:
    """The op's implementation, whose module is imported when it is first called."""
    found: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal found
        if found is None:
            if reason := problem():
                raise RuntimeError(f"{TRITON}::{op}: {reason}")
            found = getattr(import_module(f".{MODULES[op]}", __name__), op)
        return found(*args)

    return call


def register() -> None:
    """Registers every op for the devices on which this process can run it; without Triton they say
    so."""
    for op in MODULES:
        implement(TRITON, op, _first_call(op), "CPU" if interpreted() else "CUDA")
