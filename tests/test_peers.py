"""bench/peers.py: which peers are there, and that they multiply by the same matrix."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qkernels.bench.inputs import Rotation

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import peers  # noqa: E402  its folder is no package

OPTIONS = argparse.Namespace(threads=1, rounds=5)


def test_peers_are_found_or_said_to_be_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise RuntimeError('no such CPU')")
    (tmp_path / "onnxruntime.py").write_text("print('noise'); __version__ = '9.9'")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'tests' / 'fake_peer'}")
    found = peers.importable(sys.executable)
    assert (found["onnxruntime"], found["llama_cpp"], found["vllm"]) == ("9.9", "0.0.fake", None)
    monkeypatch.setattr(peers, "importable", lambda python: {**found, "onnx": None})
    there = peers.find(["first", "second"])
    assert there == {"llama_cpp": ("first", "0.0.fake")}  # onnxruntime without onnx is no use
    said = peers.presence(there, None)
    assert said["onnxruntime"] == "absent: no interpreter given imports onnxruntime and onnx"
    assert said["vllm"] == "absent: no interpreter given imports vllm"
    assert said["llama_cpp"] == "0.0.fake, left out: it needs --model"
    assert peers.presence(there, "m.gguf")["llama_cpp"] == "0.0.fake"


def test_an_interpreter_that_does_not_run_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(peers.WorkerError, match="broken"):
        peers.importable(str(python))


class Numpy:
    """Stands for the worker of onnxruntime: reads the files as it does. zero: of the codes."""

    hello: dict[str, Any]
    zero = 8

    def __init__(self, command: list[str]) -> None:
        folder = Path(command[2])
        codes = np.load(folder / "codes.npy").astype(np.float32)
        scales = np.load(folder / "scales.npy")
        assert codes.shape == (64, 128) and scales.shape == (64, 4)
        assert scales.dtype == np.float32
        self.weight = (codes - self.zero) * np.repeat(scales, 32, axis=1)

    def ask(self, **request: Any) -> dict[str, Any]:
        if "to" not in request:
            return {"us": 250.0}
        np.save(request["to"], np.load(request["x"]) @ self.weight.T)
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.record, "read_bandwidth", lambda repeats: 30.0)


@pytest.mark.usefixtures("quiet")
def test_rows_beside_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "Worker", Numpy)
    found = peers.matmul_nbits("python", OPTIONS, Rotation(1 << 12), ((64, 128),), (1, 16))
    assert found["read_ceiling_gb_per_s"] == 30.0
    assert [row["m"] for row in found["rows"]] == [1, 16]
    for row in found["rows"]:
        assert row["onnxruntime"]["median"] == 250.0
        assert row["ratio"] == pytest.approx(250.0 / row["qkernels"]["median"], rel=1e-2)
        # Codes, and a scale per 32: 2 bytes of ours, 4 of what MatMulNBits takes.
        assert row["qkernels"]["bytes"] == 64 * 128 // 2 + 64 * 4 * 2
        assert row["onnxruntime"]["bytes"] == 64 * 128 // 2 + 64 * 4 * 4
        rate = row["onnxruntime"]["bytes"] / 250e-6 / 1e9
        assert row["onnxruntime"]["gb_per_s"] == pytest.approx(rate, abs=0.01)
        assert row["qkernels"]["n"] == row["onnxruntime"]["n"] == 5
        assert row["onnxruntime"]["gops"] == pytest.approx(row["ops"] / 250e-6 / 1e9, abs=0.01)


@pytest.mark.usefixtures("quiet")
def test_a_peer_that_multiplies_by_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "Worker", Numpy)
    monkeypatch.setattr(Numpy, "zero", 7)
    with pytest.raises(peers.WrongProduct, match="expected below"):
        peers.matmul_nbits("python", OPTIONS, Rotation(1 << 12), ((64, 128),), (1,))


def test_turns_go_back_and_forth() -> None:
    log: list[str] = []

    def variant(name: str) -> Any:
        return lambda: log.append(name) or float(len(log))

    ours, theirs = peers.interleaved(variant("a"), variant("b"), 3)
    assert "".join(log) == "abbaab"
    assert (ours, theirs) == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])


@pytest.mark.usefixtures("quiet")
def test_onnxruntime_itself() -> None:
    if "onnxruntime" not in peers.find([sys.executable]):
        pytest.skip("onnxruntime and onnx are not installed here")
    torch.set_num_threads(1)
    found = peers.matmul_nbits(sys.executable, OPTIONS, Rotation(1 << 16), ((64, 128),), (1, 16))
    assert all(row["onnxruntime"]["median"] > 0 for row in found["rows"])
