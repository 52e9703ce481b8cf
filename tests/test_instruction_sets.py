"""bench/instruction_sets.py: the sets take turns, and the best one is in use afterwards."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import instruction_sets

SPEEDS = {"avx512": 200.0, "avx2": 100.0, "scalar": 10.0}


class Decoder:
    """Decodes at the speed of the set in use."""

    config = SimpleNamespace(vocab=100)

    def __init__(self, fails_at: int = -1) -> None:
        self.used: list[str] = []
        self.fails_at = fails_at

    def generate(self, prompts: list[list[int]], **options: Any) -> Any:
        if len(self.used) == self.fails_at:
            raise RuntimeError("stop")
        isa = torch.ops.qkernels.cpu_isa()
        self.used.append(isa)
        speed = SPEEDS[isa]
        timings = SimpleNamespace(
            prefill_tokens_per_second=3 * speed, decode_tokens_per_second=speed
        )
        return SimpleNamespace(timings=timings)


def available() -> list[str]:
    return list(torch.ops.qkernels.cpu_isas().split(", "))


def test_sets_take_turns() -> None:
    isas, best = available(), torch.ops.qkernels.cpu_isa()
    decoder = Decoder()
    rows = instruction_sets.measure(decoder, isas, 5)
    assert decoder.used == (isas[::-1] + isas) * 3
    assert [row["isa"] for row in rows] == isas
    for row in rows:
        assert row["decode"]["n"] == row["prefill"]["n"] == 5
        assert row["decode"]["median"] == SPEEDS[row["isa"]]
        assert row["decode_ratio"] == round(SPEEDS[row["isa"]] / SPEEDS[isas[0]], 3)
    assert torch.ops.qkernels.cpu_isa() == best


def test_the_best_set_is_in_use_after_a_failure() -> None:
    isas, best = available(), torch.ops.qkernels.cpu_isa()
    with pytest.raises(RuntimeError, match="stop"):
        instruction_sets.measure(Decoder(fails_at=2), isas[::-1], 5)
    assert torch.ops.qkernels.cpu_isa() == best
