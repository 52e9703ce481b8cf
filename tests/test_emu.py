"""The emulated GPU itself: kernels with one fault each are reported, the same kernels done right
are not, and its 16-bit numbers and matrix products are a GPU's. The kernels are in
cpp/emulator.cu."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from test_build import ROOT, setup_py

OBJECTS = ROOT / "build" / "emu"
EMULATOR = ("emu", "memory", "global", "numbers", "hooks")

# What the report must say, of each kernel of cpp/emulator.cu.
FAULTS = {
    "read_past_the_end": "read of 4 bytes at byte 1024 of a buffer of 1024",
    "read_before_the_beginning": "read of 4 bytes at byte -4 of a buffer",
    "write_past_the_end": "write of 4 bytes at byte 1024 of a buffer of 1024",
    "write_to_an_input": "write of 4 bytes of a buffer that is read only",
    "read_misaligned": "read of 16 bytes at an address that is not a multiple",
    "write_misaligned": "write of 16 bytes at an address that is not a multiple",
    "two_threads_write_one_element": "of a buffer races with the write of thread",
    "two_blocks_write_one_element": "of another block",
    "another_thread_reads_what_one_wrote": "",  # unwritten or racing: as the fibers ran
    "another_thread_writes_what_one_reads": "races with the",
    "reads_an_output_that_is_not_written": "of a buffer, which nobody has written",
    "bytes_beside_each_other": "of a buffer races with the write of thread",
    "last_block_fence": "races with the write of thread",
    "last_block_barrier_before": "races with the write of thread",
    "last_block_barrier_after": "",
    "last_block_is_last": "of a buffer, which nobody has written",
    "reads_others_through_l1": "through L1",
    "constant_path_sees_no_writes": "by a path that sees no writes",
    "before_dependency_wait": "before dependency_wait of memory that the launch before may use",
    "new_constants_before_dependency_wait": "read before dependency_wait of memory that the",
    "no_dependency_wait": "no thread of a dependent launch has called dependency_wait",
    "index_outside_of_an_array": "index 8 is outside of its array, ",
    "shared_past_the_end": "write of 4 bytes at shared byte 4096; the block has 4096",
    "shared_unwritten": "read of shared byte 252, which nobody has written",
    "read_after_write": "",
    "write_after_read": "",
    "write_after_write": "races with the write of thread",
    "read_after_write_in_a_warp": "",
    "write_after_read_in_a_warp": "",
    "shuffle_is_no_barrier": "races with the write of thread",
    "warp_sync_is_for_one_warp": "",
    "atomic_after_write": "",
    "read_after_atomic": "races with",
    "atomic_after_read": "races with",
    "shared_bytes_beside_each_other": "races with the write of thread",
    "shared_misaligned": "write of 16 bytes at an address that is not a multiple",
    "copy_without_wait": "into which a copy is on its way that nobody has waited for",
    "copy_waits_for_too_few": "into which a copy is on its way that nobody has waited for",
    "copy_without_commit": "into which a copy is on its way that nobody has waited for",
    "copy_without_barrier": "of shared byte",
    "copy_into_what_is_read": "of shared byte",
    "copy_of_too_much": "copy_async of 16 bytes at byte 1024 of a buffer of 1024",
    "copy_of_a_part": "copy_async of 4 bytes at byte 1024 of a buffer of 1024",
    "copy_misaligned": "copy_async of 8 bytes between addresses that are no multiples",
    "bulk_without_wait": "",
    "bulk_expects_too_much": "deadlock, 64 of 64 threads wait; thread 0 waits at mbarrier_wait",
    "bulk_expects_too_little": "bulk_load: 256 bytes of a phase that expects 128",
    "bulk_parity": "",
    "bulk_without_init": "an mbarrier that was not initialized",
    "bulk_size": "bulk_load of 252 bytes: addresses and size must be multiples of 16",
    "bulk_of_nothing": "bulk_load of nothing",
    "bulk_address": "bulk_load of 256 bytes: addresses and size must be multiples of 16",
    "bulk_init_seen_by_others": "",
    "bulk_expects_twice": "mbarrier_expect twice in one phase",
    "bulk_into_what_is_read": "",
    "diverged_warp": "other lanes of its warp are at",
    "lanes_stay_away": "",
    "barrier_not_reached_by_all": "",
    "threads_leave_before_the_barrier": "",
    "rows_from_other_memory": "read of 16 bytes at an address that is not a multiple",
    "too_much_shared_memory": "invalid configuration argument",
    "too_many_threads": "invalid configuration argument",
    "no_blocks": "invalid configuration argument",
    "a_part_of_a_warp": "a block must be whole warps",
}
# Found by the launch, not by a thread.
OF_THE_LAUNCH = {
    "no_dependency_wait",
    "too_much_shared_memory",
    "too_many_threads",
    "no_blocks",
    "a_part_of_a_warp",
}
SIZES = ("float16", torch.float16, False), ("bfloat16", torch.bfloat16, True)
TYPES = pytest.mark.parametrize(
    ("dtype", "bf16"), [(t, b) for _, t, b in SIZES], ids=[name for name, _, _ in SIZES]
)


def build(directory: Path, more: str = "") -> ctypes.CDLL:
    """cpp/emulator.cu and the emulator as a library, the latter's fibers with `more` flags."""
    if not (OBJECTS / "emu.o").exists():
        pytest.skip("build/emu is not built (python setup.py native --emu)")
    flags = [*setup_py.emulation_flags(setup_py.Torch.find(), directory), "-I", str(ROOT / "csrc")]
    compiler = setup_py.cxx()
    kernels = directory / "emulator.o"
    source = str(ROOT / "tests" / "cpp" / "emulator.cu")
    command = [*compiler, *flags, *shlex.split(setup_py.EMULATION_HOOKS), "-x", "c++"]
    subprocess.run([*command, "-c", source, "-o", str(kernels)], check=True)
    parts = [str(OBJECTS / f"{name}.o") for name in EMULATOR]
    if more:
        parts[0] = str(directory / "emu.o")
        part = str(ROOT / "csrc" / "emu" / "emu.cpp")
        subprocess.run([*compiler, *flags, more, "-c", part, "-o", parts[0]], check=True)
    library = directory / "emulator.so"
    subprocess.run([*compiler, "-shared", str(kernels), *parts, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.case_name.restype = loaded.case_outcome.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(autouse=True)
def _messages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_EMU_SOURCES", "0")


@pytest.fixture
def architecture(
    request: pytest.FixtureRequest, emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QKERNELS_EMU_ARCHITECTURE", str(request.param))
    out = torch.zeros(9, dtype=torch.int32)
    emulator.block_order(pointer(out))  # a launch takes it over


# sm_75 makes do with smaller products and shuffles (cuda/ptx_75.cuh).
ARCHITECTURES = pytest.mark.parametrize("architecture", [75, 90], indirect=True)


def case_names(library: ctypes.CDLL) -> list[str]:
    names = []
    while name := library.case_name(len(names)):
        names.append(name.decode())
    return names


def outcome(library: ctypes.CDLL, name: str, *, wrong: bool) -> str:
    text: bytes = library.case_outcome(case_names(library).index(name), wrong)
    return text.decode()


def test_every_case_is_expected(emulator: ctypes.CDLL) -> None:
    assert case_names(emulator) == list(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(emulator: ctypes.CDLL, name: str) -> None:
    for _ in range(6):  # the fibers run in another order each time
        said = outcome(emulator, name, wrong=True)
        assert FAULTS[name] in said
        if name not in OF_THE_LAUNCH:
            assert said.startswith("emulated GPU: test_op, block (")
            assert "thread" in said
        assert outcome(emulator, name, wrong=False) == ""


def test_reports_say_where_in_the_source(
    emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QKERNELS_EMU_SOURCES")
    said = outcome(emulator, "read_past_the_end", wrong=True)
    assert "block (0, 0, 0) of (1, 1, 1), thread 63: read" in said
    assert "emulator.cu:" in said


@pytest.mark.parametrize(
    ("architecture", "shared"), [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (120, 99)]
)
def test_shared_memory_of_a_block(
    emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, architecture: int, shared: int
) -> None:
    monkeypatch.setenv("QKERNELS_EMU_ARCHITECTURE", str(architecture))
    emulator.most_shared_memory.restype = ctypes.c_int
    assert emulator.most_shared_memory() == shared << 10


def test_blocks_run_in_changing_order(emulator: ctypes.CDLL) -> None:
    orders = set()
    for _ in range(4):
        out = torch.zeros(9, dtype=torch.int32)
        emulator.block_order(ctypes.c_void_p(out.data_ptr()))
        orders.add(tuple(out[:8].tolist()))
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(8))}
    assert len(orders) > 1


def test_fibers_of_the_c_library(tmp_path: Path) -> None:
    """Where no switch is written in assembler, ucontext's is used."""
    library = build(tmp_path, "-DQK_EMU_UCONTEXT")
    for name in ("read_after_write", "bulk_into_what_is_read", "diverged_warp"):
        assert outcome(library, name, wrong=True) != ""
        assert outcome(library, name, wrong=False) == ""


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def same_floats(got: torch.Tensor, want: torch.Tensor) -> bool:
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    nan = got.isnan()
    return torch.equal(nan, want.isnan()) and torch.equal(
        got.view(bits)[~nan], want.view(bits)[~nan]
    )


@TYPES
def test_widening_is_torchs(emulator: ctypes.CDLL, dtype: torch.dtype, bf16: bool) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    got = torch.empty(2**16)
    emulator.to_float(pointer(every), pointer(got), ctypes.c_int64(2**16), bf16)
    assert same_floats(got, every.view(dtype).float())


@TYPES
def test_narrowing_is_torchs(emulator: ctypes.CDLL, dtype: torch.dtype, bf16: bool) -> None:
    """Every 16-bit value and the floats beside it and beside the ties, and random bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    ties = (every.sort().values[1:].double() + every.sort().values[:-1].double()) / 2
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (2_000_000,), generator=generator)
    near = torch.cat([every, ties.float()])
    inf = torch.tensor(torch.inf)
    values = torch.cat([near, near.nextafter(inf), near.nextafter(-inf)])
    values = torch.cat([values, bits.to(torch.int32).view(torch.float32), inf[None], -inf[None]])
    values = torch.cat([values, torch.tensor([65504.0, 65519.996, 65520.0, 2.0**-25, 3.4e38])])
    got = torch.empty(len(values), dtype=torch.int16)
    emulator.from_float(pointer(values), pointer(got), ctypes.c_int64(len(values)), bf16)
    assert same_floats(got.view(dtype), values.to(dtype))


@ARCHITECTURES
@TYPES
def test_fma_pair_rounds_once(
    emulator: ctypes.CDLL, dtype: torch.dtype, bf16: bool, architecture: None
) -> None:
    """No neighbour of the result is closer to the sum, which float64 knows to 2^-53."""
    generator = torch.Generator().manual_seed(2)
    n = 400_000
    a, b, c = (
        torch.randint(-(2**15), 2**15, (n,), generator=generator).to(torch.int16) for _ in range(3)
    )
    got = torch.empty(n, dtype=torch.int16)
    half = ctypes.c_int64(n // 2)
    emulator.fma_pairs(pointer(a), pointer(b), pointer(c), pointer(got), half, bf16)
    x, y, z = (t.view(dtype).double() for t in (a, b, c))
    total = x * y + z
    value = got.view(dtype).double()
    largest = torch.finfo(dtype).max
    sure = total.isfinite() & (total.abs() <= largest)
    assert int(sure.sum()) > n // 4
    assert (value[total.abs() > 1.01 * largest].isinf()).all()
    assert torch.equal(value.isnan(), total.isnan())
    for neighbour in (got + 1, got - 1):
        other = neighbour.view(dtype).double()
        closer = (other - total).abs() < (value - total).abs() - total.abs() * 2.0**-52
        assert not (closer & sure).any()


def test_fma_pair_of_tiny_numbers(emulator: ctypes.CDLL) -> None:
    """A product far below the smallest float is not lost to the rounding of a tie."""
    tiny = 2.0**-120
    a = torch.tensor([tiny, -tiny], dtype=torch.bfloat16)
    b = torch.tensor([tiny, tiny], dtype=torch.bfloat16)
    got = torch.empty(2, dtype=torch.bfloat16)
    for c in (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)):
        emulator.fma_pairs(
            pointer(a), pointer(b), pointer(c), pointer(got), ctypes.c_int64(1), True
        )
        assert torch.equal(got, c)


@ARCHITECTURES
@TYPES
def test_products_of_floats(
    emulator: ctypes.CDLL, dtype: torch.dtype, bf16: bool, architecture: None
) -> None:
    generator = torch.Generator().manual_seed(3)
    for scale in (1.0, 2.0**-10):
        a = torch.randn(16, 16, generator=generator).to(dtype)
        b = (torch.randn(8, 16, generator=generator) * scale).to(dtype)
        d = torch.randn(16, 8, generator=generator)
        want = a.double() @ b.double().T + d.double()
        size = a.double().abs() @ b.double().abs().T + d.double().abs()
        emulator.multiply(pointer(a), pointer(b), pointer(d), int(bf16))
        # Two steps that cut nine terms, each a bit below float32's last, and a sum to float32's.
        assert ((d.double() - want).abs() <= 2 * (9 * 2.0**-24 + 2.0**-23) * size).all()
    whole = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    other = torch.randint(-8, 9, (8, 16), generator=generator).to(dtype)
    d = torch.zeros(16, 8)
    emulator.multiply(pointer(whole), pointer(other), pointer(d), int(bf16))
    assert torch.equal(d, whole.float() @ other.float().T)


def test_products_are_cut_off(emulator: ctypes.CDLL) -> None:
    """A sum loses what lies below its last bit, and products what lies below the largest's."""
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(8, 16, dtype=torch.float16)
    d = torch.ones(16, 8)
    a[:, 0], b[:, 0] = 2.0**-12, 1.5 * 2.0**-12  # 0.75 units of the last place of 1
    emulator.multiply(pointer(a), pointer(b), pointer(d), 0)
    assert torch.equal(d, torch.ones(16, 8))
    d = -torch.ones(16, 8)
    a[:, 1], b[:, 1] = 1.0, 1.0
    emulator.multiply(pointer(a), pointer(b), pointer(d), 0)
    assert torch.equal(d, torch.full((16, 8), 2.0**-24))  # 1 - 1 + 1.5 * 2^-24, one bit kept


@ARCHITECTURES
@pytest.mark.parametrize(("kind", "low"), [(2, 0), (3, -128)], ids=["u8", "s8"])
def test_products_of_bytes(emulator: ctypes.CDLL, kind: int, low: int, architecture: None) -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randint(low, low + 256, (16, 32), generator=generator)
    b = torch.randint(-128, 128, (8, 32), generator=generator)
    d = torch.randint(-1000, 1000, (16, 8), generator=generator).to(torch.int32)
    want = (a @ b.T + d).to(torch.int32)
    a_bytes, b_bytes = a.to(torch.uint8 if low == 0 else torch.int8), b.to(torch.int8)
    emulator.multiply(pointer(a_bytes), pointer(b_bytes), pointer(d), kind)
    assert torch.equal(d, want)
