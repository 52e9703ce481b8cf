"""The files under bench/results: a measurement and, from qkernels/bench/machine.py, its place."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of pairs, each taken in one round."""
    return round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


class RoundsParser(argparse.ArgumentParser):
    """Of a script that measures one model in rounds: MODEL, --rounds, --no-write."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawTextHelpFormatter)
        self.add_argument("model", help="GGUF file or PACKAGE:FILE")
        self.add_argument("--rounds", type=int, default=7)
        self.add_argument("--no-write", action="store_true")

    def options(self) -> argparse.Namespace:
        """The arguments; fewer rounds than make a median are an error."""
        options = self.parse_args()
        if options.rounds < 5:
            self.error(f"a median needs at least 5 rounds, got {options.rounds}")
        return options
