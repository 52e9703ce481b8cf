"""What the machine can do at best, measured again and again in the same run as the kernels."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .machine import best_read, last_level_cache, summary

PEAKS = ("int8", "float32")
# Four times the last-level cache, but at least the first and at most the second.
_READ_BYTES = 256 << 20, 1 << 30
# Twelve multiply-adds take 6 cycles where two start in each: about a millisecond, which opening a
# team of threads takes little of. Not found by timing: on a busy machine one step takes that long.
_PEAK_STEPS = 1 << 19


@dataclass
class Ceilings:
    """Samples of read bandwidth (GB/s) and of the peaks (GOPS), with torch's threads.

    Read bandwidth: the better of two streaming reductions over an array far larger than the caches.
    Peaks: multiply-adds on registers alone, with the instructions that the kernels in use multiply
    with (csrc/cpu/isa/peak.cpp); two operations each.
    """

    read: list[float] = field(default_factory=list)
    peak: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PEAKS})

    def __post_init__(self) -> None:
        self._array = torch.ones(array_bytes() // 8, dtype=torch.int64)

    def measure(self) -> None:
        """Adds one sample of each, the best of two or three tries."""
        self.read.append(best_read(self._array, repeats=2))
        for kind in PEAKS:
            self.peak[kind].append(max(peak(kind) for _ in range(3)))

    def to_dict(self) -> dict[str, Any]:
        """Medians and spread."""
        peaks = {f"{kind}_gops": summary(samples) for kind, samples in self.peak.items()}
        return {"read_gb_per_s": summary(self.read), **peaks}


def array_bytes() -> int:
    """Size of an array that the caches do not hold."""
    least, most = _READ_BYTES
    return min(max(least, 4 * last_level_cache()), most)


def peak(kind: str) -> float:
    """GOPS of multiply-adds on registers, of one of PEAKS."""
    start = time.perf_counter()
    done = torch.ops.qkernels.cpu_peak(kind, _PEAK_STEPS)
    return done / (time.perf_counter() - start) / 1e9
