"""The kernels of qkernels/bench: to a result file, or under pytest-benchmark.

    python bench/bench_kernels.py [--quick | --all] [--model NAME ...] [--kernel REGEX] [--m M ...]
        [--threads 2] [--name kernels-NAME] [--no-write]
    python -m pytest -o python_files='bench_*.py' bench/bench_kernels.py --benchmark-only
        [--bench-quick | --bench-all] [--bench-model NAME] [--bench-kernel REGEX] [--bench-m M]

The first interleaves the variants, measures the ceilings in the same run and writes
bench/results/kernels-<device>.json. The second hands ours and each baseline to pytest-benchmark,
one test each, in groups by case: for its statistics, histograms and comparisons. Both check every
result against the reference first.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import selection
import torch

from qkernels import bench
from qkernels.bench import files
from qkernels.bench.suite import OURS, build, default_rotation

_last: dict[str, Any] = {}  # the inputs of one case serve its variants, which follow one another


def problem_of(case: bench.Case) -> Any:
    if case.name not in _last:
        _last.clear()  # first: two cases may not fit into memory
        with torch.inference_mode():
            problem = build(case, default_rotation())
            problem.check()
        _last[case.name] = problem
    return _last[case.name]


def test_kernel(benchmark: Any, case: bench.Case, variant: str) -> None:
    """Parametrized by bench/conftest.py."""
    import pytest

    problem = problem_of(case)
    call = problem.ours
    if variant != OURS:
        baseline = problem.baselines.get(variant)
        if baseline is None:
            pytest.skip(problem.left_out.get(variant, f"{variant} is no baseline of this case"))
        call = baseline.call
        with torch.inference_mode():
            baseline.check(f"{case.name}: {variant}", call(0))
    benchmark.group = case.name
    benchmark.extra_info.update(case.fields(), bytes=problem.nbytes, ops=problem.ops)
    turn = iter(range(sys.maxsize))
    with torch.inference_mode():
        benchmark(lambda: call(next(turn)))


def file_name(device: str) -> str:
    return "kernels-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main() -> None:
    parser = selection.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=bench.Effort().rounds)
    parser.add_argument("--name", help="of the result file; default: by device")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    cases = selection.chosen(parser, options)
    try:
        effort = bench.Effort(rounds=options.rounds)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)

    def progress(done: int, total: int, what: str) -> None:
        print(f"\r\x1b[K{done}/{total} {what}", end="", file=sys.stderr, flush=True)

    result, stopped = bench.run(cases, effort, progress=progress)
    print(f"\n{files.table(result)}\n{files.machine_text(result)}")
    if not options.no_write:
        body = {name: result[name] for name in ("cache_bytes", "rounds", "ceilings", "rows")}
        name = options.name or file_name(result["device"])
        print(record.write(name, "kernels", options.threads, body))
    if stopped is not None:
        print(f"stopped after {len(result['rows'])} of {len(cases)} cases", file=sys.stderr)
        raise stopped


if __name__ == "__main__":
    main()
