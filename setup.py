"""Builds the native libraries with ninja, through LibTorch's stable ABI.

    pip install --no-build-isolation .     (or -e .)
    python setup.py native                 the libraries alone, beside the sources: for development
    python setup.py native --avx512emu     build/avx512emu: the AVX-512 kernels on an AVX2 machine
    python setup.py native --emu           build/emu: the CUDA kernels on the host, for tests
    python setup.py native --sanitize      build/sanitize: package and tests under ASan, UBSan
    python setup.py native --cuda          build/cuda/_C_cuda.so alone, whatever torch is installed

Environment: CXX, CUDA_HOME, MAX_JOBS, TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a"), QKERNELS_CUDA=0 (no
CUDA library), FORCE_CUDA=1 (CUDA library even where torch has no CUDA).
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "qkernels: building needs setuptools >= 77. Type\n"
        "    pip install 'setuptools>=77' ninja 'torch>=2.11'\n"
    ) from None

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"

X86 = platform.machine() in ("x86_64", "AMD64")
OLDEST_TORCH = (2, 11)
# The same version, as the stable headers want it: nothing younger may be called.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Flags of each instruction set; csrc/cpu/kernels.cpp asks the CPU for the same extensions.
AVX2 = "-mavx2 -mfma -mf16c"
X86_ISAS = {
    "scalar": "-DQK_ISA_SCALAR",
    "avx2": f"-DQK_ISA_AVX2 {AVX2}",
    "avx512": f"-DQK_ISA_AVX512 {AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
}
# sm_80 also runs on 8.6 and 8.9; its PTX is what GPUs newer than 9.0 compile from.
CUDA_ARCHS = "8.0+PTX;9.0a"


def stop(message: str) -> SystemExit:
    return SystemExit(f"qkernels: {message}")


@dataclass(frozen=True)
class Torch:
    """An installed torch. Located, not imported: build isolation hides it from imports."""

    root: Path
    version: str
    cuda: str | None

    @staticmethod
    def find() -> Torch:
        spec = importlib.util.find_spec("torch")
        places = [Path(spec.origin).parent] if spec and spec.origin else []
        places += [Path(sysconfig.get_path(p)) / "torch" for p in ("platlib", "purelib")]
        root = next((p for p in places if (p / "version.py").is_file()), None)
        install = "pip install 'torch>=2.11' setuptools ninja"
        hint = f"Type\n    {install} && pip install --no-build-isolation .\n"
        if root is None:
            raise stop(f"building needs torch >= 2.11 here, and there is none. {hint}")
        facts = runpy.run_path(str(root / "version.py"))
        version = str(facts["__version__"])
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
            raise stop(f"building needs torch >= 2.11; {root} is torch {version}. {hint}")
        return Torch(root, version, facts.get("cuda"))


def cxx() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise stop(f"there is no C++ compiler {command[0]!r}; install g++ 11 or newer, or set CXX")
    return command


def with_ccache(command: list[str]) -> str:
    ccache = ["ccache"] if shutil.which("ccache") and command[0] != "ccache" else []
    return shlex.join(ccache + command)


def compiler_version(command: list[str]) -> str:
    text = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V\d[\d.]+|\d+\.\d+\.\d+", text)
    return f"{Path(command[-1]).name} {found.group(0).lstrip('V') if found else 'unknown'}"


def relative(path: Path, directory: Path) -> str:
    """A path as a rule in directory/build.ninja has it; relative, so that caches serve clones."""
    return os.path.relpath(path, directory).replace(" ", "$ ")


def common_flags(torch: Torch, directory: Path) -> tuple[list[str], list[str]]:
    """(for compilers, for the host's compiler): __FILE__ starts at csrc/ or torch/ everywhere."""
    maps = {ROOT: "", torch.root: "torch/"}
    hide = [f"-ffile-prefix-map={os.path.relpath(p, directory)}/={to}" for p, to in maps.items()]
    return ["-std=c++20", "-O3", TORCH_TARGET], ["-fPIC", "-fvisibility=hidden", *hide]


def rule(name: str, command: str, *, depfile: bool = False) -> list[str]:
    depends = ["  depfile = $out.d", "  deps = gcc"] if depfile else []
    return [f"rule {name}", f"  command = {command}", "  description = $out", *depends]


def run_ninja(directory: Path, rules: list[str], objects: list[str], out: Path) -> None:
    """Writes directory/build.ninja, whose rule `link` makes `out` of `objects`, and runs it.
    Another build in this directory is waited for: ninja would compile everything beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run_ninja(directory, rules, objects, out)


def _run_ninja(directory: Path, rules: list[str], objects: list[str], out: Path) -> None:
    target = relative(out, directory)
    rules = [*rules, f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    (directory / "build.ninja").write_text("\n".join(rules))
    bundled = importlib.util.find_spec("ninja") is not None
    if not bundled and shutil.which("ninja") is None:
        raise stop("building needs ninja. Type\n    pip install ninja\n")
    command = [sys.executable, "-m", "ninja"] if bundled else ["ninja"]
    jobs = os.environ.get("MAX_JOBS")
    command += ["-C", str(directory), *(["-j", jobs] if jobs else [])]
    if subprocess.run(command).returncode != 0:
        raise stop("compiling failed; the compiler's message is above")


def build_cpu(
    out: Path, directory: Path, *, emulate_avx512: bool = False, sanitize: bool = False
) -> dict[str, object]:
    """Builds one CPU library, each file of isa/ once per instruction set; returns the facts."""
    if sys.platform != "linux":
        raise stop(f"the libraries build on Linux only so far, not on {sys.platform}")
    torch = Torch.find()
    isas = {name: isa for name, isa in X86_ISAS.items() if X86 or name == "scalar"}
    flags = [flag for flags in common_flags(torch, directory) for flag in flags]
    # Left alone, compilers fuse a * b + c where they like: decoding would not be bitwise, and a
    # fused op could differ from its parts. Kernels ask for a fused multiply-add with fma(). (nvcc:
    # -fmad=false)
    flags += ["-g0", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    flags += ["-Wno-maybe-uninitialized"]  # GCC 12 warns of its own AVX-512 header
    libraries = relative(torch.root / "lib", directory)
    link = f"-shared -L{libraries} -ltorch_cpu -Wl,--no-undefined"
    if sanitize:
        checks = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
        flags += [*checks.split(), "-fno-omit-frame-pointer", "-g1", "-O1"]
        link += f" {checks}"
    if emulate_avx512:
        # Compiling takes longer than running the tests: -O1 takes three fifths of the time of -O3.
        flags += ["-DQK_EMULATE_AVX512", "-DQK_OPS=qkernels_avx512emu", "-O1"]
        isas = {"avx512": f"-DQK_ISA_AVX512 {AVX2}"}
    compile = f"{with_ccache(cxx())} {shlex.join(flags)} $more -MMD -MF $out.d -c $in -o $out"
    rules = rule("cc", compile, depfile=True)
    rules += rule("link", f"{shlex.join(cxx())} $in -o $out {link}")
    units: list[tuple[str, Path, str]] = []  # object, source, flags
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        include = relative(torch.root / "include", directory)
        units.append((f"{source.stem}.o", source, f"-isystem {include}"))
    for source in sorted((CSRC / "cpu" / "isa").glob("*.cpp")):
        for isa, isa_flags in isas.items():
            units.append((f"{source.stem}.{isa}.o", source, isa_flags))
    for name, source, more in units:
        rules += [f"build {name}: cc {relative(source, directory)}", f"  more = {more}"]
    run_ninja(directory, rules, [name for name, _, _ in units], out)
    return {"targets": list(isas), "compiler": compiler_version(cxx()), "headers": torch.version}


def emulation_flags(torch: Torch, directory: Path) -> list[str]:
    flags = [flag for flags in common_flags(torch, directory) for flag in flags]
    flags += ["-DQK_EMULATE_CUDA", "-DQK_OPS=qkernels_emu", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-g1"]
    flags += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unused-variable"]
    return [*flags, "-O1", "-fno-strict-aliasing"]  # compiling takes longer than running


# Calls before every load and store of device code and for wrong indices (csrc/emu/hooks.cpp).
EMULATION_HOOKS = (
    "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -Wno-tsan -fsanitize=bounds"
)


def build_emulated_cuda(out: Path, directory: Path, *, sanitize: bool = False) -> None:
    """Builds the CUDA sources for the host (csrc/emu). Device code is compiled with hooks; ASan,
    with `sanitize`, has its own, and the two do not go together."""
    torch = Torch.find()
    flags = emulation_flags(torch, directory)
    link = f"-shared -L{relative(torch.root / 'lib', directory)} -ltorch_cpu -Wl,--no-undefined"
    hooks = EMULATION_HOOKS
    if sanitize:
        hooks = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
        link += f" {hooks}"
    compile = f"{with_ccache(cxx())} {shlex.join(flags)} $more -MMD -MF $out.d -c $in -o $out"
    rules = rule("cc", compile, depfile=True)
    rules += rule("link", f"{shlex.join(cxx())} $in -o $out {link} -ldl")
    include = f"-isystem {relative(torch.root / 'include', directory)}"
    units = [(source, f"-x c++ {include} {hooks}") for source in (CSRC / "cuda").glob("*.cu")]
    plain = "-O2" + (f" {hooks}" if sanitize else "")
    units += [(source, plain) for source in (CSRC / "emu").glob("*.cpp")]
    if sanitize:
        units = [(source, more) for source, more in units if source.name != "hooks.cpp"]
    for source, more in sorted(units):
        rules += [f"build {source.stem}.o: cc {relative(source, directory)}", f"  more = {more}"]
    run_ninja(directory, rules, [f"{source.stem}.o" for source, _ in sorted(units)], out)


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


def cuda_archs(text: str) -> dict[str, str]:
    """ "8.0+PTX;9.0a" -> {"sm_80": its -gencode flag, "compute_80": ..., "sm_90a": ...}."""
    flags: dict[str, str] = {}
    for item in re.split(r"[;,\s]+", text.strip("; ,")):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not found:
            raise stop(f"TORCH_CUDA_ARCH_LIST: {item!r} is not of the form 8.0, 9.0a or 9.0+PTX")
        if (int(found[1]), int(found[2][0])) < (7, 5):
            raise stop(f"TORCH_CUDA_ARCH_LIST: {item!r} is older than 7.5, which the kernels need")
        arch = found[1] + found[2]
        flags[f"sm_{arch}"] = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        if found[3]:
            flags[f"compute_{arch}"] = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    return flags


def why_no_cuda(torch: Torch) -> str | None:
    """The reason to leave the CUDA library out, or None to build it."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("QKERNELS_CUDA") == "0":
        return "QKERNELS_CUDA=0"
    if find_nvcc() is None:
        if forced:
            raise stop("FORCE_CUDA=1 needs nvcc on PATH, in CUDA_HOME or in /usr/local/cuda/bin")
        return "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda/bin"
    if torch.cuda is None and not forced:
        return f"torch {torch.version} has no CUDA; FORCE_CUDA=1 builds it anyway"
    return None


def build_cuda(out: Path, directory: Path) -> dict[str, object]:
    """Builds the CUDA library; returns the facts. ptxas' report lies beside each object (.log)."""
    torch, nvcc = Torch.find(), find_nvcc()
    if nvcc is None:
        raise stop("the CUDA library needs nvcc on PATH, in CUDA_HOME or in /usr/local/cuda/bin")
    archs = cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS)
    flags, host = common_flags(torch, directory)
    flags += [
        "-Xptxas=-v",
        "-fmad=false",
        "--expt-relaxed-constexpr",  # device code calls the constexpr functions of layout.h
        "-DUSE_CUDA",
        *archs.values(),
        f"-Xcompiler={','.join(host)}",
    ]
    include = relative(torch.root / "include", directory)
    compile = f"{with_ccache([nvcc])} -ccbin={cxx()[-1]} {shlex.join(flags)} -isystem={include}"
    # A CPU-only torch has no libtorch_cuda. Empty libraries with the two sonames leave the NEEDED
    # entries through which the symbols are found where torch has CUDA.
    stub = f"{shlex.join(cxx())} -shared -nostdlib -Wl,-soname,$name -x c /dev/null"
    # They go in by -l: nvcc puts -Xlinker behind the files it is given, but before -l.
    link = f"-ccbin={cxx()[-1]} -shared -cudart=static -Xlinker=--no-as-needed -L."
    report = "> $out.log 2>&1 || (cat $out.log; exit 1)"
    rules = rule("nvcc", f"{compile} -MMD -MF $out.d -c $in -o $out {report}", depfile=True)
    rules += rule("stub", f"{stub} -o $out")
    rules += rule("link", f"{shlex.quote(nvcc)} {link} -ltorch_cpu -ltorch_cuda $in -o $out")
    stubs = ["libtorch_cpu.so", "libtorch_cuda.so"]
    rules += [line for name in stubs for line in (f"build {name}: stub", f"  name = {name}")]
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        objects.append(f"{source.stem}.o")
        rules.append(f"build {objects[-1]}: nvcc {relative(source, directory)}")
    objects += ["|", *stubs]  # ninja: needed, but not in $in
    run_ninja(directory, rules, objects, out)
    nvcc_version = compiler_version([nvcc])
    return {"targets": list(archs), "compiler": nvcc_version, "headers": torch.version}


