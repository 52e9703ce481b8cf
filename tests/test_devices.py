"""Which device a decoder runs on: what is said where CUDA cannot be used, and what a build covers.
No GPU is asked: torch.cuda is played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder import RAW, SPEC, Random, make

import qkernels as qk
from qkernels import _library, backends, devices, triton
from qkernels.loading import load_hf, placed
from qkernels.nn import QuantDecoder
from qkernels.quant import PackedWeight


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with two GPUs, the second of them current, where all is well."""
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "get_device_capability": lambda index: (9, 0) if index else (7, 5),
        "get_device_name": lambda index: "NVIDIA H200",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "cuda_status", "loaded")
    monkeypatch.setattr(devices, "_capabilities", {})
    monkeypatch.setattr(devices, "cuda_targets", lambda: ["sm_80", "compute_80", "sm_90a"])
    return monkeypatch


def test_auto_is_the_current_gpu(cuda: Any) -> None:
    assert devices.cuda_problem() is None
    assert devices.resolve("auto") == devices.resolve("cuda") == torch.device("cuda:1")
    assert devices.said_of_auto() == (
        "cuda:1: NVIDIA H200, compute capability 9.0, by the CUDA library"
    )
    assert devices.resolve("cpu") == torch.device("cpu")
    assert "cuda:1: NVIDIA H200" in str(qk.info())


PROBLEMS = [
    (torch.version, "cuda", None, "torch .* has no CUDA; install one that has"),
    (_library, "cuda_status", "not built (no nvcc)", "_C_cuda is not built .*FORCE_CUDA=1 pip"),
    (torch.cuda, "is_available", lambda: False, "torch sees no GPU"),
    (torch.cuda, "current_device", lambda: 0, "capability 7.5, and the kernels need 8.0"),
    (devices, "cuda_targets", lambda: ["sm_80"], '9.0 cannot run; .*TORCH_CUDA_ARCH_LIST="9.0"'),
]


@pytest.mark.parametrize(("of", "name", "value", "words"), PROBLEMS)
def test_what_is_missing_is_said(cuda: Any, of: Any, name: str, value: Any, words: str) -> None:
    cuda.setattr(of, name, value)
    cuda.setattr(triton, "problem", lambda: "Triton is not installed")
    with pytest.raises(RuntimeError, match=f"(?s)device 'cuda' cannot be used: .*{words}"):
        QuantDecoder.from_pretrained("nowhere", device="cuda")
    assert devices.resolve("auto") == torch.device("cpu")
    assert devices.said_of_auto().startswith("cpu: ")


def test_a_gpu_that_is_not_there(cuda: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"'cuda:2' cannot be used: .*no GPU number 2; .* sees 2"
    ):
        devices.resolve("cuda:2")
    with pytest.raises(RuntimeError, match=r"'cuda:0' cannot be used: .* 7\.5"):
        devices.resolve("cuda:0")


def test_a_build_without_a_note_covers_whatever_there_is(cuda: Any) -> None:
    cuda.setattr(devices, "cuda_targets", list)
    assert devices.cuda_problem() is None


