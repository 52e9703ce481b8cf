"""The build: what the libraries ask of torch and of the CPU, and what setup.py refuses."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "cpu"

needs_objects = pytest.mark.skipif(
    not (OBJECTS / "build.ninja").is_file(),
    reason="not built from this tree: `python setup.py native` leaves its objects in build/cpu",
)
needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets differ on x86 only"
)


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup_py = load_setup()


def output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def undefined_symbols(library: Path) -> set[str]:
    """Names that a library must be given; weak references may stay without."""
    lines = output("nm", "-D", "--undefined-only", library).splitlines()
    return {line.split()[1] for line in lines if line.split()[0] == "U"}


def torch_2_11_symbols() -> set[str]:
    lines = (ROOT / "tests" / "data" / "torch_2_11_symbols.txt").read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


def foreign_symbols(library: Path) -> set[str]:
    """What is neither in torch 2.11's C interface nor versioned by glibc, libstdc++ or libgcc."""
    runtime = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
    names = undefined_symbols(library)
    return {name for name in names if not runtime.search(name)} - torch_2_11_symbols()


def needed_libraries(library: Path) -> set[str]:
    found = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library))
    return {name.split(".so")[0] for name in found}


def cpu_library() -> Path:
    import qkernels

    return Path(qkernels.__file__).parent / "_C_cpu.so"


def test_symbol_list_is_of_2_11() -> None:
    names = torch_2_11_symbols()
    assert "torch_dtype_float8_e8m0fnu" in names  # new in 2.11
    assert "torch_library_def_with_tags" not in names  # new in 2.12


def test_cpu_library_needs_nothing_younger_than_torch_2_11() -> None:
    library = cpu_library()
    assert foreign_symbols(library) == set()
    assert "torch_library_impl" in undefined_symbols(library)  # it does register ops


def test_cpu_library_needs_no_other_library_of_torch() -> None:
    allowed = {"libtorch_cpu", "libstdc++", "libgcc_s", "libc", "libm", "ld-linux-x86-64"}
    needed = needed_libraries(cpu_library())
    assert "libtorch_cpu" in needed
    assert needed <= allowed


def objects(isa: str) -> list[Path]:
    """The objects of one set of csrc/cpu/isa, as the rules name them; old ones may lie beside."""
    rules = (OBJECTS / "build.ninja").read_text()
    found = [OBJECTS / name for name in re.findall(rf"^build (\S+\.{isa}\.o): cc", rules, re.M)]
    assert found, f"build/cpu/build.ninja has no {isa} objects"
    return found


@needs_objects
@needs_x86
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_isa_objects_share_no_code(isa: str) -> None:
    """The linker keeps one of several weak definitions, maybe the one with AVX-512 in it."""
    for path in objects(isa):
        kinds = [line.split() for line in output("nm", "--defined-only", path).splitlines()]
        weak = [fields[-1] for fields in kinds if fields[-2] in "WVu"]
        assert weak == [], f"{path.name} defines weak symbols: {weak}"


def instructions(path: Path) -> list[str]:
    lines = output("objdump", "-d", "--no-show-raw-insn", path).splitlines()
    return [line.split("\t", 1)[1] for line in lines if re.match(r"\s+[0-9a-f]+:\t", line)]


@needs_objects
@needs_x86
def test_scalar_objects_have_no_avx() -> None:
    for path in objects("scalar"):
        avx = [text for text in instructions(path) if re.match(r"v[a-z]|.*%[yz]mm", text)]
        assert avx == [], f"{path.name}: {avx[:3]}"


@needs_objects
@needs_x86
def test_avx2_objects_have_no_avx512() -> None:
    for path in objects("avx2"):
        wide = [text for text in instructions(path) if re.search(r"%zmm|%k[0-7]\b", text)]
        assert wide == [], f"{path.name}: {wide[:3]}"


@needs_objects
@needs_x86
def test_each_set_uses_its_instructions() -> None:
    """So that the two tests above look at objects that could fail them."""
    for isa, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        assert any(register in text for path in objects(isa) for text in instructions(path))


def test_wheel_is_tagless_and_complete(tmp_path: Path) -> None:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip_wheel, "--no-deps", "--no-build-isolation", str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"qkernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    info = json.loads(archive.read("qkernels/build_info.json"))
    files = set(archive.namelist())
    assert {"qkernels/__init__.py", "qkernels/py.typed", "qkernels/ops/registry.py"} <= files
    libraries = {name for name in files if name.endswith(".so")}
    assert libraries == {f"qkernels/{name}.so" for name in info["built"]}
    assert "scalar" in info["built"]["_C_cpu"]["targets"]
    assert ("_C_cuda" in info["built"]) != ("_C_cuda" in info["skipped"])


def hide_torch(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(place))


def test_no_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide_torch(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=r"there is none(?s:.*)pip install 'torch>=2\.11'"):
        setup_py.Torch.find()


@pytest.mark.parametrize("version, fits", [("2.10.1", False), ("2.11.0", True), ("3.0.0a0", True)])
def test_torch_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, fits: bool
) -> None:
    """Found beside the environment's packages though it cannot be imported: build isolation."""
    hide_torch(monkeypatch, tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = '13.0'\n")
    if fits:
        found = setup_py.Torch.find()
        assert (found.root, found.version, found.cuda) == (tmp_path / "torch", version, "13.0")
    else:
        with pytest.raises(SystemExit, match=re.escape(f"is torch {version}")):
            setup_py.Torch.find()


@pytest.mark.parametrize(
    "text, targets",
    [
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("8.0+PTX", ["sm_80", "compute_80"]),
        ("8.0 8.6, 9.0a+PTX;", ["sm_80", "sm_86", "sm_90a", "compute_90a"]),
        ("12.0f", ["sm_120f"]),
        ("7.5", ["sm_75"]),
    ],
)
def test_cuda_archs(text: str, targets: list[str]) -> None:
    flags = setup_py.cuda_archs(text)
    assert list(flags) == targets
    for target, flag in flags.items():
        number = target.split("_")[1]
        assert flag == f"-gencode=arch=compute_{number},code={target}"


@pytest.mark.parametrize("text, entry", [("8.0;Hopper", "Hopper"), ("90", "90"), ("7.0", "7.0")])
def test_bad_cuda_archs(text: str, entry: str) -> None:
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: '{entry}'"):
        setup_py.cuda_archs(text)


@pytest.mark.parametrize("nvcc", [None, "/opt/cuda/bin/nvcc"])
@pytest.mark.parametrize("cuda", [None, "13.0"])
@pytest.mark.parametrize("variable", [None, "FORCE_CUDA", "QKERNELS_CUDA"])
def test_when_cuda_is_built(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, cuda: str | None, nvcc: str | None
) -> None:
    for name in ("FORCE_CUDA", "QKERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "0" if variable == "QKERNELS_CUDA" else "1")
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: nvcc)
    torch = setup_py.Torch(Path("torch"), "2.13.0", cuda)
    if variable == "FORCE_CUDA" and nvcc is None:
        with pytest.raises(SystemExit, match="FORCE_CUDA=1 needs nvcc"):
            setup_py.why_no_cuda(torch)
        return
    reason = setup_py.why_no_cuda(torch)
    built = variable != "QKERNELS_CUDA" and nvcc is not None and (cuda or variable == "FORCE_CUDA")
    assert (reason is None) == bool(built)
