"""Compiles the Triton kernels ahead of time for GPUs that are not here, and says what they take.

    python tests/triton_aot.py                 a subset for every target
    python tests/triton_aot.py --all           everything (minutes to an hour)
    python tests/triton_aot.py --target sm_90 --part linear --match W4

A row per kernel: shared memory of a block and registers of a thread, bytes that spill, matrix
instructions. The exit status is 1 where a product of matrices uses none, or something does not
compile.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = sorted(p.stem[len("triton_aot_") :] for p in Path(__file__).parent.glob("triton_aot_*.py"))
# Target -> (backend, architecture, threads of a warp, class of the tables).
TARGETS: dict[str, tuple[str, int | str, int, str]] = {
    "sm_80": ("cuda", 80, 32, "sm80"),
    "sm_90": ("cuda", 90, 32, "sm90"),
    "sm_100": ("cuda", 100, 32, "sm100"),
    "gfx942": ("hip", "gfx942", 64, "gfx9"),
    "gfx1100": ("hip", "gfx1100", 32, "gfx11"),
}
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfma_\w+|v_wmma_\w+)")


def compile_case(case: dict[str, Any], target: str) -> dict[str, Any]:
    """What a compiled kernel takes: shared (bytes), registers, spills (bytes), matrix (names)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp, _ = TARGETS[target]
    names = case["kernel"].arg_names
    constexprs = dict(case["constexprs"])
    signature = {n: case["signature"].get(n, "constexpr") for n in names}
    for name in names:
        if signature[name] == "constexpr":
            constexprs.setdefault(name, None)
    aligned = [n for n in case.get("aligned", []) if signature.get(n, "constexpr") != "constexpr"]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(case["kernel"], signature, constexprs, attrs)
    options = {"enable_fp_fusion": False, **case["options"]}
    start = time.monotonic()
    made = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    seconds = time.monotonic() - start
    text = made.asm["ptx"] if backend == "cuda" else made.asm["amdgcn"]
    registers, spills = usage(made, backend)
    return {
        "name": case["name"],
        "target": target,
        "shared": made.metadata.shared,
        "registers": registers,
        "spills": spills,
        "matrix": sorted(set(MATRIX.findall(text))),
        "needs_matrix": bool(case.get("matrix")),
        "seconds": round(seconds, 2),
    }


def usage(made: Any, backend: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes of it that spill."""
    if backend == "hip":
        found = {
            key: int(value)
            for key, value in re.findall(
                r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", made.asm["amdgcn"]
            )
        }
        return found.get("vgpr_count", 0), 4 * found.get("vgpr_spill_count", 0)
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def said(row: dict[str, Any]) -> str:
    matrix = " ".join(row["matrix"]) or "-"
    taken = f"registers {row['registers']:3} spills {row['spills']:4} {matrix}"
    return f"{row['target']:8} {row['name']:50} shared {row['shared']:6} {taken}"


def cases_of(part: str, target: str, every: bool) -> list[dict[str, Any]]:
    """Of a module triton_aot_<part>.py: its cases(class of GPUs, every), or cases() for all GPUs,
    of which a subset is each ninth."""
    module = importlib.import_module(f"triton_aot_{part}")
    if inspect.signature(module.cases).parameters:
        by_class: list[dict[str, Any]] = module.cases(TARGETS[target][3], every)
        return by_class
    found: list[dict[str, Any]] = module.cases()
    return found if every else found[::9]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--match", default="", help="only names that contain this")
    parser.add_argument("--json", type=Path, help="where the rows go as JSON too")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before qkernels looks at it
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    rows, failed = [], 0
    for target in options.target:
        for part in options.part:
            for case in cases_of(part, target, options.all):
                if options.match not in case["name"]:
                    continue
                try:
                    row = compile_case(case, target)
                except Exception as error:
                    print(f"{target:8} {case['name']}: does not compile: {error}", flush=True)
                    row = {"name": case["name"], "target": target, "error": str(error)}
                    rows.append(row)
                    failed += 1
                    continue
                bad = row["needs_matrix"] and not row["matrix"]
                failed += bad
                rows.append(row)
                print(said(row) + ("  NO MATRIX INSTRUCTION" if bad else ""), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
