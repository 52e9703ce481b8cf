"""Benchmarks of the kernels: what `qkernels bench` runs (docs/benchmarking.md)."""

from .cases import FULL, QUICK, STANDARD, Case, every_case, select
from .check import CheckError
from .inputs import Rotation
from .suite import measure, run
from .timing import QUICK_EFFORT, Effort

__all__ = [
    "FULL",
    "QUICK",
    "QUICK_EFFORT",
    "STANDARD",
    "Case",
    "CheckError",
    "Effort",
    "Rotation",
    "every_case",
    "measure",
    "run",
    "select",
]
