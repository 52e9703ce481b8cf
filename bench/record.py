"""The files under bench/results: a measurement and, from qkernels/bench/machine.py, its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qkernels.bench.machine import (  # noqa: E402, F401  the scripts take them from here
    commit,
    cpu_name,
    provenance,
    read_bandwidth,
    summary,
)


def write(
    name: str, kind: str, threads: int, body: dict[str, Any], results: Path = RESULTS
) -> Path:
    """Writes results/<name>.json with provenance and returns its path."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    data = {"kind": kind, **provenance(threads), **body}
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