def build_native(package: Path) -> None:
    """Builds what this machine can into `package`; says so in build_info.json and on stdout."""
    built = {"_C_cpu": build_cpu(package / "_C_cpu.so", BUILD / "cpu")}
    skipped: dict[str, str] = {}
    if reason := why_no_cuda(Torch.find()):
        skipped["_C_cuda"] = reason
        (package / "_C_cuda.so").unlink(missing_ok=True)  # left by an earlier build
    else:
        built["_C_cuda"] = build_cuda(package / "_C_cuda.so", BUILD / "cuda")
    info = {"torch_at_least": "2.11", "built": built, "skipped": skipped}
    (package / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    for name, facts in built.items():
        targets = ", ".join(facts["targets"])  # type: ignore[arg-type]
        print(f"qkernels: built {name} for {targets} with {facts['compiler']}")
    for name, why in skipped.items():
        print(f"qkernels: did not build {name}: {why}")


def native(arguments: list[str]) -> None:
    """`setup.py native`: libraries for development, nothing installed."""
    parser = argparse.ArgumentParser(prog="setup.py native")
    kind = parser.add_mutually_exclusive_group()
    for name in ("avx512emu", "emu", "sanitize", "cuda"):
        kind.add_argument(f"--{name}", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.avx512emu and not X86:
        print(f"qkernels: AVX-512 is emulated on x86 only, not on {platform.machine()}")
    elif chosen.avx512emu:
        out = BUILD / "avx512emu"
        build_cpu(out / "_C_cpu_avx512emu.so", out, emulate_avx512=True)
    elif chosen.emu:
        build_emulated_cuda(BUILD / "emu" / "_C_cuda_emu.so", BUILD / "emu")
    elif chosen.sanitize:
        tree = BUILD / "sanitize"
        for name in ("qkernels", "tests"):
            shutil.rmtree(tree / name, ignore_errors=True)
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
        shutil.copy2(ROOT / "pyproject.toml", tree)
        build_cpu(tree / "qkernels" / "_C_cpu.so", tree / "objects", sanitize=True)
        emulated = tree / "build" / "avx512emu"
        library = emulated / "_C_cpu_avx512emu.so"
        if X86:
            build_cpu(library, emulated, emulate_avx512=True, sanitize=True)
        emulated = tree / "build" / "emu"
        build_emulated_cuda(emulated / "_C_cuda_emu.so", emulated, sanitize=True)
    elif chosen.cuda:
        build_cuda(BUILD / "cuda" / "_C_cuda.so", BUILD / "cuda")
    else:
        build_native(ROOT / "qkernels")


class BuildPackage(build_py):
    def run(self) -> None:
        package = ROOT / "qkernels" if self.editable_mode else Path(self.build_lib) / "qkernels"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)  # build/lib keeps what the sources lost
        super().run()
        build_native(package.resolve())


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Neither CPython's ABI nor one version of torch matters: py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    if sys.argv[1:2] == ["native"]:
        native(sys.argv[2:])
    else:
        commands = {"build_py": BuildPackage, "bdist_wheel": Wheel}
        setup(cmdclass=commands, distclass=BinaryDistribution)
