"""Where a measurement is made: device, versions, commit and date; and how samples are summed up."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_USUAL_CACHE = 32 << 20  # where the machine does not say


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this tree; "+changes" when tracked files differ from it; "unknown" for an
    installed package, which may lie in a repository of somebody else."""
    if not (ROOT / "setup.py").exists() or not (ROOT / "csrc").exists():
        return "unknown"
    try:
        run = ["git", "-C", str(ROOT)]
        head = subprocess.check_output([*run, "rev-parse", "--short=12", "HEAD"], text=True).strip()
        dirty = subprocess.check_output(
            [*run, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"],
            text=True,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if dirty else "")


def provenance(threads: int) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    import torch

    isa = "not built"
    try:
        import qkernels  # noqa: F401

        isa = str(torch.ops.qkernels.cpu_isa())
    except (ImportError, AttributeError, OSError):
        pass
    return {
        "device": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "isa": isa,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def summary(samples: list[float]) -> dict[str, Any]:
    """median, least and most of samples, and their number."""
    return {
        "median": round(median(samples), 4),
        "min": round(min(samples), 4),
        "max": round(max(samples), 4),
        "n": len(samples),
    }


def last_level_cache(folder: Path = CPUS, cores: Iterable[int] | None = None) -> int:
    """Bytes of the last-level caches of all cores that may be used, as Linux tells them; 32 MiB
    where it does not.

    A machine may have several, one per some cores. They count together: with its share of a matrix
    each thread fills the one it is next to.
    """
    cores = os.sched_getaffinity(0) if cores is None else cores
    found: dict[str, int] = {}  # cores that share a cache: its bytes
    for core in cores:
        caches = []
        for path in folder.glob(f"cpu{core}/cache/index*/size"):
            text = path.read_text().strip()
            shared = path.with_name("shared_cpu_list")
            owners = shared.read_text().strip() if shared.exists() else "all"
            if text[:-1].isdigit() and text[-1] in _UNITS:
                caches.append((int(text[:-1]) * _UNITS[text[-1]], owners))
        if caches:
            size, owners = max(caches)
            found[owners] = size
    return sum(found.values()) or _USUAL_CACHE


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Read bandwidth in GB/s with torch's current threads: the best of `repeats` passes over an
    array of int64.

    int64 max and float32 sum stream at the rate of memory in torch's vectorized reductions;
    whichever is faster on this machine counts, so that the ceiling is not flattered downwards. The
    array is far larger than the caches.
    """
    import torch

    count = megabytes * 2**20
    return best_read(torch.ones(count // 8, dtype=torch.int64), repeats)


def best_read(array: Any, repeats: int) -> float:
    """`read_bandwidth` over an int64 tensor that is there already."""
    import torch

    best = float("inf")
    for reduction in (lambda: array.max(), lambda: array.view(torch.float32).sum()):
        for _ in range(repeats):
            start = time.perf_counter()
            reduction()
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best / 1e9
