"""Threads of a team, tested in C++ without torch."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_teams_of_threads(tmp_path: Path) -> None:
    program = tmp_path / "team"
    sources = [ROOT / "tests" / "cpp" / "team.cpp", ROOT / "csrc" / "cpu" / "team.cpp"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", "-O2", "-pthread", "-I", ROOT / "csrc" / "cpu"]
    subprocess.run([*compiler, *flags, *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr
