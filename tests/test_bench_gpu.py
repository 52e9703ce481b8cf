"""bench/bench_gpu.py and qkernels/bench/gpu.py without a GPU: cases, checks, gates, files, and the
whole script on tiny cases on the CPU. Nothing here is a measurement."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import load_emulated, triton_gpu

import qkernels as qk
from qkernels import devices
from qkernels.bench import gpu
from qkernels.bench.cases import Q4_K, AttentionCase, LinearCase, NormCase
from qkernels.bench.check import CheckError
from qkernels.bench.inputs import Baseline, Rotation
from qkernels.quant.spec import QuantSpec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import bench_gpu  # noqa: E402  its folder is no package
import gpu_peers  # noqa: E402
import random_decoder  # noqa: E402
import small_gpu_cases  # noqa: E402

PLACE = gpu.Place(
    torch.device("cpu"), gpu.LoopChain, torch.sum, Rotation(cache=1 << 15, limit=1 << 24), 2
)
W4 = QuantSpec(4, 32)
TINY: list[Any] = [
    bench_gpu.linear(72, 160, 1, W4),
    bench_gpu.linear(72, 160, 3, QuantSpec(8, 32), "int8"),
    bench_gpu.linear(64, 256, 2, Q4_K),
    bench_gpu.linear(64, 160, 2, QuantSpec(4, 32, zero="integer")),
    bench_gpu.linear(64, 160, 2, QuantSpec(4, 32, zero="minimum")),
    AttentionCase("SmolLM2-135M", 1, 0, 100, "bfloat16"),
    AttentionCase("SmolLM2-135M", 1, 0, 100, "int8"),
    AttentionCase("SmolLM2-135M", 64, 0, 64, "int4"),
    NormCase("SmolLM2-135M", 5, 0, 96, False, False),
    gpu.GateCase("SmolLM2-135M", 5, 0, 96),
]


@pytest.fixture(autouse=True)
def reference() -> Any:
    with qk.backend("reference"):
        yield


def results(folder: Path) -> bench_gpu.Results:
    return bench_gpu.Results(folder, bench_gpu.provenance("abc"))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_cases_are_checked(case: Any) -> None:
    problem = gpu.build(case, PLACE)
    problem.check()
    for name, baseline in problem.baselines.items():
        baseline.check(name, baseline.call(0))
    assert problem.rotated >= 2 * PLACE.rotation.cache or problem.nbytes > PLACE.rotation.cache


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_wrong_results_are_found(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.select

    def wrong(op: str, device: Any, **facts: Any) -> Any:
        return lambda *args: real(op, device, **facts)(*args) * 1.1

    monkeypatch.setattr(gpu, "select", wrong)
    with pytest.raises(CheckError, match="differ from the reference"):
        gpu.build(case, PLACE).check()


def test_a_row_has_all_figures() -> None:
    row = bench_gpu.measure(TINY[0], PLACE, gpu.Reads(PLACE), 5, {})
    assert row["us"]["n"] == row["read_us"]["n"] == 5 and row["us"]["median"] > 0
    assert row["percent_of_read"] == round(100 * row["read_us"]["median"] / row["us"]["median"], 1)
    assert set(row["baselines"]) == {gpu.BFLOAT16} and row["left_out"] == {}
    assert row["bytes"] == 72 * 160 * (4 + 16 / 32) / 8


@pytest.mark.parametrize("case", [TINY[0], TINY[5], TINY[8]], ids=lambda case: case.kernel)
def test_triton_is_measured_beside_ours(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_gpu()
    monkeypatch.setattr(gpu, "has_triton", lambda x: True)
    problem = gpu.build(case, PLACE, {})
    baseline = problem.baselines[gpu.OURS_IN_TRITON]
    first = baseline.call(0)
    baseline.check("Triton", first)
    with pytest.raises(CheckError):
        baseline.check("Triton", first + 1)


def test_peers_that_fail_are_named() -> None:
    def none(*_: Any) -> Baseline:
        raise ImportError("no triton")

    def false(case: Any, weight: Any, x: torch.Tensor, copies: int) -> Baseline:
        return Baseline(lambda i: x, lambda what, y: (_ for _ in ()).throw(CheckError("is off")))

    row = bench_gpu.measure(TINY[0], PLACE, gpu.Reads(PLACE), 5, {"none": none, "false": false})
    assert row["left_out"] == {"none": "ImportError: no triton", "false": "CheckError: is off"}
    assert "none" not in row["baselines"]


def test_peers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gemlite.py").write_text("raise RuntimeError('no GPU to ask')")
    (tmp_path / "humming.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found, absent = gpu_peers.find()
    assert "humming" in found and absent["gemlite"] == "RuntimeError: no GPU to ask"
    with pytest.raises(gpu_peers.Misfit, match=r"takes W4 .*not W8 g32 .*int8"):
        gpu_peers._needs(TINY[1], "W4 g128 float", False)
    check = gpu_peers._checker(torch.ones(2, 4), lambda: torch.ones(3, 4))
    check("right", torch.full((2, 8), 4.0))
    with pytest.raises(CheckError):
        check("wrong", torch.full((2, 8), 4.1))


def test_samples_are_taken_in_turns() -> None:
    seen: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def sample(self) -> float:
            seen.append(self.name)
            return float(len(seen))

    found = bench_gpu.sample({"a": Recorded("a"), "b": Recorded("b")}, 3)
    assert seen == ["a", "b", "b", "a", "a", "b"] and found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_chains_go_through_all_copies() -> None:
    assert [gpu.launches(PLACE, copies) for copies in (1, 2, 3, 5)] == [2, 2, 3, 5]
    calls: list[int] = []
    chain = gpu.LoopChain(calls.append, 3)
    assert chain.sample() > 0 and calls == [0, 0, 1, 2]
    sizes: list[int] = []
    reads = gpu.Reads(replace(PLACE, read=lambda part: sizes.append(part.numel())))
    assert reads.of(1000.5) is reads.of(1007)  # whole pieces of 16 bytes
    reads.of(1000).sample()
    assert set(sizes) == {992}
    assert gpu.ROTATION.copies(30 << 20) * (30 << 20) >= 200e6


def test_the_script_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path)
    broken = LinearCase("any", 1, 0, "linear", 72, 160, QuantSpec(8, -1), "float")
    real = gpu.build

    def build(case: Any, *args: Any) -> Any:
        if case is broken:
            raise RuntimeError("no kernel of it")
        return real(case, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "build", build)
        bench_gpu.run(
            [*TINY, broken], PLACE, found, seconds=1e9, rounds=5, peers={}, decoder=tiny_decoder
        )
    names = [row["name"] for row in found.rows]
    assert len(names) == len(TINY) + 1 and names[3].startswith("decoder")
    assert found.failed == {broken.name: "RuntimeError: no kernel of it"} and not found.not_run
    said = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in said["rows"]] == names and said["failed"] == found.failed
    assert {"device", "host", "versions", "commit", "date", "gates"} <= set(said)
    assert said["commit"] == "abc" and said["device"] == "none"
    with (tmp_path / "gpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == names
    assert lines[0]["us_median"] == str(found.rows[0]["us"]["median"])
    assert "torch " in lines[0]["versions"] and lines[0][f"{gpu.BFLOAT16}_ratio"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.csv", "gpu.json"]
    text = bench_gpu.table(found)
    assert "FAILED linear any" in text and text.index("case") < text.index("gate")
    assert text.rstrip().splitlines()[-1].startswith("decode of Llama-3.1-8B's shapes")
    assert "us, " in capsys.readouterr().out


def tiny_decoder(place: gpu.Place) -> dict[str, Any]:
    small = {
        **random_decoder.LLAMA_8B,
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_gpu, "W4", W4)
        patch.setattr(random_decoder, "LLAMA_8B", small)
        return bench_gpu.decoder_row(place, new_tokens=4, layers=2)


def test_no_case_begins_when_time_is_over(tmp_path: Path) -> None:
    found, now = results(tmp_path), iter(range(100))
    bench_gpu.run(
        TINY[:4], PLACE, found, seconds=1.5, rounds=5, peers={}, decoder=None,
        clock=lambda: float(next(now)),
    )  # fmt: skip
    assert len(found.rows) == 1 and found.not_run == [case.name for case in TINY[1:4]]
    assert json.loads((tmp_path / "gpu.json").read_text())["not_run"] == found.not_run
    assert "no time was left for 3 cases" in bench_gpu.table(found)


def row_of(case: Any, us: float, percent: float, **ratios: float) -> dict[str, Any]:
    baselines = {name: {"us": {"median": 1.0}, "ratio": ratio} for name, ratio in ratios.items()}
    nbytes = case.nbytes if isinstance(case, LinearCase) else 1e6
    return {**case.fields(), "us": {"median": us}, "percent_of_read": percent, "bytes": nbytes,
            "baselines": baselines}  # fmt: skip


def test_gates_ask_about_their_rows() -> None:
    """Every gate finds rows among the cases, and says the worst of them."""
    cases = bench_gpu.cases()
    assert len(cases) == len(set(cases))
    rows = [row_of(case, 10.0, 91.0, **{gpu.BFLOAT16: 3.0}) for case in cases]
    rows.append({"name": "decoder", "kernel": "decoder", "m": 1, "bytes": 4e9, "baselines": {},
                 "us": {"median": 1.0}, "percent_of_read": 60.0})  # fmt: skip
    said = {gate["gate"]: gate for gate in bench_gpu.gates(rows)}
    met = {name: gate["met"] for name, gate in said.items()}
    assert None not in met.values()
    wrong = [name for name, reached in met.items() if not reached]
    assert wrong == [
        "W4 M 16, 100 MB and more",
        "decode attention, 16K and more, int8",
        "decode attention, 16K and more, int4",
        "decode of Llama-3.1-8B's shapes, W4, batch 1",
    ]
    counts = {name: len(gate["figures"]) for name, gate in said.items()}
    assert counts["W4/W8, 8 MB"] == 3 and counts["W4 M 1, Marlin's published times"] == 4
    assert counts["W4 M 16, 34 MB"] == 1 and counts["W4 M 16, 100 MB and more"] == 2
    assert counts["W4A16 M 2048 and more"] == counts["W8A8 M 2048 and more"] == 3
    assert said["W4 M 1, Marlin's published times"]["worst"] == 2.03
    empty = bench_gpu.gates([])
    assert {gate["met"] for gate in empty} == {None}


def test_a_gate_of_our_own_bfloat16() -> None:
    a, b = (AttentionCase("Llama-3.1-8B", 1, 0, 16384, kv) for kv in ("bfloat16", "int8"))
    said = {g["gate"]: g for g in bench_gpu.gates([row_of(a, 20.0, 85.0), row_of(b, 10.0, 70.0)])}
    assert said["decode attention, 16K and more, int8"]["worst"] == 2.0
    alone = {g["gate"]: g for g in bench_gpu.gates([row_of(b, 10.0, 70.0)])}
    assert alone["decode attention, 16K and more, int8"]["met"] is None


def test_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_gpu.main(["--list", "--only", "attention.*int4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if not line.startswith("gate: ")]) == 2
    for bad in (["--rounds", "4"], ["--only", "("], ["--seconds", "soon"]):
        with pytest.raises(SystemExit) as stopped:
            bench_gpu.main(bad)
        assert stopped.value.code == 2
    monkeypatch.setattr(devices, "cuda_problem", lambda: "torch sees no GPU")
    assert bench_gpu.main([]) == 2
    assert "bench_gpu: torch sees no GPU" in capsys.readouterr().err


def test_small_cases_run_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["small_gpu_cases.py", "--device", "cpu"])
    monkeypatch.setattr(small_gpu_cases, "SPECS", small_gpu_cases.SPECS[:1])
    assert small_gpu_cases.main() == 0
    said = capsys.readouterr().out
    assert said.count(" ok\n") == len(said.splitlines()) > 20 and "attention int4" in said


# ---- run_gpu.sh ----


def shell(folder: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a copy of the tree that has the script alone, and a python that only says what it is
    asked."""
    (folder / "bench").mkdir(exist_ok=True)
    (folder / "bench" / "run_gpu.sh").write_text((ROOT / "bench" / "run_gpu.sh").read_text())
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    for name, text in {
        "python": 'echo "$@"; case "$*" in '
        '*bench_gpu*) echo "gate  least"; touch "$OUT/gpu.json";; '
        "*pytest\\ -m*) sleep ${NAP:-0};; esac",
        "nvidia-smi": "echo H200",
        "compute-sanitizer": 'echo "sanitizer $*"; exit ${SANITIZED:-0}',
    }.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    command = ["bash", str(folder / "bench" / "run_gpu.sh"), *parts]
    path = f"{bin}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHON": "python", "OUT": str(folder / "out"), **environment}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "qkernels").mkdir()
    for name in ("_C_cpu.so", "_C_cuda.so"):
        (tmp_path / "qkernels" / name).touch()
    return tmp_path


