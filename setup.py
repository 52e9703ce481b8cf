"""Builds the native libraries with ninja, through LibTorch's stable ABI, and packages them without a Python tag."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11

# Flags of each instruction set; csrc/cpu/kernels.cpp asks the CPU for the same extensions at run time.
X86_ISAS = {
    "scalar": ["-DQK_ISA_SCALAR"],
    "avx2": ["-DQK_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DQK_ISA_AVX512", "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}


def torch_paths() -> tuple[Path, Path]:
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "qkernels: building needs torch >= 2.11 in this environment. Type\n"
            "    pip install 'torch>=2.11' && pip install --no-build-isolation .\n"
        ) from error
    base = Path(torch.__file__).parent
    return base / "include", base / "lib"


def write_cpu_rules(out: Path, build: Path, *, emulate_avx512: bool = False, sanitize: bool = False) -> Path:
    """Writes build/build.ninja for one CPU library and returns its path."""
    include, lib = torch_paths()
    cxx = os.environ.get("CXX", "g++")
    if shutil.which("ccache") and not cxx.startswith("ccache"):
        cxx = f"ccache {cxx}"
    # Without -ffp-contract=off GCC fuses a * b + c where it likes: decoding would not be bitwise, and a fused op could
    # differ from its parts. Kernels ask for a fused multiply-add with fma().
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
             "-Wno-unused-parameter", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"]
    link = ["-shared", f"-L{lib}", "-ltorch_cpu", "-Wl,--no-undefined", "-lc10"]
    if sanitize:
        flags += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g1"]
        link += ["-fsanitize=address,undefined"]
    if emulate_avx512:
        flags += ["-DQK_EMULATE_AVX512", "-DQK_OPS=qkernels_avx512emu"]
    x86 = platform.machine() in ("x86_64", "AMD64")
    isas = dict(X86_ISAS) if x86 else {"scalar": X86_ISAS["scalar"]}
    if emulate_avx512:
        isas["avx512"] = ["-DQK_ISA_AVX512", "-mavx2", "-mfma", "-mf16c"]
    lines = ["ninja_required_version = 1.3", f"cxx = {cxx}", f"flags = {' '.join(flags)}",
             f"torch = -isystem {include}",
             "rule cc", "  command = $cxx $flags $isa $inc -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc",
             "rule link", f"  command = {cxx.split()[-1]} $in -o $out {' '.join(link)}"]
    objects = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        target = f"{source.stem}.o"
        lines += [f"build {target}: cc {source}", "  inc = $torch"]
        objects.append(target)
    for source in sorted((CSRC / "cpu" / "isa").glob("*.cpp")):
        for isa, isa_flags in isas.items():
            target = f"{source.stem}.{isa}.o"
            lines += [f"build {target}: cc {source}", f"  isa = {' '.join(isa_flags)}"]
            objects.append(target)
    lines += [f"build {out}: link {' '.join(objects)}", f"default {out}", ""]
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text("\n".join(lines))
    return build


def ninja(build: Path) -> None:
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), *(["-j", jobs] if jobs else [])], check=True)


def build_native(target: Path) -> None:
    build = ROOT / "build" / "cpu"
    ninja(write_cpu_rules(target / "_C_cpu.so", build))


class BuildNative(build_py):
    def run(self) -> None:
        super().run()
        inplace = self.editable_mode
        build_native(ROOT / "qkernels" if inplace else Path(self.build_lib) / "qkernels")


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    if sys.argv[1:] == ["native"]:  # the quick path while developing: libraries beside the sources, nothing installed
        build_native(ROOT / "qkernels")
    else:
        setup(cmdclass={"build_py": BuildNative}, distclass=BinaryDistribution)
