"""The CUDA library, which compiles without a GPU: what ptxas made of it, what it asks of torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_build import ROOT, foreign_symbols, needed_libraries, setup_py, undefined_symbols

pytestmark = pytest.mark.skipif(
    setup_py.find_nvcc() is None, reason="nvcc is not installed, so _C_cuda cannot be compiled here"
)

ARCHS = ["sm_80", "sm_90a"]


@dataclass
class Entry:
    """One kernel for one architecture, as `ptxas -v` reports it."""

    name: str
    arch: str
    stack: int
    spills: int
    registers: int


@pytest.fixture(scope="module")
def library() -> Path:
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;9.0a"}
    subprocess.run(
        [sys.executable, "setup.py", "native", "--cuda"], cwd=ROOT, env=environment, check=True
    )
    return ROOT / "build" / "cuda" / "_C_cuda.so"


@pytest.fixture(scope="module")
def entries(library: Path) -> list[Entry]:
    text = "".join(log.read_text() for log in library.parent.glob("*.o.log"))
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    return [
        Entry(name, arch, int(stack), int(stores) + int(loads), int(registers))
        for name, arch, stack, stores, loads, registers in pattern.findall(text)
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_are_compiled(entries: list[Entry], arch: str) -> None:
    names = [entry.name for entry in entries if entry.arch == arch]
    # linear: 7 kinds of codes, 2 types, for few tokens 2 sizes.
    linear = (("linear_gemv_kernel", 28), ("linear_tile_kernel", 14))
    # attention: 4 types of pages by 4 head dims, of which 2 for 8 and 16 rows; 6, 6 and 4 dims.
    attention = (("attention_decode_kernel", 24), ("attention_prefill_kernel", 16))
    for kernel, types in (
        ("norm_registers_kernel", 3),
        ("norm_loop_kernel", 3),
        *linear,
        *attention,
    ):
        assert sum(kernel in name for name in names) >= types


def test_no_spills_and_no_local_memory(entries: list[Entry]) -> None:
    assert [entry for entry in entries if entry.spills or entry.stack] == []


def has_a_multiprocessor_to_itself(name: str) -> bool:
    """Kernels of which one block of 256 threads is on a multiprocessor, with longer rings of copies
    instead of more warps: they keep 64 rows by 16 or 32 tokens of sums in registers
    (linear_gemv.cuh, linear_tile.cuh)."""
    return "linear_tile_kernel" in name or bool(re.search(r"linear_gemv_kernel.*Li2EEEv", name))


def hides_latency_in_shared_memory(name: str) -> bool:
    """Attention keeps its sums in registers and what is on its way in shared memory: decode runs in
    blocks of 64 or 128 threads, three of which fit, prefill in one of 256 (attention_*.cuh)."""
    return "attention_decode_kernel" in name or "attention_prefill_kernel" in name


def test_registers_leave_room_for_two_blocks(entries: list[Entry]) -> None:
    """Two blocks of 256 threads share the 65,536 registers of a multiprocessor."""
    alone = (has_a_multiprocessor_to_itself, hides_latency_in_shared_memory)
    shared = [e.registers for e in entries if not any(rule(e.name) for rule in alone)]
    assert max(shared) <= 65536 // 512
    assert max(entry.registers for entry in entries) <= 255


def test_symbols_exist_in_torch_2_11(library: Path) -> None:
    assert foreign_symbols(library) == set()
    assert "aoti_torch_get_current_cuda_stream" in undefined_symbols(library)


def test_needs_torch_and_no_cuda_runtime(library: Path) -> None:
    """Through these entries the loader finds torch's symbols; CUDA's runtime is linked in."""
    needed = needed_libraries(library)
    assert {"libtorch_cpu", "libtorch_cuda"} <= needed
    assert not any("cudart" in name for name in needed)