def test_run_gpu_runs_all_parts_and_ends_with_the_gates(tree: Path) -> None:
    done = shell(tree, COMMIT="abc")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("import", "tests", "triton", "memcheck", "racecheck", "synccheck", "bench"):
        assert f"== {part}: ok" in done.stdout
    assert done.stdout.splitlines()[-1] == "gate  least"
    assert "--commit abc" in (tree / "out" / "bench.log").read_text()
    assert "-m gpu" in (tree / "out" / "tests.log").read_text()
    kept = sorted(path.name for path in (tree / "out").iterdir())
    assert kept == [
        "bench.log",
        "gpu.json",
        "import.log",
        "sanitizer.log",
        "tests.log",
        "triton.log",
    ]


def test_run_gpu_goes_on_after_a_part_that_fails(tree: Path) -> None:
    done = shell(tree, NAP="5", TEST_SECONDS="1", SANITIZED="9")
    assert done.returncode == 1
    assert "== tests: out of time" in done.stdout and "== memcheck: exit 9" in done.stdout
    assert "== bench: ok" in done.stdout


def test_run_gpu_keeps_to_the_limit_of_all_parts(tree: Path) -> None:
    done = shell(tree, NAP="5", ALL_SECONDS="2", BENCH_SECONDS="0")
    assert done.returncode == 1
    assert "== tests: out of time" in done.stdout and "== triton: no time left" in done.stdout