@pytest.mark.parametrize(
    ("targets", "runs", "not_on"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["sm_90a"], [(9, 0)], [(10, 0), (8, 9)]),
        (["sm_100f"], [(10, 0), (10, 3)], [(12, 0)]),
        (["sm_80", "compute_80"], [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        (["avx2"], [], [(9, 0)]),
    ],
)
def test_what_a_target_runs_on(
    targets: list[str], runs: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    assert all(devices.covered(targets, found) for found in runs)
    assert not any(devices.covered(targets, found) for found in not_on)


def test_targets_are_those_that_the_build_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "HERE", tmp_path)
    assert devices.cuda_targets() == []
    note = {"built": {"_C_cuda": {"targets": ["sm_90a"]}}}
    (tmp_path / "build_info.json").write_text(json.dumps(note))
    assert devices.cuda_targets() == ["sm_90a"]


def test_an_old_gpu_falls_back_to_the_reference(cuda: Any) -> None:
    """Each GPU by its own capability."""
    cuda.setattr(backends, "implemented", lambda row, device: True)
    cuda.setattr(backends, "_choices", {})
    seen: list[str] = []
    cuda.setattr(backends, "_overload", lambda namespace, op: seen.append(namespace))
    with pytest.warns(backends.FallbackWarning, match=r"norm .*capability 7.5, and .* need 8.0"):
        backends.select("norm", torch.device("cuda:0"))
    backends.select("norm", torch.device("cuda:1"))
    assert seen == ["qkernels_reference", "qkernels"]
    assert backends.facts_of(torch.device("cpu")) == backends.facts_of(torch.device("cuda:1")) == {}


def test_int8_sums_that_could_overflow() -> None:
    case = {"act": "int8", "group": 65536, "act_group": 65536}
    rows = {row.name: row for row in backends.rows("linear")}
    assert rows["cuda"].supports(case) == rows["cpu"].supports(case)
    assert "could overflow" in str(rows["cuda"].supports(case))
    assert rows["cuda"].supports({"act": "float"}) is None


def test_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as soon as it is packed, so that no two are in the memory of the CPU."""
    alive: list[int] = []

    real = PackedWeight.empty.__func__  # type: ignore[attr-defined]

    def empty(cls: Any, spec: Any, n: int, k: int, device: Any = "cpu") -> PackedWeight:
        made = real(cls, spec, n, k, device)
        if device == "cpu":
            alive.append(made.nbytes)
        return made

    def to(self: PackedWeight, device: Any) -> PackedWeight:
        assert len(alive) == 1
        alive.clear()
        return real(PackedWeight, self.spec, self.n, self.k, "meta")

    monkeypatch.setattr(PackedWeight, "empty", classmethod(empty))
    monkeypatch.setattr(PackedWeight, "to", to)
    checkpoint = load_hf(RAW, Random(), SPEC, qk.QuantSpec(8, 32), device=torch.device("meta"))
    packed = [w for w in checkpoint.weights.values() if isinstance(w, PackedWeight)]
    assert len(packed) == 15 and not alive
    dense = [w for w in checkpoint.weights.values() if isinstance(w, torch.Tensor)]
    assert {w.device.type for w in dense} == {"meta"}


def test_placed_keeps_bytes() -> None:
    weight = PackedWeight.empty(qk.QuantSpec(4, 32, "e8m0"), 64, 64)
    weight.scale.view(torch.uint8).random_(1, 250)
    moved = placed(weight, torch.device("meta"))
    assert isinstance(moved, PackedWeight) and moved.scale.dtype == torch.float8_e8m0fnu
    assert moved.device.type == "meta" and placed(weight, None) is weight


def test_types_follow_the_device() -> None:
    """auto is what suits the device that the decoder is on by then; what was asked for stays."""
    decoder = make(act="auto", kv_dtype="auto")
    assert (decoder.act, decoder.dtype, decoder.kv_dtype) == ("int8", torch.float32, "float16")
    decoder = make(act="auto", kv_dtype="auto", dtype="bfloat16")
    assert decoder.kv_dtype == "bfloat16"
    assert "activations are bfloat16" in (decoder.composed_because() or "")


@pytest.mark.parametrize(
    ("said", "dtype"),
    [("float16", torch.float16), ("float32", torch.bfloat16), (None, torch.bfloat16)],
)
def test_activations_on_a_gpu_have_16_bits(said: str | None, dtype: torch.dtype) -> None:
    checkpoint = load_hf({**RAW, "torch_dtype": said}, Random(), SPEC, qk.QuantSpec(8, 32))
    decoder = QuantDecoder(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantDecoder, "device", torch.device("cuda:0"))
        assert decoder.dtype == dtype and decoder.act == "float"
        assert decoder.kv_dtype == str(dtype).removeprefix("torch.")


def test_info_of_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make()
    facts = dict(qk.info(decoder).facts)  # type: ignore[union-attr]
    assert facts["device"] == "cpu" and facts["dtype"] == "float32 between the matrices"
    assert facts["runs as"] == "one native call per step"
    monkeypatch.setattr(QuantDecoder, "decodes_on_device", True)
    facts = dict(qk.info(decoder).facts)  # type: ignore[union-attr]
    assert facts["runs as"].startswith("one CUDA graph per decode step")
    with qk.backend("reference"):
        facts = dict(qk.info(decoder).facts)  # type: ignore[union-attr]
        assert facts["runs as"] == "one op after the other: the row 'reference' computes norm"
