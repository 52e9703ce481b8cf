"""qkernels/bench: what is chosen, how inputs rotate, wrong kernels, rows and files. Nothing here is
a measurement."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import bench
from qkernels.bench import (
    attention,
    ceilings,
    check,
    files,
    inputs,
    linear,
    machine,
    norm,
    plots,
    suite,
)
from qkernels.bench.cases import (
    CONTEXTS,
    GROUPS,
    ROWS,
    SPECS,
    AttentionCase,
    LinearCase,
    NormCase,
    named,
)
from qkernels.bench.inputs import Rotation, TooLarge, random_weight
from qkernels.bench.shapes import MODELS
from qkernels.bench.suite import OURS, build, share_of_ceiling
from qkernels.bench.timing import Timer, interleave
from qkernels.cache import KV_DTYPES
from qkernels.quant.spec import BITS, QuantSpec

ROOT = Path(__file__).resolve().parent.parent
SMALL = Rotation(cache=1 << 16, limit=1 << 24)
MODEL = "SmolLM2-135M"


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    with_threads(1)


def linear_case(spec: QuantSpec, act: str = "int8", m: int = 3) -> LinearCase:
    return LinearCase(MODEL, m, bench.QUICK, "tiny", 72, 160, spec, act)


def attention_case(kv_dtype: str, m: int = 1, context: int = 100) -> AttentionCase:
    return AttentionCase(MODEL, m, bench.QUICK, context, kv_dtype)


def norm_case(center: bool, quantized: bool) -> NormCase:
    return NormCase(MODEL, 3, bench.QUICK, 100, center, quantized)


TINY = [
    linear_case(QuantSpec(4, 32, zero="minimum")),
    attention_case("int8"),
    norm_case(True, True),
]


# selection


def test_the_space_holds_what_it_should() -> None:
    cases = list(bench.every_case())
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    linears = {
        (c.model, c.spec.bits, c.spec.group_size, c.m) for c in cases if c.kernel == "linear"
    }
    for model in MODELS:
        for bits in BITS:
            for group in GROUPS:
                assert all((model, bits, group, m) in linears for m in ROWS)
    found = {(c.kernel, c.context, c.kv_dtype) for c in cases if isinstance(c, AttentionCase)}
    kernels = ("attention_decode", "attention_prefill")
    assert found == {(k, c, kv) for k in kernels for c in CONTEXTS for kv in KV_DTYPES}
    norms = {(c.kernel, c.quantized) for c in cases if isinstance(c, NormCase)}
    assert norms == {(k, q) for k in ("rms_norm", "layer_norm") for q in (False, True)}


def test_tiers_contain_one_another() -> None:
    quick = {c.name for c in bench.select(tier=bench.QUICK)}
    standard = {c.name for c in bench.select()}
    everything = {c.name for c in bench.select(tier=bench.FULL)}
    assert quick < standard < everything
    assert 10 < len(quick) < 40  # about two seconds each
    assert {c.model for c in bench.select(tier=bench.QUICK)} == {MODEL}


def test_selection_by_model_kernel_and_rows() -> None:
    cases = bench.select(models=["llama-3.2-1b"], kernel=r"^linear .*Q4_K", rows=[1, 512])
    assert {c.model for c in cases} == {"Llama-3.2-1B"}
    assert {c.m for c in cases} == {1, 512}
    assert all(c.kernel == "linear" and "Q4_K" in c.name for c in cases)
    assert named(cases[0].name) == cases[0]


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"models": ["SmolLM2-135"]}, "unknown model 'SmolLM2-135'.* did you mean SmolLM2-135M"),
        ({"kernel": "("}, r"'\(' is not a regular expression"),
        ({"rows": [3]}, r"no case .*M \[3\].*M may be \[1, 2, 4"),
        ({"kernel": "down.* W3 g64 zero act float M=2$"}, r"no case .* 4 of the FULL tier do"),
    ],
)
def test_selections_that_cannot_be(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.select(**wanted)


# inputs


def test_copies_pass_twice_the_cache_within_the_limit() -> None:
    rotation = Rotation(cache=1000, limit=5000)
    assert rotation.copies(1) == 2000
    assert rotation.copies(300) == 7  # 2100 bytes
    assert rotation.copies(3000) == 1
    assert Rotation(cache=4000, limit=5000).copies(900) == 5
    with pytest.raises(TooLarge, match="takes 0 MB"):
        rotation.copies(5001)


def test_last_level_cache(tmp_path: Path) -> None:
    assert machine.last_level_cache(tmp_path) == 32 << 20
    for index, size in enumerate(("32K", "512K", "8M", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.last_level_cache(tmp_path) == 8 << 20


def test_every_copy_of_a_weight_is_used_and_lies_elsewhere() -> None:
    problem = build(linear_case(QuantSpec(4, 32)), SMALL)
    assert problem.rotated >= 2 * SMALL.cache
    spec = QuantSpec(4, 32)
    copies = inputs.weight_copies(random_weight(spec, 72, 160), SMALL)
    assert len({copy.codes.data_ptr() for copy in copies}) == len(copies) > 1
    assert len({copy.scale.data_ptr() for copy in copies}) == len(copies)
    seen: list[int] = []
    call = inputs.turns([(i,) for i in range(3)], seen.append)
    for i in range(7):
        call(i)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_baseline_that_does_not_fit_is_left_out_and_says_why() -> None:
    case = linear_case(QuantSpec(4, 32))
    problem = build(case, Rotation(cache=1, limit=20_000))  # ours takes 11 kB, bfloat16 23 kB
    assert set(problem.left_out) == {"torch_bfloat16", "torch_float32", "torch_int4pack"}
    assert "one copy takes" in problem.left_out["torch_bfloat16"]
    assert "N a multiple of 16" in problem.left_out["torch_int4pack"]


def test_bytes_and_operations() -> None:
    problem = build(linear_case(QuantSpec(4, 32, zero="minimum"), m=2), SMALL)
    assert problem.nbytes == 72 * 160 * 5 / 8  # 4 bits, and two float16 per 32
    assert problem.ops == 2 * 2 * 72 * 160
    problem = build(attention_case("int8", m=4, context=10), SMALL)
    assert problem.nbytes == 10 * 2 * 3 * (64 + 4)
    assert problem.ops == 4 * (7 + 8 + 9 + 10) * 9 * 64


# the check


@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_right_linears_pass(spec: QuantSpec, act: str) -> None:
    build(linear_case(spec, act), SMALL).check()


@pytest.mark.parametrize("kv_dtype", list(KV_DTYPES))
@pytest.mark.parametrize("m", [1, 7, 100])
def test_right_attention_passes(kv_dtype: str, m: int) -> None:
    build(attention_case(kv_dtype, m), SMALL).check()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_right_norms_pass(center: bool, quantized: bool) -> None:
    build(norm_case(center, quantized), SMALL).check()


def slightly_off(value: Any) -> Any:
    """One number of the result moved by a thousandth of the largest."""
    tensor = value if isinstance(value, Tensor) else value[1]
    tensor = tensor.clone()
    tensor.view(-1)[0] += 2e-3 * tensor.abs().max()
    return tensor if isinstance(value, Tensor) else (value[0], tensor, *value[2:])


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kernel)
def test_a_wrong_kernel_is_an_error_and_not_timed(
    case: bench.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (linear, attention, norm):
        real = module.select

        def wrong(op: str, device: Any, real: Any = real, **facts: Any) -> Any:
            right = real(op, device, **facts)
            return lambda *args: slightly_off(right(*args))

        monkeypatch.setattr(module, "select", wrong)
    timed: list[Any] = []
    monkeypatch.setattr("qkernels.bench.suite.interleave", lambda *args: timed.append(args))
    with pytest.raises(bench.CheckError, match=r"differ from the reference; worst at \[0"):
        bench.measure(case, bench.QUICK_EFFORT, SMALL)
    assert timed == []


def test_nan_is_wrong() -> None:
    zero = torch.zeros(2)
    with pytest.raises(bench.CheckError, match="1 of 2 values"):
        check.require_close("x", torch.tensor([0.0, torch.nan]), zero, zero + 1)


# timing


def test_rounds_go_back_and_forth_and_copies_go_on() -> None:
    clock = iter(range(1000))
    calls: list[tuple[str, int]] = []
    variants = {name: (lambda i, n=name: calls.append((n, i))) for name in "ab"}
    effort = bench.Effort(rounds=5, seconds=1e-9)  # one call per sample
    samples = interleave(variants, effort, lambda: float(next(clock)))
    assert samples == {"a": [1e6] * 5, "b": [1e6] * 5}
    warm = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert calls[:4] == warm
    assert [name for name, _ in calls[4:]] == list("abbaabbaab")
    assert [i for name, i in calls if name == "a"] == list(range(7))


def test_a_sample_takes_as_many_calls_as_its_time_needs() -> None:
    now = [0.0]

    def call(i: int) -> None:
        now[0] += 0.5

    timer = Timer(call, 2.0, lambda: now[0])
    assert timer.calls == 4
    assert timer.sample() == 0.5e6


def test_a_baseline_that_takes_too_long_is_called_once() -> None:
    now, called = [0.0], {"ours": 0, "near": 0, "far": 0}
    takes = {"ours": 0.25, "near": 0.75, "far": 1.5}  # near: slow, but not four times

    def variant(name: str) -> Callable[[int], None]:
        def call(i: int) -> None:
            called[name] += 1
            now[0] += takes[name]

        return call

    effort = bench.Effort(rounds=5, seconds=0.1)
    samples = interleave({name: variant(name) for name in takes}, effort, lambda: now[0])
    assert samples == {"ours": [0.25e6] * 5, "near": [0.75e6] * 5, "far": [1.5e6]}
    assert called == {"ours": 7, "near": 7, "far": 1}


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5 rounds, got 4"):
        bench.Effort(rounds=4)


# ceilings and rows


@pytest.mark.parametrize("kind", ceilings.PEAKS)
def test_peak_counts_operations(isa: Any, kind: str) -> None:
    ones = isa.ops.cpu_peak(kind, 1)
    assert ones > 0 and ones % 2 == 0
    assert isa.ops.cpu_peak(kind, 100) == 100 * ones


def test_peak_of_a_team_is_that_of_all_its_threads(with_threads: Callable[[int], None]) -> None:
    one = torch.ops.qkernels.cpu_peak("int8", 10)
    with_threads(2)
    assert torch.ops.qkernels.cpu_peak("int8", 10) == 2 * one


def test_a_sample_of_a_peak_is_long_and_the_best_try(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = [0.0], iter([4.0, 2.0, 8.0, 4.0, 5.0, 5.0])
    asked: list[tuple[str, int]] = []

    def peak(kind: str, steps: int) -> int:
        asked.append((kind, steps))
        now[0] += next(seconds)
        return 10**9

    monkeypatch.setattr(torch.ops.qkernels, "cpu_peak", peak)
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ceilings, "best_read", lambda array, repeats: 20.0)
    monkeypatch.setattr(ceilings, "_READ_BYTES", (8, 8))
    top = ceilings.Ceilings()
    top.measure()
    assert top.peak == {"int8": [0.5], "float32": [0.25]} and top.read == [20.0]
    assert {kind for kind, _ in asked} == set(ceilings.PEAKS)
    assert all(steps >= 100_000 for _, steps in asked)  # 12 multiply-adds each


def test_peak_refuses_what_it_does_not_know() -> None:
    with pytest.raises(RuntimeError, match='cpu_peak: kind must be "int8" or "float32", got "x"'):
        torch.ops.qkernels.cpu_peak("x", 1)
    with pytest.raises(RuntimeError, match="cpu_peak: steps must be positive, got 0"):
        torch.ops.qkernels.cpu_peak("int8", 0)


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
        return bench.run(TINY, bench.Effort(rounds=5, seconds=1e-6), rotation=SMALL)


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
        (["--m", "7"], "no case of this selection fits"),
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
