"""Variants timed in turns, so that each meets the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Call = Callable[[int], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """rounds: samples of each variant. seconds: that one sample should take, in as many calls as
    needed."""

    rounds: int = 7
    seconds: float = 0.03

    def __post_init__(self) -> None:
        if self.rounds < 5:
            raise ValueError(f"a median needs at least 5 rounds, got {self.rounds}")


QUICK_EFFORT = Effort(rounds=5, seconds=0.01)


class Timer:
    """One variant: calls per sample, found while warming up, and where its rotation stands."""

    def __init__(self, call: Call, seconds: float, clock: Clock = time.perf_counter) -> None:
        self._call, self._clock, self._next = call, clock, 0
        self._run(1)  # allocates, and starts the threads
        self.calls = max(1, math.ceil(seconds / max(self._run(1), 1e-7)))
        if self.calls > 1:  # the second call may still have been slow
            self.calls = max(1, math.ceil(seconds / max(self._run(min(self.calls, 20)), 1e-7)))

    def _run(self, calls: int) -> float:
        """Seconds per call."""
        first = self._next
        start = self._clock()
        for i in range(first, first + calls):
            self._call(i)
        elapsed = self._clock() - start
        self._next = first + calls
        return elapsed / calls

    def sample(self) -> float:
        """Microseconds per call."""
        return 1e6 * self._run(self.calls)


def interleave(
    variants: Mapping[str, Call], effort: Effort, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Microseconds per call of each variant, a sample per round; every other round goes backwards,
    so that none is always the first after another."""
    timers = {name: Timer(call, effort.seconds, clock) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(effort.rounds):
        for name in order:
            samples[name].append(timers[name].sample())
        order.reverse()
    return samples