def test_run_gpu_of_some_parts(tree: Path) -> None:
    done = shell(tree, "bench")
    assert done.returncode == 0 and "== tests" not in done.stdout


def test_run_gpu_without_the_library(tree: Path) -> None:
    (tree / "qkernels" / "_C_cuda.so").unlink()
    done = shell(tree)
    assert done.returncode == 2 and "qkernels/_C_cuda.so is missing; build it" in done.stderr


def test_the_parts_fit_into_nine_minutes() -> None:
    """Usually each has its own time; whatever happens, all of them end with the limit of all."""
    text = (ROOT / "bench" / "run_gpu.sh").read_text()
    limit = {
        name: int(text.split(f"{name}=${{{name}:-")[1].split("}")[0])
        for name in ("ALL", "TEST", "TRITON", "SANITIZER", "BENCH")
        for name in [f"{name}_SECONDS"]
    }
    usual_import = 10
    total = limit["TEST_SECONDS"] + limit["TRITON_SECONDS"] + 3 * limit["SANITIZER_SECONDS"]
    total += limit["BENCH_SECONDS"] + usual_import
    assert total - 25 <= limit["ALL_SECONDS"] <= 530


# ---- the read kernel ----


@pytest.mark.parametrize("size", [0, 16, 16 * 511, 16 * 4096, 16 * 4097 * 5])
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_peak_read_reads_every_byte_once(size: int, multiprocessors: int) -> None:
    emulated = load_emulated()
    generator = torch.Generator().manual_seed(size)
    memory = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    with emulated.playing(multiprocessors=multiprocessors):
        seen = emulated.ops.peak_read(memory)
    assert seen.shape == (4 * multiprocessors,) and seen.dtype == torch.int32
    want = 0
    for word in memory.view(torch.int32).tolist():
        want ^= word
    got = 0
    for word in seen.tolist():
        got ^= word
    assert got == want


def test_peak_read_refuses_what_it_cannot_read() -> None:
    emulated = load_emulated()
    with pytest.raises(RuntimeError, match="bytes must be a multiple of 16, got \\[17\\]"):
        emulated.ops.peak_read(torch.zeros(17, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="bytes must be uint8, got int8"):
        emulated.ops.peak_read(torch.zeros(16, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="must lie at a multiple of 16"):
        emulated.ops.peak_read(torch.zeros(40, dtype=torch.uint8)[8:24])
