"""qkernels/bench: rows, files, the command, and two revisions. Nothing here is a measurement."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import MODEL, SMALL, TINY, attention_case, linear_case, norm_case

from qkernels import bench
from qkernels.bench import attention, ceilings, files, inputs, linear, machine, norm, plots, suite
from qkernels.bench.inputs import Rotation
from qkernels.bench.suite import OURS, build, share_of_ceiling
from qkernels.quant.spec import QuantSpec

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


def test_the_figures_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {OURS: [4.0] * 5, "torch_bfloat16": [8.0] * 5, "torch_float32": [2.0] * 5}
    monkeypatch.setattr(suite, "interleave", lambda variants, effort, checks: dict(times))
    row = bench.measure(TINY[0], bench.QUICK_EFFORT, SMALL)
    assert row["gb_per_s"] == 1.8  # 7200 bytes in 4 us
    assert row["gops"] == 17.28  # 69120 operations
    assert row["baselines"]["torch_bfloat16"]["ratio"] == 2.0
    assert row["baselines"]["torch_float32"]["ratio"] == 0.5


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kernel)
def test_calls_go_through_the_copies(case: bench.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and each baseline get another address of the rotated input call after call."""
    turned: list[int] = []
    real = inputs.turns

    def turns(items: Any, call: Any) -> Any:
        turned.append(len(items))
        return real(items, call)

    for module in (linear, attention, norm):
        monkeypatch.setattr(module, "turns", turns)
    problem = build(case, Rotation(cache=1 << 18, limit=1 << 24))
    assert len(turned) == 1 + len(problem.baselines) and min(turned) > 1


def test_read_bandwidth_is_bytes_over_the_best_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 25.0, 30.0, 34.0])  # 4, 2, 5 and 4 seconds
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.best_read(torch.ones(1000, dtype=torch.int64), 2) == 8000 / 2 / 1e9


def test_the_nearer_ceiling_counts() -> None:
    top = {"read_gb_per_s": {"median": 10.0}, "int8_gops": {"median": 100.0}}
    row = {"bytes": 10_000, "ops": 10_000, "peak": "int8", "us": {"median": 4.0}}
    assert share_of_ceiling(row, top)["bound"] == "memory"  # 1 us against 0.1
    assert share_of_ceiling(row, top)["percent_of_ceiling"] == 25.0
    row["ops"] = 200_000
    assert share_of_ceiling(row, top)["bound"] == "compute"
    assert share_of_ceiling(row, top)["percent_of_ceiling"] == 50.0


@pytest.fixture(scope="module")
def tiny_result() -> dict[str, Any]:
    """A run of three small cases, with ceilings that are not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings.Ceilings, "__post_init__", lambda self: None)

        def measure(self: Any) -> None:
            self.read.append(20.0)
            for samples in self.peak.values():
                samples.append(200.0)

        patch.setattr(ceilings.Ceilings, "measure", measure)
        result, stopped = bench.run(TINY, bench.Effort(rounds=5, seconds=1e-6), rotation=SMALL)
        assert stopped is None
        return result


def test_a_run_has_every_fact(tiny_result: dict[str, Any], tmp_path: Path) -> None:
    assert tiny_result["kind"] == "kernels"
    assert {"device", "threads", "isa", "versions", "commit", "date"} <= set(tiny_result)
    assert tiny_result["ceilings"]["read_gb_per_s"]["n"] == 3
    first = tiny_result["rows"][0]
    assert first["name"] == TINY[0].name and first["weight"] == "W4 g32 min"
    assert first["us"]["n"] == 5 and first["us"]["min"] <= first["us"]["median"]
    assert set(first["baselines"]) == {"torch_bfloat16", "torch_float32"}
    assert list(first["left_out"]) == ["torch_int4pack"]  # 72 rows are no multiple of 16
    files.write_json(tiny_result, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == tiny_result


def test_csv_has_a_line_per_row(tiny_result: dict[str, Any], tmp_path: Path) -> None:
    files.write_csv(tiny_result, tmp_path / "r.csv")
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [line["name"] for line in lines] == [case.name for case in TINY]
    for line in lines:
        assert line["device"] == tiny_result["device"] and "torch " in line["versions"]
        assert float(line["us_median"]) > 0 and line["read_gb_per_s"] == "20.0"
    assert lines[0]["context"] == "" and lines[1]["context"] == "100"
    assert lines[0]["torch_sdpa_us"] == "" and float(lines[1]["torch_sdpa_ratio"]) > 0


def test_slower_rows_say_so(tiny_result: dict[str, Any]) -> None:
    row = tiny_result["rows"][1]
    slow = {**row, "baselines": {"torch_sdpa": {"ratio": 0.5, "us": {"n": 5}}}}
    assert files.ratio_text(slow) == "0.50x SDPA (slower)"
    once = {"baselines": {"torch_int_mm": {"ratio": 90.0, "us": {"n": 1}}}}
    assert files.ratio_text(once) == "90.00x _int_mm (1 call)"
    text = files.table({**tiny_result, "rows": [row, slow]})
    assert len(text.splitlines()) == 3 and "(slower)" in text.splitlines()[2]


def test_roofline(tiny_result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    (path,) = plots.write_plots(tiny_result, tmp_path / "plots")
    assert path.read_bytes().startswith(b"\x89PNG")


# the command


class FakeCeilings:
    def to_dict(self) -> dict[str, Any]:
        names = ("read_gb_per_s", "int8_gops", "float32_gops")
        return {name: machine.summary([20.0]) for name in names}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_result: dict[str, Any]) -> Callable[..., Any]:
    """The command, whose measurement is the tiny one."""
    pytest.importorskip("typer", reason="the command line needs the extra [cli]")
    from typer.testing import CliRunner

    from qkernels.cli.app import app

    monkeypatch.setattr(suite, "Ceilings", FakeCeilings)
    monkeypatch.setattr(suite, "rows_of", lambda *args: iter(tiny_result["rows"]))
    return lambda *words: CliRunner().invoke(app, ["bench", *map(str, words)])


def test_command_writes_table_and_files(run: Callable[..., Any], tmp_path: Path) -> None:
    paths = tmp_path / "r.json", tmp_path / "r.csv"
    result = run("--quick", "--json", paths[0], "--csv", paths[1])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("case ") and len(lines) == 4
    assert "ceilings: read 20 GB/s" in result.stderr
    assert all(path.stat().st_size for path in paths)


def test_command_lists_the_cases(run: Callable[..., Any]) -> None:
    result = run("--list", "--model", "Gemma-3-270M", "--kernel", "layer_norm", "--m", 512)
    assert result.stdout.splitlines() == [
        "layer_norm Gemma-3-270M [512, 640] M=512",
        "layer_norm Gemma-3-270M [512, 640] to int8 M=512",
    ]


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (bench.CheckError("x"), 1)])
def test_what_was_measured_before_the_end_is_written(
    run: Callable[..., Any],
    tiny_result: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    code: int,
) -> None:
    def rows(*args: Any) -> Any:
        yield tiny_result["rows"][0]
        raise error

    monkeypatch.setattr(suite, "rows_of", rows)
    result = run("--quick", "--json", tmp_path / "r.json")
    assert result.exit_code == code
    assert "stopped after 1 of " in result.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["name"] == TINY[0].name


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "GPT-5"], "unknown model 'GPT-5'; there are SmolLM2-135M, "),
        (["--kernel", "["], "'[' is not a regular expression"),
        (["--m", "7"], "no case has M [7]"),
        (["--quick", "--all"], "--quick and --all exclude each other"),
        (["--json", "/nowhere/r.json"], "--json: there is no directory /nowhere"),
        (["--csv", "/"], "--csv: / is a directory"),
        (["--plots", __file__], "is not a directory"),
    ],
)
def test_command_refuses(run: Callable[..., Any], words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert message in line


def test_plots_without_matplotlib(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--quick", "--plots", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'qkernels[bench]'" in result.stderr


# two revisions


def script(name: str) -> Any:
    """A module of the folder bench, which is no package."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeWorker:
    """Answers as a worker process does."""

    def __init__(self, times: list[float], log: list[str], side: str) -> None:
        self._times, self._log, self._side = iter(times), log, side

    def ask(self, name: str | None) -> dict[str, Any]:
        if name == "broken":
            return {"error": "CheckError: off"}
        if name is not None:
            return {}
        self._log.append(self._side)
        return {"us": next(self._times)}


