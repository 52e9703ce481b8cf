"""Which device a decoder runs on, and why CUDA cannot be used where it cannot."""

from __future__ import annotations

import json
import re

import torch

from . import _library, triton

LEAST_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16 products: csrc/cuda/ptx.cuh
_capabilities: dict[int, tuple[int, int]] = {}


def capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU, asked once."""
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def too_old(found: tuple[int, int]) -> str | None:
    """Why the kernels do not run on GPUs of this capability; None if they do."""
    if found >= LEAST_CAPABILITY:
        return None
    have, need = (".".join(map(str, version)) for version in (found, LEAST_CAPABILITY))
    return f"the GPU has compute capability {have}, and the kernels need {need}"


def covered(targets: list[str], found: tuple[int, int]) -> bool:
    """Whether code compiled for `targets` runs on a GPU of this capability.

    sm_80 runs on 8.x from 8.0 on, sm_90a on 9.0 alone, compute_80 is compiled when it is loaded, on
    whatever is no older.
    """
    for target in targets:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", target)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        exact = match[4] == "a"
        family = match[1] == "sm"
        if found == built or (not exact and found > built and (not family or found[0] == built[0])):
            return True
    return False


def cuda_targets() -> list[str]:
    """What _C_cuda was compiled for, as the build noted it; [] where nothing says."""
    path = _library.HERE / "build_info.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    found = facts.get("built", {}).get("_C_cuda", {}).get("targets", [])
    return [str(target) for target in found]


def library_problem(index: int | None = None) -> str | None:
    """Why the CUDA library does not run on GPU number `index` (None: on no GPU in particular), with
    what to do about it; None if it does."""
    if _library.cuda_status != "loaded":
        return (
            f"the CUDA library _C_cuda is {_library.cuda_status}. With nvcc on PATH, build it by\n"
            "    FORCE_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation qkernels"
        )
    targets = cuda_targets()
    if index is not None and targets and not covered(targets, found := capability(index)):
        version = f"{found[0]}.{found[1]}"
        return (
            f"_C_cuda was built for {', '.join(targets)}, which a GPU of compute capability "
            f'{version} cannot run; build it again with TORCH_CUDA_ARCH_LIST="{version}"'
        )
    return None


def cuda_problem(index: int | None = None) -> str | None:
    """Why GPU number `index` (None: the current one) cannot be used, with what to do about it; None
    if it can: by the CUDA library, or else by the Triton kernels."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} has no CUDA; install one that has, as "
            "https://pytorch.org/get-started/locally says"
        )
    no_triton = triton.problem()
    if no_triton is not None and torch.version.hip is not None:
        return f"on AMD GPUs kernels are Triton's: {no_triton}"
    if no_triton is not None and (no_library := library_problem()) is not None:
        return f"{no_library}\nor let Triton compile kernels: {no_triton}"
    if not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False; nvidia-smi may say why)"
    try:  # this starts CUDA, which fails in forked processes and where others have the GPU alone
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if index is None else index
        if not 0 <= index < count:
            return f"there is no GPU number {index}; torch sees {count}"
        found = capability(index)
    except RuntimeError as error:
        return f"CUDA does not start here: {str(error).splitlines()[0]}"
    if torch.version.hip is None and (reason := too_old(found)):
        return reason
    if no_triton is not None and (no_library := library_problem(index)) is not None:
        return f"{no_library}\nor let Triton compile kernels: {no_triton}"
    return None


def resolve(device: str | torch.device) -> torch.device:
    """The device that is meant: "auto" is the current GPU where it can be used, else the CPU.

    "cuda" is the current GPU, with its number. Raises ValueError for a device that there is no
    decoder for, RuntimeError for a GPU that cannot be used, with the reason.
    """
    if device == "auto":
        reason = cuda_problem()
        return torch.device("cpu") if reason else torch.device("cuda", torch.cuda.current_device())
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):  # torch knows no such device
        found = torch.device("meta")
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ValueError(
            f"device {str(device)!r} is not supported: QuantDecoder runs on the CPU (cpu) and on "
            "GPUs (cuda, cuda:1, ...)"
        )
    reason = cuda_problem(found.index)
    if reason is not None:
        raise RuntimeError(f"device {str(device)!r} cannot be used: {reason}")
    index = torch.cuda.current_device() if found.index is None else found.index
    return torch.device("cuda", index)


def said_of_auto() -> str:
    """What device="auto" is on this machine, and why."""
    reason = cuda_problem()
    if reason is not None:
        return f"cpu: {reason.splitlines()[0]}"
    device = resolve("auto")
    major, minor = capability(device.index)
    name = torch.cuda.get_device_name(device.index)
    by = "the CUDA library" if library_problem(device.index) is None else "Triton kernels"
    return f"{device}: {name}, compute capability {major}.{minor}, by {by}"
