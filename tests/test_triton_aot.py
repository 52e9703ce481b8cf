"""Triton kernels compiled ahead of time, without a GPU: a few for each target. All of them by
`make triton-aot`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_aot import PARTS, TARGETS

from qkernels import triton

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    """Products of matrices by matrix instructions, next to nothing in local memory (but for RDNA,
    whose waves have 256 registers: attention spills there), and no more shared memory than the
    smallest GPU of its kind has."""
    if reason := triton.problem():
        pytest.skip(reason)
    report = tmp_path / "report.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/triton_aot.py", "--target", target, "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    limit = {"sm_80": 99, "sm_90": 227, "sm_100": 99}.get(target, 64) << 10  # 8.6, 9.0, 12.0
    assert len(rows) >= 2 * len(PARTS)
    assert sum(row["needs_matrix"] for row in rows) >= 5
    for row in rows:
        assert bool(row["matrix"]) >= row["needs_matrix"], row
        assert 0 < row["registers"] <= 512 and row["shared"] <= limit, row
        assert row["spills"] <= (1024 if target == "gfx1100" else 64), row
