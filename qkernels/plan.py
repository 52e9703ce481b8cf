"""Whether a model fits and how fast it will be, before anything of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ._format import amount, ranges
from .cache import KV_DTYPES
from .estimate import Estimate, Memory, elements
from .generate import MAX_BATCH
from .loading import Weight
from .machines import Machine
from .nn.arguments import asked_types, spec_of
from .outline import outline
from .quant import PackedWeight, QuantSpec, scheme_act
from .rehearse import rehearse

PROMPT = 512  # tokens until the first one is timed, where the context has room
# What is tried where a model does not fit, the least loss first.
SPECS = ("W8A8", "W6A8", "W4A8", "W3A8", "W2A8")


@dataclass(frozen=True)
class Tensors:
    """Weights of one kind. name: as `layers.*.q`; format: their spec or dtype; layers: their
    numbers; count: tensors;
    parameters: elements; nbytes: in memory, padding included."""

    name: str
    format: str
    layers: str
    count: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Speed:
    """decode, decode_full: tokens per second of all sequences together, with an empty and with a
    full context; prefill: prompt tokens per second over a prompt of `prompt` tokens; first_token:
    seconds until it is answered. None where nothing was ever measured. rehearsed: whether the
    model's own steps were timed here, on blank weights; else they are computed from the machine's
    ceilings."""

    decode: float
    decode_full: float
    prompt: int
    prefill: float | None
    first_token: float | None
    rehearsed: bool


@dataclass(frozen=True)
class Plan:
    """What `plan` found. fits: whether the peak is within the machine's memory. max_context: the
    longest context that is, at most what the model was made for; 0 if none. suggestions: what
    would fit where this does not."""

    source: str
    family: str
    machine: Machine
    act: str
    kv_dtype: str
    context: int
    batch: int
    tensors: tuple[Tensors, ...]
    step_weight_bytes: int
    kv_token_bytes: int
    memory: Memory
    speed: Speed
    max_context: int
    model_context: int
    suggestions: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machine.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        sums = {"running": self.memory.running, "while_loading": self.memory.while_loading}
        return {
            **asdict(self),
            "memory": {**asdict(self.memory), **sums, "peak": self.memory.peak},
            "fits": self.fits,
        }


@dataclass(frozen=True)
class _Way:
    """How a model could be loaded."""

    spec: str | QuantSpec | None
    group_size: int | None
    embeddings: str | QuantSpec | None
    act: str
    dtype: str
    kv_dtype: str

    def estimate(self, path: str | Path, machine: Machine, context: int | None) -> Estimate:
        act, spec = self.act, spec_of_scheme(self.spec, self.group_size)
        if act == "auto" and isinstance(self.spec, str):
            act = scheme_act(self.spec)
        quantizes = spec is not None or self.embeddings is not None
        found = outline(path, spec, spec_of(self.embeddings))
        return Estimate(found, machine, act, self.dtype, self.kv_dtype, context, quantizes)


def spec_of_scheme(spec: str | QuantSpec | None, group_size: int | None) -> QuantSpec | None:
    """The QuantSpec of a scheme with this group size. Raises ValueError."""
    if isinstance(spec, str):
        return QuantSpec.from_scheme(spec, group_size)
    if group_size is not None:
        raise ValueError("group_size: only together with a scheme such as W4A16")
    return spec_of(spec)


def plan(
    path: str | Path,
    machine: Machine,
    *,
    context: int | None = None,
    batch: int = 1,
    prompt: int | None = None,
    spec: str | QuantSpec | None = None,
    group_size: int | None = None,
    embeddings: str | QuantSpec | None = None,
    act: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
) -> Plan:
    """What a `QuantDecoder` of the checkpoint at `path` takes on `machine`, from the header.

    path: as for `QuantDecoder.from_pretrained`; spec, embeddings, act, dtype, kv_dtype: too.
    context: tokens of each sequence, prompt included; None: what the model was made for, at most
    32768. batch: sequences at the same time, 1 to 32. prompt: tokens of the prompt that the time to
    the first token is for; None: 512, or half the context.

    Raises CheckpointError for a damaged checkpoint, UnsupportedModelError for a model without code
    here, ValueError for other arguments, FileNotFoundError for a path.
    """
    asked_types(act, dtype, kv_dtype)
    if isinstance(batch, bool) or not isinstance(batch, int) or not 0 < batch <= MAX_BATCH:
        raise ValueError(f"batch: sequences decoded together are 1 to {MAX_BATCH}, got {batch!r}")
    way = _Way(spec, group_size, embeddings, act, dtype, kv_dtype)
    model = way.estimate(path, machine, context)
    if prompt is None:
        prompt = min(PROMPT, max(1, model.context // 2))
    elif not 0 < prompt < model.context:
        raise ValueError(
            f"prompt: expected 1 to {model.context - 1} tokens, one less than the context, got "
            f"{prompt}"
        )
    memory, longest = model.memory(model.context, batch), model.longest(batch)
    fits = memory.peak <= machine.memory
    if machine.here:
        model.rehearsal = rehearse(model, batch, prompt)
    return Plan(
        source=model.checkpoint.source,
        family=model.config.family,
        machine=machine,
        act=model.act,
        kv_dtype=model.kv_dtype,
        context=model.context,
        batch=batch,
        tensors=_tensors(model.checkpoint.weights),
        step_weight_bytes=sum(model.read_bytes()),
        kv_token_bytes=model.kv_token,
        memory=memory,
        speed=_speed(model, batch, prompt),
        max_context=longest,
        model_context=model.config.max_position,
        suggestions=() if fits else tuple(_suggestions(path, machine, way, model, batch, longest)),
    )


def _speed(model: Estimate, batch: int, prompt: int) -> Speed:
    seconds = model.prompt_seconds(prompt)
    return Speed(
        decode=batch / model.step_seconds(1, batch),
        decode_full=batch / model.step_seconds(model.context, batch),
        prompt=prompt,
        prefill=None if seconds is None else prompt / seconds,
        first_token=None if seconds is None else batch * seconds,
        rehearsed=model.rehearsal is not None,
    )


def _tensors(weights: dict[str, Weight]) -> tuple[Tensors, ...]:
    """The weights of a model by name and format, layers together."""
    found: dict[tuple[str, str], list[tuple[int, Weight]]] = {}
    for name, weight in weights.items():
        match = re.search(r"\.(\d+)\.", name)
        short = name if match is None else f"{name[: match.start()]}.*.{name[match.end() :]}"
        kind = (
            str(weight.spec)
            if isinstance(weight, PackedWeight)
            else str(weight.dtype).removeprefix("torch.")
        )
        layer = -1 if match is None else int(match[1])
        found.setdefault((short, kind), []).append((layer, weight))
    rows = []
    for (name, kind), those in found.items():
        sums = sum(elements(w) for _, w in those), sum(w.nbytes for _, w in those)
        layers = ranges([layer for layer, _ in those if layer >= 0])
        rows.append(Tensors(name, kind, layers, len(those), *sums))
    return tuple(rows)


def _smaller(kv_dtype: str) -> list[str]:
    """KV types that take less, the largest first."""
    bits = {name: kind.bits for name, kind in KV_DTYPES.items()}
    found = [name for name in ("int8", "int4") if bits[name] < bits[kv_dtype]]
    return ["float16", *found] if kv_dtype == "float32" else found


def _suggestions(
    path: str | Path, machine: Machine, way: _Way, model: Estimate, batch: int, longest: int
) -> Iterator[str]:
    """What would fit where the model does not, each change by itself before several."""

    def fits(which: Estimate, sequences: int = batch) -> str | None:
        peak = which.memory(model.context, sequences).peak
        return f"{amount(peak)} at most" if peak <= machine.memory else None

    if longest > 1:
        yield f"--context {longest}: the longest that fits as asked"
    for fewer in range(batch - 1, 0, -1):
        if said := fits(model, fewer):
            yield f"--batch {fewer}: {said}"
            break
    for kv_dtype in _smaller(model.kv_dtype):
        if said := fits(model.with_kv(kv_dtype)):
            yield f"--kv-dtype {kv_dtype}: {said}"
            break
    if way.spec is None and model.quantized:  # already at its own size
        least = model.memory(1, 1).peak
        if least > machine.memory:
            yield f"nothing: a token of context takes {amount(least)}"
        return
    for scheme in SPECS:
        smaller = replace(way, spec=scheme, group_size=None).estimate(path, machine, model.context)
        if smaller.decoder.nbytes >= model.decoder.nbytes:
            continue
        for kv_dtype in (model.kv_dtype, *_smaller(model.kv_dtype)):
            if said := fits(smaller.with_kv(kv_dtype)):
                more = "" if kv_dtype == model.kv_dtype else f" --kv-dtype {kv_dtype}"
                yield f"--spec {scheme}{more}: {said}"
                return
    yield f"nothing: even with {SPECS[-1]} the weights take {amount(smaller.decoder.nbytes)}"
