"""How fast a model will be here, from its own program on weights that hold nothing.

A plan for this machine's CPU need not trust shares of ceilings that other machines reached: it has
everything that a step takes but the values, and no kernel's time depends on these. All layers run;
they take turns with a few sets of weights, as many as the caches cannot hold.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import TYPE_CHECKING

import torch

from .generate import PREFILL_CHUNK, GenerationSettings, Request, Sampler
from .loading import Weight
from .machines import available, resident
from .nn.decoder import QuantDecoder
from .nn.pool import KvPool
from .quant import PackedWeight

if TYPE_CHECKING:
    from .estimate import Estimate

SECONDS = 0.4  # that steps of one kind are timed for
MOST = 40  # of them; once where one takes longer
LONGEST = 20.0  # seconds that a rehearsal may take; the largest models would take minutes
SHORT = 8  # tokens of context: as good as none
KV_BYTES = 256 << 20  # of the context that is tried beside it, at most
MEMORY_SHARE = 0.5  # of what is free that a rehearsal may take


@dataclass(frozen=True)
class Rehearsal:
    """Medians of what was timed.

    step: seconds of a decode step of `batch` sequences, keys and values left out; kv_byte: more of
    them per byte of keys and values that it reads, 0 where the context is too short to tell;
    prefill: seconds of a prompt of `prompt` tokens of one sequence.
    """

    batch: int
    step: float
    kv_byte: float
    prompt: int
    prefill: float


def _alike(name: str, weight: Weight) -> Hashable:
    """What weights of one place in their layers and of one format have in common."""
    packed = isinstance(weight, PackedWeight)
    kind = (weight.spec, weight.n, weight.k) if packed else (weight.dtype, weight.shape)  # type: ignore[union-attr]
    return re.sub(r"\.\d+\.", ".*.", name, count=1), kind


def _blank(weight: Weight) -> Weight:
    """Zeros in place of `weight`, written: pages that nobody wrote to are all the same one."""
    if isinstance(weight, torch.Tensor):
        return torch.empty_like(weight, device="cpu").zero_()
    made = PackedWeight.empty(weight.spec, weight.n, weight.k)
    parts = made.codes, made.scale, made.zero, made.block_scale, made.block_zero
    for tensor in parts:
        if tensor is not None:
            tensor.view(torch.uint8).zero_()
    if made.perm is not None:
        torch.randperm(weight.k, out=made.perm)
    return made


def shared_sets(weights: Mapping[str, Weight], least: int) -> dict[str, tuple[Hashable, int]]:
    """Which weight each name takes: layers that are alike take turns with as many as make up
    `least` bytes of all layers, at most one each. (What they have in common, the number of it.)"""
    groups: dict[Hashable, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault(_alike(name, weight), []).append(name)
    total = sum(weights[n].nbytes for names in groups.values() if len(names) > 1 for n in names)
    found: dict[str, tuple[Hashable, int]] = {}
    for alike, names in groups.items():
        count = len(names) if total <= least else ceil(len(names) * least / total)
        found |= {name: (alike, i % count) for i, name in enumerate(names)}
    return {name: found[name] for name in weights}


def blank_weights(weights: Mapping[str, Weight], least: int) -> dict[str, Weight]:
    """Weights on the CPU in place of `weights` on meta, shared as `shared_sets` says."""
    sets = shared_sets(weights, least)
    made = {which: _blank(weights[name]) for which, name in _one_each(sets).items()}
    return {name: made[which] for name, which in sets.items()}


def blank_bytes(weights: Mapping[str, Weight], least: int) -> int:
    """Bytes of what `blank_weights` makes."""
    return sum(weights[name].nbytes for name in _one_each(shared_sets(weights, least)).values())


def _one_each(sets: Mapping[str, tuple[Hashable, int]]) -> dict[tuple[Hashable, int], str]:
    return {which: name for name, which in sets.items()}


def _timed(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Medians of the seconds of calls that take turns, for so long in all; the first ones warm
    up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    rounds = -1
    while rounds < 1 or (rounds < MOST and time.perf_counter() - begin < seconds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if rounds >= 0:
                taken[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: median(values) for name, values in taken.items()}


class _Stage:
    """A decoder of blank weights, and sequences of given lengths in its cache."""

    def __init__(self, decoder: QuantDecoder, batch: int, lengths: tuple[int, ...]) -> None:
        self.pool = KvPool(decoder, [length + 1 for length in lengths for _ in range(batch)])
        self.sampler = Sampler(GenerationSettings(temperature=0, seed=0))
        self.sequences = {
            length: [
                Request(i, [0], 1, None, self.pool.add())  # type: ignore[arg-type]
                for i in range(batch)
            ]
            for length in lengths
        }
        for length, requests in self.sequences.items():
            for request in requests:
                self.pool.append_blank(request.handle, length)

    def step(self, length: int) -> None:
        """One token more for each sequence of that length, and back."""
        requests = self.sequences[length]
        self.sampler(self.pool.forward([(r.handle, [0]) for r in requests]), requests)
        for request in requests:
            self.pool.truncate(request.handle, length)


def rehearse(model: Estimate, batch: int, prompt: int) -> Rehearsal | None:
    """Runs the program of a model on this CPU, for a second or two more than a prompt of some
    tokens and a few steps take; None where there is no memory for it or it would take too long.
    batch: sequences decoded together; prompt: tokens of a prompt, of which fewer are tried where
    they would take long."""
    from .bench.ceilings import array_bytes

    least, weights = array_bytes(), model.checkpoint.weights
    room = KV_BYTES // max(1, model.kv_token * batch)
    long = min(model.context - 1, room)
    tried = min(PREFILL_CHUNK, model.rehearsed_prompt(prompt, SECONDS))
    kv = model.kv_token * (batch * (long + SHORT + 128) + tried)
    need = blank_bytes(weights, least) + kv + model.registers(max(tried, batch), batch)
    takes = 4 * model.step_seconds(long, batch) + 2 * (model.prompt_seconds(tried) or 0.0)
    try:
        free = available() - resident()
    except OSError:  # this system does not say
        return None
    if takes > LONGEST or need > MEMORY_SHARE * free or model.context <= 2 * SHORT:
        return None
    decoder = QuantDecoder(
        replace(model.checkpoint, weights=blank_weights(weights, least)),
        act=model.act,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        max_seq_len=max(long, tried, SHORT) + 1,
    )
    lengths = (SHORT, long) if long >= 16 * SHORT else (SHORT,)
    with torch.no_grad():
        stage = _Stage(decoder, batch, lengths)
        steps = {str(length): lambda length=length: stage.step(length) for length in lengths}
        took = _timed(steps, SECONDS * len(lengths))
        kv_byte = 0.0
        if len(lengths) > 1:
            more = batch * (model.kv_read(long) - model.kv_read(SHORT))
            if more > 0:  # windows may see all of both
                kv_byte = max(0.0, took[str(long)] - took[str(SHORT)]) / more
        reading = _Stage(decoder, 1, (tried,))

        def read() -> None:
            handle = reading.sequences[tried][0].handle
            reading.pool.truncate(handle, 0)
            reading.pool.forward([(handle, [0] * tried)])

        prefill = _timed({"prefill": read}, SECONDS)["prefill"]
    step = took[str(SHORT)] - kv_byte * batch * model.kv_read(SHORT)
    return Rehearsal(batch, step, kv_byte, tried, prefill)
