"""Where a measurement was made: device, versions, commit and date; and the files under
bench/results.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this tree; "+changes" when tracked files differ from it."""
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


def write(
    name: str, kind: str, threads: int, body: dict[str, Any], results: Path = RESULTS
) -> Path:
    """Writes results/<name>.json with provenance and returns its path."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    data = {"kind": kind, **provenance(threads), **body}
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def summary(samples: list[float]) -> dict[str, Any]:
    """median, least and most of samples, and their number."""
    return {
        "median": round(median(samples), 4),
        "min": round(min(samples), 4),
        "max": round(max(samples), 4),
        "n": len(samples),
    }


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Read bandwidth in GB/s with torch's current threads: the best of `repeats` passes over an
    array of int64.

    int64 max and float32 sum stream at the rate of memory in torch's vectorized reductions;
    whichever is faster on this machine counts, so that the ceiling is not flattered downwards. The
    array is far larger than the caches.
    """
    import time

    import torch

    count = megabytes * 2**20
    array = torch.ones(count // 8, dtype=torch.int64)
    best = float("inf")
    for reduction in (lambda: array.max(), lambda: array.view(torch.float32).sum()):
        for _ in range(repeats):
            start = time.perf_counter()
            reduction()
            best = min(best, time.perf_counter() - start)
    return count / best / 1e9
