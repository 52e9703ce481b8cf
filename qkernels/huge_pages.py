"""Weights on huge pages, where the environment variable QKERNELS_HUGE_PAGES is 1: a decode step
reads every weight once, and with pages of 4 KB some of that time goes into finding the pages.

It is not the default: what it adds differs between machines, the first step takes longer, and a
process that forks after loading would no longer share the weights with its children. Large weights
need none of this: `pack` asks for huge pages before it writes them, unless the variable is 0.

Nothing is allocated or moved by hand. The kernel is asked to put blocks of 2 MB in which weights
lie already on one page each (Linux 6.1, MADV_COLLAPSE); older ones are told that it may
(MADV_HUGEPAGE) and do so in the background. Addresses and contents stay.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

HUGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def allowed(setting: Path = SETTING) -> bool:
    """Whether huge pages are asked for (QKERNELS_HUGE_PAGES=1) and this machine lets programs use
    them: Linux, not switched off by its owner ("never")."""
    if not sys.platform.startswith("linux") or os.environ.get("QKERNELS_HUGE_PAGES") != "1":
        return False
    try:
        return "[never]" not in setting.read_text()
    except OSError:
        return False


def blocks(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    """Numbers of the 2 MB blocks of the address space at least half of which `tensors` fill. None,
    and tensors that are not in CPU memory, are passed over; one that is listed twice counts
    once."""
    places = {
        (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        for tensor in tensors
        if tensor is not None and tensor.device.type == "cpu"
    }
    filled: Counter[int] = Counter()
    for start, size in places:
        for block in range(start // HUGE, (start + size - 1) // HUGE + 1):
            filled[block] += min(start + size, (block + 1) * HUGE) - max(start, block * HUGE)
    return sorted(block for block, size in filled.items() if 2 * size >= HUGE)


def use_huge_pages(tensors: Iterable[torch.Tensor | None]) -> int:
    """Asks for huge pages under `tensors`, where `blocks` says that it is worth it.

    Returns the bytes that lie on huge pages now; 0 where that is not allowed or not known. A kernel
    that refuses is not an error: the weights are the same, only slower to read.
    """
    if not allowed():
        return 0
    libc = ctypes.CDLL(None)
    size, done = ctypes.c_size_t(HUGE), 0
    for block in blocks(tensors):
        address = ctypes.c_void_p(block * HUGE)
        libc.madvise(address, size, _MADV_HUGEPAGE)
        done += libc.madvise(address, size, _MADV_COLLAPSE) == 0
    return done * HUGE
