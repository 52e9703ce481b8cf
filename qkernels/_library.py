"""Loads the native libraries, and says what to type where that fails."""

from __future__ import annotations

from pathlib import Path

import torch

from .ops.registry import define

# Which instruction set's kernels run: implemented by csrc/cpu/kernels.cpp, by no other namespace.
define("set_cpu_isa", "(str name) -> str", fake=None)
define("cpu_isa", "() -> str", fake=None)
define("cpu_isas", "() -> str", fake=None)
# Operations done on registers in `steps` rounds, for the ceilings of benchmarks: csrc/cpu/peak.cpp.
define("cpu_peak", "(str kind, int steps) -> int", fake=None)
# A read of every byte, for the ceilings of benchmarks on a GPU: csrc/cuda/peak.cu.
define("peak_read", "(Tensor bytes) -> Tensor", fake=None)

HERE = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)

cuda_status = "not looked for yet"


def _how_to_build() -> str:
    if (HERE.parent / "setup.py").exists() and (HERE.parent / "csrc").exists():
        return f"Build it with\n    cd {HERE.parent} && python setup.py native"
    return (
        "Install it again with\n"
        "    pip install --force-reinstall --no-deps --no-build-isolation qkernels"
    )


def load() -> None:
    """Loads _C_cpu and, where it was built and torch has CUDA, _C_cuda. Raises ImportError."""
    global cuda_status
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(
            f"qkernels needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, this is "
            f"{torch.__version__}. Type\n"
            "    pip install --upgrade torch"
        )
    _load(HERE / "_C_cpu.so")
    library = HERE / "_C_cuda.so"
    if not library.exists():
        cuda_status = "not built (building it needs nvcc and a torch with CUDA, or FORCE_CUDA=1)"
    elif torch.version.cuda is None:
        cuda_status = f"built, but not loaded: torch {torch.__version__} has no CUDA"
    else:
        _load(library)
        cuda_status = "loaded"


def _load(library: Path) -> None:
    if not library.exists():
        raise ImportError(f"qkernels: the native library {library} is missing. {_how_to_build()}")
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"qkernels: the native library {library} does not load with torch "
            f"{torch.__version__}: {error}\n"
            f"{_how_to_build()}"
        ) from error
