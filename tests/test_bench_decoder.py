"""bench/bench_decoder.py: what a sweep covers, and the bytes its shares count."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

import qkernels as qk
from qkernels.cache import token_bytes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import bench_decoder  # noqa: E402  its folder is no package
import random_gguf  # noqa: E402
from footprint import footprint  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "tiny.gguf"
    return random_gguf.write(path, random_gguf.MODELS["tiny"], "Q4_K_M")


def test_each_size_is_measured_once() -> None:
    found = bench_decoder.points([128, 4096], [1, 8])
    sizes = [(p.kv_dtype, p.batch, p.context) for p in found]
    wanted = [(1, 128), (1, 4096), (8, 128)]
    assert sizes == [(kv, *size) for kv in ("int8", "float16") for size in wanted]


def test_bytes_of_a_step(tiny: Path) -> None:
    decoder = qk.QuantDecoder.from_pretrained(tiny, kv_dtype="int8", max_seq_len=256)
    weights = footprint(tiny).weight_bytes
    kv = 2 * token_bytes("int8", 2, 32)  # two layers
    assert weights < decoder.weight_bytes + 100_000
    least = min(weights, decoder.weight_bytes)
    assert bench_decoder.bytes_read(decoder, tiny, 100) == least + 100 * kv
    assert bench_decoder.bytes_read(decoder, tiny, 100, batch=4) == least + 400 * kv


def test_a_row_counts_steps_not_tokens() -> None:
    point = bench_decoder.Point("int8", 4, 128, [500.0] * 5, [0.2] * 5, [80.0] * 5)
    row = bench_decoder.sweep_row(point, 1_000_000_000, 40.0)
    assert (row["batch"], row["context"], row["first_token"]["median"]) == (4, 128, 0.2)
    assert row["gb_per_s"] == pytest.approx(20.0)  # 80 tokens/s in 20 steps
    assert row["percent_of_read"] == pytest.approx(50.0)


def test_every_other_round_goes_backwards(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decoder.record, "read_bandwidth", lambda repeats: 30.0)
    log: list[tuple[str, int]] = []
    real = bench_decoder.Point.take

    def take(point: bench_decoder.Point, *given: Any, **kept: Any) -> None:
        log.append((point.kv_dtype, point.context))
        real(point, *given, **kept)

    monkeypatch.setattr(bench_decoder.Point, "take", take)
    options = argparse.Namespace(contexts=[8, 40], batches=[1], decode=4, rounds=5)
    bench_decoder.sweep(tiny, options)
    size = 6  # three contexts, two KV types
    rounds = [log[i : i + size] for i in range(0, len(log), size)]
    assert len(rounds) == 6 and len(set(rounds[0])) == size
    for turn, order in enumerate(rounds):
        assert order == (rounds[0][::-1] if turn % 2 else rounds[0])


def test_a_sweep(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decoder.record, "read_bandwidth", lambda repeats: 30.0)
    options = argparse.Namespace(contexts=[8, 40], batches=[2], decode=4, rounds=5)
    found = bench_decoder.sweep(tiny, options)
    assert found["load_seconds"]["n"] >= 5
    sizes = [(row["kv_dtype"], row["batch"], row["context"]) for row in found["rows"]]
    wanted = [(1, 8), (1, 40), (2, 128)]
    assert sizes == [(kv, *size) for kv in ("int8", "float16") for size in wanted]
    for row in found["rows"]:
        for what in ("prefill", "first_token", "decode"):
            assert row[what]["n"] == 5 and row[what]["min"] > 0
    int8, float16 = found["rows"][1], found["rows"][4]
    assert int8["bytes_per_step"] < float16["bytes_per_step"]
