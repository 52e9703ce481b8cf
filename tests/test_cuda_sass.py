"""What the compilers make of the CUDA sources: every architecture from sm_75 on, and how kernels
of decoding fetch weights and keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path

import pytest
from test_build import ROOT, setup_py
from test_cuda_build import library, pytestmark

__all__ = ["library", "pytestmark"]

# sm_80 and sm_90a are compiled as a whole by test_cuda_build.py.
OTHER_ARCHS = ["75", "86", "89", "100", "120"]
# 16 bytes per thread and instruction, or a bulk copy. Rows of int4 pages are multiples of 8 bytes
# and no more.
WIDE = re.compile(r"\b(LDG\.E[.\w]*\.128|LDGSTS\.E[.\w]*\.128|UBLKCP)")
OF_INT4_PAGES = re.compile(r"\bLDGSTS\.E[.\w]*\.64")
DECODING = ["linear_gemv_kernel", "linear_int8_decode_kernel", "attention_decode_kernel"]


@pytest.mark.parametrize("arch", OTHER_ARCHS)
def test_every_function_compiles(tmp_path: Path, arch: str) -> None:
    """cpp/ptx.cu calls all of cuda/ptx.cuh, where architectures differ."""
    nvcc = setup_py.find_nvcc()
    source = ROOT / "tests" / "cpp" / "ptx.cu"
    command = [nvcc, "-ccbin", setup_py.cxx()[-1], "-std=c++20", "-O3", "-fmad=false"]
    command += ["-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-I", ROOT / "csrc"]
    command += ["-c", source, "-o", tmp_path / "ptx.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in result.stderr


def disassembler() -> dict[str, str]:
    """The environment in which cuobjdump and the nvdisasm that it calls are found."""
    nvcc = setup_py.find_nvcc()
    packages = Path(sysconfig.get_path("purelib"))
    places = [Path(nvcc).resolve().parent] if nvcc else []
    places += [*packages.glob("nvidia/*/bin"), packages / "triton" / "backends" / "nvidia" / "bin"]
    path = os.pathsep.join([os.environ["PATH"], *map(str, places)])
    missing = [n for n in ("cuobjdump", "nvdisasm") if shutil.which(n, path=path) is None]
    if missing:
        packages_needed = " ".join(f"nvidia-cuda-{name}" for name in missing)
        pytest.skip(f"{' and '.join(missing)} not found (pip install {packages_needed})")
    return {**os.environ, "PATH": path}


def loads_of_kernels(object_file: Path, environment: dict[str, str]) -> dict[str, int]:
    """Per kernel of an object, the wide loads in its sm_90a code."""
    command = ["cuobjdump", "-sass", "-arch", "sm_90a", str(object_file)]
    tool = shutil.which("cuobjdump", path=environment["PATH"])
    assert tool is not None
    run = subprocess.run([tool, *command[1:]], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = defaultdict(int)
    kernel = ""
    for line in run.stdout.split("\n"):
        if "Function : " in line:
            kernel = line.split()[-1]
            found[kernel] += 0
        elif not any(word in line for word in ("LDG", "UBLKCP")):  # nearly all of them
            continue
        elif WIDE.search(line) or ("KvTypeE4" in kernel and OF_INT4_PAGES.search(line)):
            found[kernel] += 1
    return found


@pytest.mark.parametrize("name", DECODING)
def test_decoding_loads_16_bytes_at_once(library: Path, name: str) -> None:
    environment = disassembler()
    sources = [p for p in (ROOT / "csrc" / "cuda").glob("*.cu*") if name in p.read_text()]
    if not sources:
        pytest.skip(f"there is no {name}")
    stem = name.split("_")[0]
    loads: dict[str, int] = {}
    for part in sorted(library.parent.glob(f"{stem}*.o")):
        if name.encode() not in part.read_bytes():
            continue
        loads.update({k: n for k, n in loads_of_kernels(part, environment).items() if name in k})
    assert loads, f"no object has {name}"
    assert [kernel for kernel, count in loads.items() if count == 0] == []
