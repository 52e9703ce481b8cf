"""Weights on huge pages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkernels.huge_pages import HUGE, allowed, blocks, use_huge_pages


def at_block(size: int, offset: int = 0) -> torch.Tensor:
    """A tensor of `size` bytes that starts `offset` bytes into a block of 2 MB."""
    room = torch.zeros(size + offset + HUGE, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE + offset
    return room[start : start + size]


def test_blocks_are_those_at_least_half_filled() -> None:
    whole = at_block(2 * HUGE)
    first = whole.data_ptr() // HUGE
    assert blocks([whole]) == [first, first + 1]
    assert blocks([whole[: HUGE + HUGE // 2]]) == [first, first + 1]
    assert blocks([whole[: HUGE + HUGE // 2 - 1]]) == [first]
    assert blocks([whole[HUGE // 2 + 1 : HUGE]]) == []


def test_small_tensors_fill_a_block_together_and_count_once() -> None:
    whole = at_block(HUGE)
    quarter = HUGE // 4
    parts = [whole[i * quarter : (i + 1) * quarter] for i in range(4)]
    assert blocks([parts[0], None, parts[2]]) == [whole.data_ptr() // HUGE]
    assert blocks([parts[0], parts[0]]) == []
    assert blocks([torch.empty(HUGE, dtype=torch.uint8, device="meta")]) == []


def smaps(address: int, field: str) -> list[str]:
    """What the kernel says of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(f"{field}:"):
            return line.split()[1:]
    raise AssertionError("the tensor is in no mapping")


def test_a_weight_moves_to_huge_pages_and_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_HUGE_PAGES", "1")
    if not allowed():
        pytest.skip("this machine has no huge pages for programs")
    weight = at_block(8 * HUGE)
    weight.copy_(torch.arange(weight.numel()) % 251)
    before, address = weight.clone(), weight.data_ptr()
    moved = use_huge_pages([weight])
    if moved == 0:
        pytest.skip("the kernel has no MADV_COLLAPSE, or no huge page left")
    assert moved <= 8 * HUGE
    assert int(smaps(address, "AnonHugePages")[0]) * 1024 >= moved
    assert weight.data_ptr() == address and torch.equal(weight, before)


PACK_AND_PRINT_FLAGS = """
import torch
from qkernels import ops
from test_huge_pages import HUGE, smaps

packed = ops.pack(torch.randint(0, 16, (8192, 16384), dtype=torch.uint8), 4, 32)
assert packed.nbytes == 32 * HUGE
print(*smaps(packed.data_ptr() + packed.nbytes // 2, "VmFlags"))
"""


@pytest.mark.parametrize("setting", [None, "0"])
def test_large_weights_are_packed_where_huge_pages_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.setenv("QKERNELS_HUGE_PAGES", "1")
    if not allowed():
        pytest.skip("this machine has no huge pages for programs")
    if setting is None:
        monkeypatch.delenv("QKERNELS_HUGE_PAGES")
    else:
        monkeypatch.setenv("QKERNELS_HUGE_PAGES", setting)
    # In a process of its own: the advice stays with memory that malloc hands out again.
    flags = subprocess.run(
        [sys.executable, "-c", PACK_AND_PRINT_FLAGS],
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "rd" in flags
    assert ("hg" in flags) == (setting is None)  # asked for; whether one is free is another matter


def test_the_owner_of_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.delenv("QKERNELS_HUGE_PAGES", raising=False)
    assert not allowed(setting)  # only where it is asked for
    monkeypatch.setenv("QKERNELS_HUGE_PAGES", "1")
    assert allowed(setting)
    setting.write_text("always madvise [never]\n")
    assert not allowed(setting)
    assert not allowed(tmp_path / "missing")
    setting.write_text("[always] madvise never\n")
    monkeypatch.setenv("QKERNELS_HUGE_PAGES", "0")
    assert not allowed(setting)
    assert use_huge_pages([at_block(HUGE)]) == 0