def test_revisions_are_compared_round_by_round() -> None:
    log: list[str] = []
    workers = {
        "old": FakeWorker([30.0, 20.0, 60.0], log, "old"),
        "new": FakeWorker([10.0, 10.0, 20.0], log, "new"),
    }
    module = script("compare_revisions")
    row = module.compare(workers, "case", 3)
    assert log == ["old", "new", "new", "old", "old", "new"]
    wanted = {"old_us": 30.0, "new_us": 10.0, "ratio": 3.0, "least": 2.0, "most": 3.0}
    assert row == {"name": "case", **wanted}
    assert module.line_of({**row, "ratio": 0.5}).endswith("(slower)")
    assert module.compare(workers, "broken", 3)["error"] == "old: CheckError: off"


def test_a_process_that_died_fails_its_cases_and_not_the_run() -> None:
    module = script("compare_revisions")
    worker = module.Worker.__new__(module.Worker)
    pipe = subprocess.PIPE
    worker._process = subprocess.Popen([sys.executable, "-c", ""], stdin=pipe, stdout=pipe)
    worker._process.wait()
    worker._process.stdin = io.TextIOWrapper(worker._process.stdin)
    assert worker.ask("case") == {"error": "the process ended"}
    assert worker.ask("case") == {"error": "the process ended"}
    worker.close()


@pytest.mark.parametrize("words, tier", [([], 1), (["--quick"], 0), (["--all"], 2)])
def test_scripts_choose_cases_as_the_command_does(words: list[str], tier: int) -> None:
    module = script("selection")
    parser = module.parser("doc")
    wanted = bench.select(models=[MODEL], kernel="norm", rows=[1, 512], tier=tier)
    words = [*words, "--model", MODEL, "--kernel", "norm", "--m", "1", "--m", "512"]
    assert module.chosen(parser, parser.parse_args(words)) == wanted


def test_an_unknown_revision() -> None:
    with pytest.raises(SystemExit, match="'no-such-revision' is not a revision"):
        script("compare_revisions").checkout("no-such-revision")


def test_variants_are_ours_and_the_baselines_of_torch() -> None:
    """Under pytest-benchmark there is a test for each baseline that a case can have."""
    eight = [linear_case(QuantSpec(8, 32), act) for act in ("int8", "float")]
    for case in [*TINY, *eight, attention_case("float32"), norm_case(False, False)]:
        problem = build(case, SMALL)
        names = [OURS, *problem.baselines, *problem.left_out]
        assert sorted(suite.variants(case)) == sorted(names)
        assert set(names[1:]) <= set(files._SHORT)  # columns of the CSV
    assert suite.variants(eight[0])[3:] == ["torch_int8pack", "torch_int_mm"]
