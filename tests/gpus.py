"""The GPUs that the tests of CUDA kernels run on: the emulated one, which is there everywhere, and
a real one where there is one. A test takes the fixture `gpu` and runs on both."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # before the package is imported, which looks at it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from qkernels import triton
from qkernels.ops.registry import NATIVE, TRITON, define_namespace

ROOT = Path(__file__).resolve().parent.parent
EMULATED = "qkernels_emu"
BUILT = ROOT / "build" / "emu" / "_C_cuda_emu.so"
EMULATED_LIBRARY = Path(os.environ.get("QKERNELS_EMU_LIBRARY", BUILT))
_loaded: set[str] = set()


@dataclass(frozen=True)
class Gpu:
    """Where CUDA kernels run: an op namespace and the device of its tensors."""

    name: str  # "emu", "cuda" or "triton"
    namespace: str
    device: torch.device

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    @property
    def emulated(self) -> bool:
        return self.namespace == EMULATED

    def to(self, value: Any) -> Any:
        """Tensors on this device; lists and tuples of them and None as well."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, (list, tuple)):
            return type(value)(self.to(item) for item in value)
        return value

    @contextlib.contextmanager
    def playing(self, architecture: int = 90, multiprocessors: int = 132) -> Iterator[None]:
        """The emulated GPU as another one, for launches that go by it; a real one stays itself."""
        names = ("QKERNELS_EMU_ARCHITECTURE", "QKERNELS_EMU_MULTIPROCESSORS")
        before = {name: os.environ.pop(name, None) for name in names}
        os.environ.update(zip(names, (str(architecture), str(multiprocessors)), strict=True))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def load_emulated() -> Gpu:
    if not EMULATED_LIBRARY.exists():
        where = os.path.relpath(EMULATED_LIBRARY, ROOT)
        pytest.skip(f"{where} is not built (python setup.py native --emu)")
    if EMULATED not in _loaded:
        define_namespace(EMULATED)
        torch.ops.load_library(str(EMULATED_LIBRARY))
        _loaded.add(EMULATED)
    return Gpu("emu", EMULATED, torch.device("cpu"))


GPUS = [
    pytest.param("emu"),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    ),
]


def find_gpu(name: str) -> Gpu:
    return load_emulated() if name == "emu" else Gpu("cuda", NATIVE, torch.device("cuda", 0))


@functools.cache
def _quicken_interpreter() -> None:
    """A kernel that calls a device function has triton.language patched already; the interpreter
    does it again, which takes half of its time. Triton's own functions see another module of it,
    and that stays patched."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or not hasattr(interpreter.InterpretedFunction, "rewrite"):
        return  # another Triton: slower
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in patched and not module.startswith(f"{triton.__name__}."):
            patch(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def triton_gpu() -> Gpu:
    """The Triton kernels: on the GPU if there is one, else interpreted on the CPU."""
    if reason := triton.problem():
        pytest.skip(reason)
    if triton.interpreted():
        _quicken_interpreter()
    real = torch.cuda.is_available()
    return Gpu("triton", TRITON, torch.device("cuda", 0) if real else torch.device("cpu"))
