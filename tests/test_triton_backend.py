"""Triton as a backend: its rows in the table, a decoder on them, and what is said where Triton or
the CUDA library is missing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_plain
from gpus import triton_gpu
from test_decoder import make
from test_device_steps import on_device

import qkernels as qk
from qkernels import _library, backends, devices, ops, triton
from qkernels.ops.registry import TRITON, computing
from qkernels.quant import QuantSpec

ROOT = Path(__file__).resolve().parent.parent
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _there() -> None:
    triton_gpu()


def test_every_computing_op_has_a_kernel() -> None:
    """But for decoder_step, which is the CPU's way to make a step of all of them."""
    for op in computing():
        row = next((row for row in backends.rows(op) if row.name == "triton"), None)
        assert (row is None) == (op == "decoder_step")
        assert row is None or backends.implemented(row, HERE.type)


def test_interpreted_it_is_for_those_who_name_it(generator: torch.Generator) -> None:
    packed = random_plain(QuantSpec(4, 32), 64, 32, generator).pack()
    x = torch.randn(1, 32, generator=generator)
    case = {"weight": packed.kind, "act": "float", "group": 32, "act_group": 0}
    assert backends.choose("linear", "cpu", case).row.name == "cpu"
    with qk.backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("norm", HERE).name() == "qkernels_triton::norm"
        y = ops.linear(x.to(HERE), packed if HERE.type == "cpu" else packed.cuda(), act="float")
    torch.testing.assert_close(y.cpu(), ops.linear(x, packed, act="float"))


@pytest.mark.parametrize(
    "act, kv_dtype",
    [("float", "float32"), ("int8", "float32"), ("float", "float16"), ("int8", "int8")],
)
def test_a_decoder_gives_the_tokens_of_the_cpu(act: str, kv_dtype: str) -> None:
    """Two layers, in float32, whose greedy tokens no rounding decides."""
    kinds = {"act": act, "kv_dtype": kv_dtype}
    want = make(**kinds).generate("go on", max_new_tokens=4, stop_at_eos=False)
    assert len(set(want.tokens[0])) == 4
    with pytest.MonkeyPatch.context() as patch:
        on_device(patch, TRITON)
        decoder = make(**kinds)
        got = decoder.generate("go on", max_new_tokens=4, stop_at_eos=False)
        assert decoder._device_steps is not None
    assert got.tokens == want.tokens


def test_without_the_library_it_is_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is played: it has Triton's kernels and no others."""
    real = backends.implemented
    monkeypatch.setattr(
        backends, "implemented", lambda row, device: row.namespace == TRITON or real(row, device)
    )
    monkeypatch.setattr(backends, "_choices", {})
    cuda = torch.device("cuda", 0)
    with qk.backend("auto", on_fallback="error"):
        assert backends._resolve("norm", cuda, {}) == TRITON
    choice = backends.choose("norm", "cuda", {})
    assert choice.reasons == (("cuda", "qkernels has no kernel of it for cuda"),)
    library = "_C_cuda was built for sm_80, which a GPU of compute capability 12.0 cannot run"
    monkeypatch.setattr(backends, "facts_of", lambda device: {"library": library})
    monkeypatch.setattr(backends, "implemented", lambda row, device: True)
    with qk.backend("auto", on_fallback="error"):
        assert backends._resolve("norm", cuda, {}) == TRITON
    monkeypatch.setattr(backends, "facts_of", lambda device: {"capability": (7, 5)})
    old = pytest.raises(backends.FallbackError, match=r"7\.5, and the kernels need 8\.0")
    with qk.backend("auto", on_fallback="error"), old:
        backends._resolve("norm", cuda, {})


def played_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(devices, "_capabilities", {})


def test_a_gpu_without_the_library_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    played_gpu(monkeypatch, (12, 0))
    monkeypatch.setattr(_library, "cuda_status", "not built (no nvcc)")
    assert devices.resolve("cuda") == devices.resolve("auto") == torch.device("cuda:0")
    assert devices.said_of_auto() == (
        "cuda:0: Some GPU, compute capability 12.0, by Triton kernels"
    )
    missing = "Triton is not installed (pip install 'qkernels[triton]')"
    monkeypatch.setattr(triton, "problem", lambda: missing)
    with pytest.raises(
        RuntimeError, match=r"(?s)FORCE_CUDA=1.*or let Triton compile .*not installed"
    ):
        devices.resolve("cuda")


def test_a_library_for_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    played_gpu(monkeypatch, (12, 0))
    monkeypatch.setattr(_library, "cuda_status", "loaded")
    monkeypatch.setattr(devices, "cuda_targets", lambda: ["sm_80", "sm_90a"])
    assert devices.resolve("cuda") == torch.device("cuda:0")
    facts = backends.facts_of(torch.device("cuda:0"))
    assert "built for sm_80, sm_90a" in facts["library"] and "capability" not in facts
    assert "built for sm_80" in (backends._cuda(facts) or "")
    assert backends._triton(facts) is None


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, r"Triton is not installed \(pip install 'qkernels\[triton\]'\)"),
        ("3.5.1", "need 3.6"),
    ],
)
def test_a_missing_triton_is_said_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    monkeypatch.setattr(triton, "version", lambda: version)
    assert re.search(said, triton.status())
    assert re.search(said, str(qk.info()))
    refused = pytest.raises(backends.FallbackError, match=said)
    with qk.backend("triton", on_fallback="error"), refused:
        backends._resolve("norm", torch.device("cpu"), {})


def test_triton_is_imported_by_the_first_call_alone() -> None:
    """The package, and what runs on the CPU, do without it (torch may have imported it)."""
    code = (
        "import sys, torch, qkernels as qk\n"
        "qk.ops.norm(torch.randn(2, 64), torch.randn(64), eps=1e-5)\n"
        "assert not any(name.startswith('qkernels.triton.') for name in sys.modules)\n"
        "from qkernels import triton\n"
        "print(triton.status())\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"Triton [\d.]+\w*, for GPUs\n", done.stdout)


def test_the_walk_of_the_document(tmp_path: Path) -> None:
    """docs/adding-a-kernel.md: its three files, installed by their metadata as pip leaves it."""
    text = (ROOT / "docs" / "adding-a-kernel.md").read_text()
    files = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", text, re.DOTALL))
    assert {"ours/__init__.py", "pyproject.toml", "check.py"} <= set(files)
    for name in ("ours/__init__.py", "pyproject.toml", "check.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[name])
    installed = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    installed += ["--no-index", "--target", str(tmp_path / "site"), str(tmp_path)]
    subprocess.run(installed, check=True, capture_output=True)
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    if HERE.type == "cpu":
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table, op, verdict = done.stdout.splitlines()
    names = ast.literal_eval(table)
    assert (
        names.index("ours") == names.index(HERE.type) - 1
        and op == "ours::norm"
        and verdict == "right"
    )
