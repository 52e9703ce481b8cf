"""Runs cases: inputs, check, timing, and the rows of results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from . import attention, linear, norm
from .cases import AttentionCase, Case, LinearCase, NormCase
from .ceilings import Ceilings
from .check import CheckError
from .inputs import Problem, Rotation
from .machine import last_level_cache, provenance, summary
from .timing import Effort, interleave

OURS = "qkernels"
Row = dict[str, Any]
Progress = Callable[[int, int, str], None]


def build(case: Case, rotation: Rotation) -> Problem:
    """The inputs and calls of a case."""
    problem: Problem = _module(case).build(case, rotation)
    return problem


def variants(case: Case) -> list[str]:
    """Ours and torch's counterparts, also those that turn out not to fit."""
    return [OURS, *_module(case).baseline_names(case)]


def _module(case: Case) -> Any:
    modules = {LinearCase: linear, AttentionCase: attention, NormCase: norm}
    return modules[type(case)]


def default_rotation() -> Rotation:
    """Past twice this machine's last-level cache, within the limit of memory."""
    return Rotation(last_level_cache())


def measure(case: Case, effort: Effort, rotation: Rotation) -> Row:
    """One row without its share of the ceilings, which are known when all is done.

    Raises CheckError where the kernel or a baseline is wrong; there are no samples then.
    """
    problem = build(case, rotation)
    problem.check()
    theirs = problem.baselines
    samples = interleave(
        {OURS: problem.ours, **{name: baseline.call for name, baseline in theirs.items()}},
        effort,
        checks={name: partial(b.check, f"{case.name}: {name}") for name, b in theirs.items()},
    )
    ours = summary(samples.pop(OURS))
    seconds = ours["median"] / 1e6
    baselines = {}
    for name, values in samples.items():
        taken = summary(values)
        baselines[name] = {"us": taken, "ratio": round(taken["median"] / ours["median"], 3)}
    return {
        **case.fields(),
        "us": ours,
        "bytes": round(problem.nbytes),
        "ops": round(problem.ops),
        "gb_per_s": round(problem.nbytes / seconds / 1e9, 3),
        "gops": round(problem.ops / seconds / 1e9, 2),
        "peak": problem.peak,
        "rotated_bytes": problem.rotated,
        "baselines": baselines,
        "left_out": problem.left_out,
    }


def share_of_ceiling(row: Row, ceilings: dict[str, Any]) -> Row:
    """The row with `bound`, the ceiling that is nearer ("memory" or "compute"), and
    `percent_of_ceiling`, of the speed that this ceiling allows."""
    by_memory = row["bytes"] / (ceilings["read_gb_per_s"]["median"] * 1e9)
    by_compute = row["ops"] / (ceilings[f"{row['peak']}_gops"]["median"] * 1e9)
    least = max(by_memory, by_compute)
    return {
        **row,
        "bound": "memory" if by_memory >= by_compute else "compute",
        "percent_of_ceiling": round(100 * least * 1e6 / row["us"]["median"], 1),
    }


def rows_of(
    cases: Sequence[Case],
    effort: Effort,
    rotation: Rotation,
    ceilings: Ceilings,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Measures one case after the other, the ceilings before each."""
    with torch.inference_mode():
        for done, case in enumerate(cases):
            if progress is not None:
                progress(done, len(cases), case.name)
            ceilings.measure()
            yield measure(case, effort, rotation)
    if progress is not None:
        progress(len(cases), len(cases), "")


def result(
    rows: Sequence[Row], ceilings: Ceilings, effort: Effort, *, kind: str = "kernels"
) -> dict[str, Any]:
    """What is written to a file: where it was measured, the ceilings, all rows."""
    top = ceilings.to_dict()
    return {
        "kind": kind,
        **provenance(torch.get_num_threads()),
        "cache_bytes": last_level_cache(),
        "rounds": effort.rounds,
        "ceilings": top,
        "rows": [share_of_ceiling(row, top) for row in rows],
    }


def run(
    cases: Sequence[Case],
    effort: Effort | None = None,
    *,
    rotation: Rotation | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], BaseException | None]:
    """Measures the cases with torch's current threads.

    Returns a result as `result` describes it, and what stopped it early: a CheckError where a
    kernel or a baseline differs from the reference, KeyboardInterrupt, or None. What was measured
    until then is in the result; where that is nothing the exception is raised.
    """
    effort = effort or Effort()
    ceilings, rows, stopped = Ceilings(), [], None
    try:
        for row in rows_of(cases, effort, rotation or default_rotation(), ceilings, progress):
            rows.append(row)
    except (KeyboardInterrupt, CheckError) as error:
        if not rows:
            raise
        stopped = error
    return result(rows, ceilings, effort), stopped


def busy() -> str | None:
    """A warning where others use the machine, else None."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    idle = load < 0.5 * cores
    return None if idle else f"the load of this machine is {load:.1f} on {cores} cores"
