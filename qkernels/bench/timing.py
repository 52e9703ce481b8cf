"""Variants timed in turns, so that each meets the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Call = Callable[[int], Any]
Clock = Callable[[], float]
Check = Callable[[Any], None]
_SLOW_SECONDS, _SLOW_TIMES = 1.0, 4.0


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
    """One variant: calls per sample, found while warming up, and where its rotation stands.

    limit: seconds of a first call after which there is no other one; `only` has its microseconds
    then, and is None otherwise. check: takes the result of the first call. per_call: seconds that a
    call took while warming up.
    """

    def __init__(
        self,
        call: Call,
        seconds: float,
        clock: Clock = time.perf_counter,
        limit: float = math.inf,
        check: Check | None = None,
    ) -> None:
        self._call, self._clock, self._next = call, clock, 1
        self.calls = 1
        start = clock()
        first = call(0)  # allocates, and starts the threads
        self.per_call = clock() - start
        if check is not None:
            check(first)
        del first
        self.only = 1e6 * self.per_call if self.per_call > limit else None
        if self.only is not None:
            return
        for most in (1, 20):  # the second call may still have been slow
            self.per_call = self._run(min(self.calls, most))
            self.calls = max(1, math.ceil(seconds / max(self.per_call, 1e-7)))
            if self.calls == 1:
                break

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
    variants: Mapping[str, Call],
    effort: Effort,
    clock: Clock = time.perf_counter,
    checks: Mapping[str, Check] | None = None,
) -> dict[str, list[float]]:
    """Microseconds per call of each variant, a sample per round; every other round goes backwards,
    so that none is always the first after another.

    The first variant is ours. Another whose first call takes more than a second and more than
    four times as long as ours is not called again: that call is its only sample. (torch's int8
    product without AVX-512 takes minutes for a large matrix.) For the same reason `checks`, by
    variant, get the result of that first call and not of one more; what they raise ends it all
    before the first sample.
    """
    timers: dict[str, Timer] = {}
    limit = math.inf
    for name, call in variants.items():
        timers[name] = Timer(call, effort.seconds, clock, limit, (checks or {}).get(name))
        if len(timers) == 1:
            limit = max(_SLOW_SECONDS, _SLOW_TIMES * timers[name].per_call)
    samples = {name: [] if t.only is None else [t.only] for name, t in timers.items()}
    order = [name for name, timer in timers.items() if timer.only is None]
    for _ in range(effort.rounds):
        for name in order:
            samples[name].append(timers[name].sample())
        order.reverse()
    return samples
