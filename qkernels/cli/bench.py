"""`qkernels bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import BadInput, bad_input
from .output import Answer, bar, note, warn


@dataclass(frozen=True)
class BenchOptions:
    """Which cases, with how many threads, and the files to write."""

    quick: bool = False
    every: bool = False
    models: tuple[str, ...] = ()
    kernel: str | None = None
    rows: tuple[int, ...] = ()
    threads: int | None = None
    json: Path | None = None
    csv: Path | None = None
    plots: Path | None = None
    list_only: bool = False


def run(options: BenchOptions) -> None:
    _check_outputs(options)  # first: a mistyped folder should not cost a measurement
    import torch

    from qkernels import bench
    from qkernels.bench import files, plots, suite

    tier = bench.QUICK if options.quick else bench.FULL if options.every else bench.STANDARD
    with bad_input(ValueError):
        cases = bench.select(
            models=options.models, kernel=options.kernel, rows=options.rows, tier=tier
        )
    answer = Answer()
    if options.list_only:
        answer.write("".join(f"{case.name}\n" for case in cases))
        note(f"{len(cases)} cases")
        return
    if options.plots is not None:
        with bad_input(plots.PlotsUnavailable):
            plots.require_matplotlib()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if (reason := suite.busy()) is not None:
        warn(f"{reason}: what is measured now will be slower and more scattered")
    effort = bench.QUICK_EFFORT if options.quick else bench.Effort()
    note(f"{len(cases)} cases, {effort.rounds} rounds each, {torch.get_num_threads()} threads")
    with bar("measuring") as progress:
        result, stopped = bench.run(cases, effort, progress=progress)
    answer.write(f"{files.table(result)}\n")
    answer.end()
    note(files.machine_text(result))
    if options.json is not None:
        files.write_json(result, options.json)
        note(f"wrote {options.json}")
    if options.csv is not None:
        files.write_csv(result, options.csv)
        note(f"wrote {options.csv}")
    if options.plots is not None:
        for path in plots.write_plots(result, options.plots):
            note(f"wrote {path}")
    if stopped is not None:
        warn(f"stopped after {len(result['rows'])} of {len(cases)} cases")
        raise stopped


def _check_outputs(options: BenchOptions) -> None:
    if options.quick and options.every:
        raise BadInput("--quick and --all exclude each other")
    for flag, path in (("--json", options.json), ("--csv", options.csv)):
        if path is not None and path.is_dir():
            raise BadInput(f"{flag}: {path} is a directory")
        if path is not None and not path.resolve().parent.is_dir():
            raise BadInput(f"{flag}: there is no directory {path.resolve().parent}")
    if options.plots is not None and options.plots.exists() and not options.plots.is_dir():
        raise BadInput(f"--plots: {options.plots} is not a directory")
